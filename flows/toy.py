"""The picture of docs/toy.md: ``python -m flows.toy`` draws it and prints the numbers of its table.

The SVG is written by hand: matplotlib is there for development only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from jaxtyping import Float64, Int

from analyzers.toy import CONTROLS, MODEL, ToySetup, covariance_spectrum, rankme_curves, swing, train

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "toy.svg"
SEEDS = tuple(range(20))
SHOWN = 1
_EVERY = 2

_COLOURS = {
    "model": "#c0392b",
    "uniform counts": "#2471a3",
    "uniform counts and start": "#17a589",
    "three dimensions": "#7d3c98",
    "squared error": "#7f8c8d",
}


@dataclass
class Panel:
    """Axes of one plot: data ranges onto a rectangle of the picture; ``marks`` are SVG elements."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    marks: list[str] = field(default_factory=list)

    def points(self, x: Int[np.ndarray, "n"], y: Float64[np.ndarray, "n"]) -> str:
        """Points of a line as SVG wants them."""
        across = self.left + self.width * (x - self.x[0]) / (self.x[1] - self.x[0])
        down = self.top + self.height * (self.y[1] - y) / (self.y[1] - self.y[0])
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))

    def line(
        self,
        name: str,
        x: Int[np.ndarray, "n"],
        y: Float64[np.ndarray, "n"],
        colour: str,
        dash: str = "none",
    ) -> None:
        """A curve with a name to read out and to find it by."""
        self.marks.append(
            f'<polyline id="{escape(name)}" points="{self.points(x, y)}" fill="none" stroke="{colour}" '
            f'stroke-width="2" stroke-dasharray="{dash}"><title>{escape(name)}</title></polyline>'
        )

    def band(
        self,
        x: Int[np.ndarray, "n"],
        low: Float64[np.ndarray, "n"],
        high: Float64[np.ndarray, "n"],
        colour: str,
    ) -> None:
        """The area between two curves."""
        around = f"{self.points(x, low)} {self.points(x[::-1], high[::-1])}"
        self.marks.append(f'<polygon points="{around}" fill="{colour}" fill-opacity="0.2"/>')

    def text(self, x: float, y: float, words: str, colour: str = "#222", anchor: str = "start") -> None:
        """Words at a place of the plot, in data units."""
        ((a, b),) = [p.split(",") for p in self.points(np.array([x]), np.array([y])).split()]
        self.marks.append(
            f'<text x="{a}" y="{b}" fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(
        self, name: str, title: str, x_ticks: Sequence[float], y_ticks: Sequence[float] | np.ndarray
    ) -> str:
        """The plot with its frame, ticks and title; marks are cut at the frame."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = [
            f'<text x="{self.left}" y="{self.top - 10}" font-weight="bold">{escape(title)}</text>',
            f'<clipPath id="{name}"><rect x="{self.left}" y="{self.top}" width="{self.width}" '
            f'height="{self.height}"/></clipPath>',
        ]
        for tick in y_ticks:
            _, b = self.points(np.array([self.x[0]]), np.array([tick])).split(",")
            parts.append(f'<line x1="{self.left}" x2="{right}" y1="{b}" y2="{b}" stroke="#e5e5e5"/>')
            parts.append(
                f'<text x="{self.left - 6}" y="{float(b) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
            )
        for tick in x_ticks:
            a, _ = self.points(np.array([tick]), np.array([self.y[0]])).split(",")
            parts.append(f'<text x="{a}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
        parts.append(
            f'<rect x="{self.left}" y="{self.top}" width="{self.width}" height="{self.height}" '
            'fill="none" stroke="#888"/>'
        )
        parts.append(f'<text x="{right}" y="{bottom + 32}" text-anchor="end">step</text>')
        return "\n".join([*parts, f'<g clip-path="url(#{name})">', *self.marks, "</g>"])


@cache
def _curves(setup: ToySetup) -> Float64[np.ndarray, "times runs"]:
    return rankme_curves(train(setup, SEEDS), setup.counts)


def picture() -> str:
    """The SVG: RankMe of the model and of its controls, the same near 2, and the model's singular values."""
    span = (0, MODEL.steps)
    ranks = Panel(60, 40, 620, 280, span, (1.74, 2.06))
    near = Panel(60, 390, 620, 150, span, (1.974, 2.004))
    sigmas = Panel(60, 610, 620, 150, span, (0.3, 1.8))
    steps = np.arange(0, MODEL.steps + 1, _EVERY)
    for name, setup in {**CONTROLS, "model": MODEL}.items():
        curves = _curves(setup)[::_EVERY]
        colour, shown = _COLOURS[name], curves[:, SEEDS.index(SHOWN)]
        ranks.line(name, steps, shown, colour)
        near.line(f"{name}, near 2", steps, shown, colour)
        if setup == MODEL:
            near.band(steps, curves.min(axis=1), curves.max(axis=1), colour)
    for x, y, words, name in (
        (70, 1.9, "model: dip, rise, late fall", "model"),
        (105, 1.935, "uniform counts, same start", "uniform counts"),
        (20, 2.02, "uniform counts, uniform start", "uniform counts and start"),
        (185, 2.03, "three dimensions: goes on to 2.7", "three dimensions"),
        (120, 1.765, "squared error", "squared error"),
    ):
        ranks.text(x, y, words, _COLOURS[name])
    near.text(205, 1.984, "model: one run, and the range of 20", _COLOURS["model"])

    features = train(MODEL, (SHOWN,)).features
    first, second = np.sqrt(covariance_spectrum(features, MODEL.counts))[::_EVERY, 0].T
    sigmas.line("larger", steps, first, _COLOURS["model"])
    sigmas.line("smaller", steps, second, _COLOURS["model"], "5 4")
    sigmas.text(20, 1.45, "first: between the two frequent classes", _COLOURS["model"])
    sigmas.text(60, 0.8, "second: between the frequent and the rare classes", _COLOURS["model"])
    ticks = range(0, MODEL.steps + 1, 50)
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="810" viewBox="0 0 720 810" '
            'font-family="sans-serif" font-size="12" fill="#222">',
            "<!-- Written by `python -m flows.toy`; edit flows/toy.py instead. -->",
            '<rect width="720" height="810" fill="white"/>',
            ranks.svg("ranks", "RankMe of the features (rankme_cov)", ticks, np.arange(1.75, 2.06, 0.05)),
            near.svg("near", "The same, near 2", ticks, (1.98, 1.99, 2.0)),
            sigmas.svg(
                "sigmas", "Model: singular values of the centred features, over sqrt(N)", ticks, (0.5, 1, 1.5)
            ),
            "</svg>",
            "",
        ]
    )


def summary(setup: ToySetup) -> str:
    """Start, lowest, highest, end and swing of the curves over the seeds, as cells of the page's table."""
    curves = _curves(setup)
    cells = [
        _range(curves[0]),
        f"{_range(curves.min(axis=0))} at {_steps(curves.argmin(axis=0))}",
        f"{_range(curves.max(axis=0))} at {_steps(curves.argmax(axis=0))}",
        _range(curves[-1]),
        _range(swing(curves)),
    ]
    return " | ".join(cells)


def _range(values: Float64[np.ndarray, "n"]) -> str:
    low, high = f"{values.min():.3f}", f"{values.max():.3f}"
    return low if low == high else f"{low} to {high}"


def _steps(steps: Int[np.ndarray, "n"]) -> str:
    return f"{steps.min()}" if steps.min() == steps.max() else f"{steps.min()} to {steps.max()}"


def main() -> None:
    """Draw the picture, print the table."""
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"{PICTURE.name} drawn")
    for name, setup in {"model": MODEL, **CONTROLS}.items():
        print(f"| {name} | {summary(setup)} |")


if __name__ == "__main__":
    main()
