"""The report: one self-contained HTML page about a series, read from its tables."""

from flows.report.crosscoder import parts
from flows.report.data import collect
from flows.report.page import render
from storage import Store

__all__ = ["render_report"]


def render_report(store: Store, series: str) -> str:
    """Return the report of ``series`` as the complete text of one HTML page that needs no network.

    Tables that are missing or empty are said to be so on the page.

    Raises:
        UsageError: the store holds no table of ``series``.
    """
    data = collect(store, series)
    return render(data, parts(store, data))
