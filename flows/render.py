"""Flow: render the report of a series from its tables, as a page or as pictures of its plots."""

from typing import Literal

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


@task(name="draw-figures", cache_policy=NO_CACHE)
def draw(
    series: str, root: str, kind: Literal["png", "svg"], plots: list[str], metric: str | None
) -> list[str]:
    """Task: draw the plots and store them; return their paths."""
    from flows.report.figures import draw_figures

    store = Store(root)
    name = check_name("series", series)
    pictures = draw_figures(store, series, kind, plots, metric)
    return [store.write_bytes(f"reports/{name}-{plot}.{kind}", raw) for plot, raw in pictures.items()]


@flow(name="report", flow_run_name="report {series}")
def report_series(series: str, root: str = default_root()) -> str:
    """Write ROOT/reports/SERIES.html, one page that needs no network; return its path."""
    path = render(series, root)
    show_link("report", series, path, f"Report of {series}")
    return path


@flow(name="figures", flow_run_name="figures {series}")
def figures_of_series(
    series: str,
    kind: Literal["png", "svg"] = "png",
    plots: list[str] | None = None,
    metric: str | None = None,
    root: str = default_root(),
) -> list[str]:
    """Write ROOT/reports/SERIES-PLOT.png (or .svg) of the chosen plots; return their paths."""
    return draw(series, root, kind, plots or [], metric)
