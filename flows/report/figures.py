"""Pictures of the report's plots for papers, drawn by a headless Chromium that opens the page itself."""

import base64
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from flows.report.data import collect
from flows.report.page import render
from storage import Store, UsageError

Format = Literal["png", "svg"]
# Names of the plots and where they are on the page.
PLOTS = {
    "trajectories": "line-plot",
    "layers": "heat-plot",
    "phases": "phase-plot",
    "growth": "growth-plot",
    "heads": "heads-plot",
    "map": "map",
    "pieces": "band-plot",
}
_MISSING = (
    "pictures need Playwright and a Chromium: pip install -e '.[figures]', then playwright install chromium "
    "(or name an installed one in the environment variable CHROMIUM)"
)
# Pixels of a PNG per unit of the page: 900 units in 3 times as many pixels print at 7.5 cm with 900 dpi.
_SCALE = 3
_WIDTH = 900


def draw_figures(
    store: Store, series: str, kind: Format, plots: Sequence[str] = (), metric: str | None = None
) -> dict[str, bytes]:
    """Return pictures of the chosen plots (all that the page has, where none is chosen), by name of the plot.

    Args:
        store: where the tables are.
        series: whose report is drawn.
        kind: ``png`` or ``svg``; the heat maps in an SVG are pixels.
        plots: keys of ``PLOTS``.
        metric: the trajectory that ``trajectories`` and ``layers`` show, named as in state models
            (``rankme_cov[resid_post.3]``); by default the one that the page shows first.

    Raises:
        UsageError: an unknown plot or trajectory, a plot that the page does not have, or no browser.
    """
    for name in plots:
        if name not in PLOTS:
            raise UsageError(f"there is no plot {name!r} (known: {', '.join(PLOTS)})")
    data = collect(store, series)
    names = [trajectory.name for trajectory in data.shown]
    if metric is not None and metric not in names:
        raise UsageError(f"the report of {series} shows no trajectory {metric!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(render(data, []), encoding="utf-8")
        return _drawn(path, kind, plots, None if metric is None else names.index(metric))


def _drawn(path: Path, kind: Format, plots: Sequence[str], shown: int | None) -> dict[str, bytes]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UsageError(_MISSING) from None
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        except Error:
            raise UsageError(_MISSING) from None
        try:
            page = browser.new_page(
                color_scheme="light",
                viewport={"width": _WIDTH + 48, "height": 900},
                device_scale_factor=_SCALE,
            )
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached")
            if shown is not None:
                page.evaluate("(i) => window.ontogenyReport.show(i)", shown)
            there = [name for name, place in PLOTS.items() if page.evaluate(_HAS, place)]
            for name in plots:
                if name not in there:
                    raise UsageError(f"the page has no plot {name!r} (it has: {', '.join(there) or 'none'})")
            return {name: _picture(page, PLOTS[name], kind) for name in plots or there}
        finally:
            browser.close()


def _chromium() -> str | None:
    """The installed browser; None leaves the choice to Playwright."""
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


def _picture(page: Any, place: str, kind: Format) -> bytes:
    if place == "map":
        if kind == "png":
            wide: int = page.evaluate(_WIDE)
            page.set_viewport_size({"width": max(wide, _WIDTH) + 100, "height": 900})
            raw: bytes = page.locator("svg.map").screenshot()
            return raw
        return str(page.evaluate(_MAP)).encode()
    url: str = page.evaluate(_PLOT, [place, kind, _SCALE if kind == "png" else 1])
    head, _, body = url.partition(",")
    return base64.b64decode(body) if head.endswith("base64") else unquote_to_bytes(body)


_HAS = """(place) => {
  if (place === "map") return document.querySelector("svg.map") !== null;
  const plot = document.getElementById(place);
  return Boolean(plot && plot.data && plot.data.length);
}"""

_PLOT = """async ([place, format, scale]) => {
  const plot = document.getElementById(place);
  await Plotly.relayout(plot, { paper_bgcolor: "#ffffff" });
  // While Plotly answers to a resize its layout has no size of its own.
  const full = plot._fullLayout, width = plot.clientWidth || full.width;
  const height = plot.layout.height || full.height;
  return Plotly.toImage(plot, { format, scale, width, height });
}"""

# A map wider than the page would be cut at the edge of its scroll area.
_WIDE = """() => {
  const map = document.querySelector("svg.map");
  document.body.style.maxWidth = "none";
  map.parentElement.style.overflow = "visible";
  return Math.ceil(map.getBoundingClientRect().width);
}"""

# The drawing takes its colours from the page's style sheet, which goes with it.
_MAP = """() => {
  const drawing = document.querySelector("svg.map").cloneNode(true);
  const [, , width, height] = drawing.getAttribute("viewBox").split(" ");
  drawing.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  drawing.setAttribute("width", width);
  drawing.setAttribute("height", height);
  drawing.dataset.theme = "light";
  const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
  style.textContent = document.querySelector("head style").textContent;
  drawing.prepend(style);
  return new XMLSerializer().serializeToString(drawing);
}"""
