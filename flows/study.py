"""Flow: all of it for one series: audit, measure, curves, crosscoder, states, report."""

from prefect import flow
from pydantic import BaseModel

from flows.config import SeriesConfig, default_root
from flows.crosscoder import CrosscoderSummary, crosscoder_series
from flows.curves import CurvesSummary, curves_of
from flows.measure import MeasureSummary, measure_series
from flows.render import report_series
from flows.states import StatesSummary, fit_states_of
from storage.errors import OntogenyError
from storage.store import Store


class StudySummary(BaseModel):
    """What a study did and where its results are."""

    measure: MeasureSummary
    curves: CurvesSummary
    states: StatesSummary
    crosscoder: CrosscoderSummary | None
    report: str
    anything_new: bool

    @property
    def failed(self) -> list[str]:
        """Labels of the checkpoints that failed."""
        return self.measure.failed if self.crosscoder is None else self.crosscoder.failed


@flow(name="study", flow_run_name="study {config.name}")
def study_series(config: SeriesConfig, root: str = default_root()) -> StudySummary:
    """Measure what is missing, find phases, fit the states, write the report.

    With ``crosscoder.harvest`` crosscoders are trained too, before the states, which may read their metrics.
    Where nothing is new the report is left alone.
    """
    measured = measure_series(config, root)
    store = Store(root)
    if not store.files("metrics", config.name):
        raise OntogenyError(_nothing(store, config.name, measured.failed))
    curves = curves_of(config, root, absent="skip")
    crosscoders = crosscoder_series(config, root, measured) if config.crosscoder.harvest else None
    states = fit_states_of(config, root)
    new = bool(
        measured.keys_computed or measured.failed or curves.computed or states.computed or states.compared
    ) or bool(crosscoders and crosscoders.anything_new)
    report = f"{root}/reports/{config.name}.html"
    if new or not store.fs.exists(f"{store.path}/reports/{config.name}.html"):
        report_series(config.name, root)
        new = True
    return StudySummary(
        measure=measured,
        curves=curves,
        states=states,
        crosscoder=crosscoders,
        report=report,
        anything_new=new,
    )


def _nothing(store: Store, series: str, failed: list[str]) -> str:
    """Why there is nothing to study."""
    why = [row["error"] for row in store.table("failures", series).to_pylist()]
    reason = f": {', '.join(failed[:3])}: {why[-1]}" if failed and why else ""
    return f"no checkpoint of {series!r} could be measured, so there is nothing to study{reason}"
