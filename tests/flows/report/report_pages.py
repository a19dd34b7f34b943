"""What tests of the report share: reading a page without a browser, and opening it in one."""

import base64
import gzip
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest


class Elements(HTMLParser):
    """Tags with their attributes, the embedded data, and the visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.json = ""
        self.packed = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "report-data":
            self.json += data
        elif self._inside == "values-packed":
            self.packed += data
        elif not self._inside:
            self.text.append(data)


def unpacked(elements: Elements) -> list[list[list[float]]]:
    """Values by trajectory, run and step as the page packs them, NaN where absent."""
    data = json.loads(elements.json)
    raw = np.frombuffer(gzip.decompress(base64.b64decode(elements.packed)), dtype=np.uint8)
    upper = np.ascontiguousarray(raw.reshape(4, -1).T).view(">u4")[:, 0].astype(np.uint64)
    flat = iter((upper << np.uint64(32)).view(np.float64).tolist())
    rounded = (float(f"{value:.{data['digits']}g}") for value in flat)
    return [[[next(rounded) for _ in run["steps"]] for run in data["runs"]] for _ in data["trajectories"]]


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        sentence = "no Chromium found: install one, or name it in the environment variable CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    return found


def open_report(page: Any, path: Path) -> None:
    """Go to a report and wait until it has unpacked itself and drawn its plots."""
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=30_000, state="attached")


def download(page: Any, button: str) -> list[str]:
    with page.expect_download() as waiting:
        page.locator(button).click()
    return Path(waiting.value.path()).read_text(encoding="utf-8").splitlines()


def until(page: Any, condition: str) -> None:
    """Wait for a condition in the page; Playwright's own waiting is refused by the page's policy."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never came true: {condition}")
