"""Flows of the deployments: each takes a form and does what the command of its name does."""

from prefect import flow
from transformers.utils import logging as transformers_logging

from flows.audit import audit_series
from flows.forms import AuditForm, MeasureForm, ReportForm, StatesForm, WatchForm
from flows.measure import MeasureSummary, measure_series
from flows.render import report_series
from flows.states import StatesSummary, fit_states_of
from flows.study import StudySummary, study_series
from flows.watch import WatchSummary, watch_series, watched
from storage.audit import Finding
from storage.store import Store

transformers_logging.disable_progress_bar()  # a worker's log is no terminal

# The commands' flows run inside these as plain functions: one run on Prefect's page, not two of one thing.


@flow(name="study-series", flow_run_name="study {form.series}")
def study(form: MeasureForm) -> StudySummary:
    """Audit, measure, find phases, fit the states and write the report of a series.

    Args:
        form: which series, and what is measured of it
    """
    return study_series.fn(form.config(), form.store)


@flow(name="measure-series", flow_run_name="measure {form.series}")
def measure(form: MeasureForm) -> MeasureSummary:
    """Measure every checkpoint of a series whose results are not in the store yet.

    Args:
        form: which series, and what is measured of it
    """
    return measure_series.fn(form.config(), form.store)


@flow(name="fit-states-of-series", flow_run_name="states {form.series}")
def states(form: StatesForm) -> StatesSummary:
    """Fit the state model over the stored metrics of a series.

    Args:
        form: which series, and which of its trajectories
    """
    return fit_states_of.fn(form.config(), form.store)


@flow(name="report-series", flow_run_name="report {form.series}")
def report(form: ReportForm) -> str:
    """Write the report of a series from its tables; return its path.

    Args:
        form: which series
    """
    return report_series.fn(form.series, form.store)


@flow(name="audit-series", flow_run_name="audit {form.series}")
def audit(form: AuditForm) -> list[Finding]:
    """Catalogue a series and list what is wrong with it. No weights are downloaded.

    Args:
        form: which series
    """
    return audit_series.fn(form.config(), form.store)


@flow(name="watch-series", flow_run_name="watch")
def watch(form: WatchForm) -> list[WatchSummary]:
    """Measure what is new, decode its state, and say what is unlike anything before.

    One series that fails, as when the Hub does not answer, does not keep the others from their turn.

    Args:
        form: which series, and by which model
    """
    configs = watched(Store(form.store), form.series)
    states = [watch_series(config, form.store, form.of, form.model, return_state=True) for config in configs]
    return [state.result() for state in states]
