"""Flow: render the report of a series from its tables."""

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import show_link
from flows.config import default_root
from flows.report import render_report
from storage.keys import check_name
from storage.store import Store


@task(name="render-report", cache_policy=NO_CACHE)
def render(series: str, root: str) -> str:
    """Task: render the page and store it; return its path."""
    store = Store(root)
    return store.write_text(f"reports/{check_name('series', series)}.html", render_report(store, series))


@flow(name="report", flow_run_name="report {series}")
def report_series(series: str, root: str = default_root()) -> str:
    """Write ROOT/reports/SERIES.html, one page that needs no network; return its path."""
    path = render(series, root)
    show_link("report", series, path, f"Report of {series}")
    return path
