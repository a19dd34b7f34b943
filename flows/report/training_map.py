"""Geometry of the training map: states as cards from left to right, changes between them as arrows."""

from dataclasses import dataclass
from textwrap import wrap

from plotly.colors import sample_colorscale, unlabel_rgb

from flows.report.data import ReportData
from flows.report.states import StateRow
from flows.report.text import number, plural
from flows.report.words import in_words

# Up to this many states the cards have room for means; more states show them in the table only.
_WIDE_STATES = 5
_METRICS = 4
_HEAD, _NAME, _VALUE, _GAP, _FOOT = 60, 13, 16, 6, 4
# Characters of a name in one line of a card, and lines of a name.
_CHARACTERS, _LINES = 25, 3
_LABEL = 34


@dataclass(frozen=True)
class Text:
    """One line of a card: the name of a metric or a part of it (``small``), or its mean (``value``)."""

    y: int
    kind: str
    text: str


@dataclass(frozen=True)
class Card:
    """One state as a box with its lines."""

    state: int
    x: float
    y: float
    width: float
    height: float
    color: str
    ink: str
    seen: str
    lines: list[Text]


@dataclass(frozen=True)
class Arrow:
    """One edge: the path of its line, and two lines of label at (x, y)."""

    line: str
    width: float
    label: str
    who: str
    title: str
    x: float
    y: float
    lone: bool


@dataclass(frozen=True)
class TrainingMap:
    """The drawing and its size; ``shown`` of the ``metrics`` fitted are on the cards."""

    width: float
    height: float
    cards: list[Card]
    arrows: list[Arrow]
    shown: int
    metrics: int


def state_colors(count: int) -> list[str]:
    """One colour per state as ``#rrggbb``.

    States are numbered by time, so their colours are a sequential scale (viridis), whose order and
    distances survive colour blindness and grey printing.
    """
    places = [0.12 + 0.83 * i / max(count - 1, 1) for i in range(count)]
    sampled = sample_colorscale("Viridis", places)
    return ["#" + "".join(f"{round(part):02x}" for part in unlabel_rgb(color)) for color in sampled]


def ink_on(color: str) -> str:
    """Black or white, whichever reads better on ``#rrggbb`` (WCAG relative luminance)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#111111" if luminance > 0.18 else "#ffffff"


def draw(data: ReportData, rows: list[StateRow], colors: list[str]) -> TrainingMap:
    """Lay out the states in ``rows`` and the edges of the table of transitions."""
    wide = len(rows) <= _WIDE_STATES
    names = list(rows[0].means)[:_METRICS] if wide and rows else []
    width, gap = (166, 60) if wide else (110, 60)
    titles = [_wrapped(in_words(name) or name.replace("[", " [")) for name in names]
    height = _HEAD + sum(_NAME * len(title) + _VALUE + _GAP for title in titles) + _FOOT if titles else 56
    place = {row.state: i for i, row in enumerate(rows)}
    edges = [e for e in data.transitions if e["from"] in place and e["to"] in place]
    spans = [place[edge["to"]] - place[edge["from"]] for edge in edges]
    above = max((span for span in spans if span > 1), default=0)
    below = max((-span for span in spans if span < 0), default=0)
    top = 0.75 * _reach(above) + _LABEL if above else 8
    bottom = 0.75 * _reach(below) + _LABEL if below else 8
    cards = [
        Card(
            row.state,
            1 + place[row.state] * (width + gap),
            top,
            width,
            height,
            colors[row.state],
            ink_on(colors[row.state]),
            f"steps {number(row.first)} to {number(row.last)}" if wide else "",
            _lines(titles, [_mean(row, name) for name in names]),
        )
        for row in rows
    ]
    most = max((edge["count"] for edge in edges), default=1)
    several = sum(any(state is not None for state in run.states) for run in data.runs) > 2
    arrows = []
    for edge, span in zip(edges, spans, strict=True):
        source, target = cards[place[edge["from"]]], cards[place[edge["to"]]]
        runs = list(edge["runs"] or [])
        line, x, y = _route(source, target, span)
        label = plural(len(runs), "run") if edge["count"] == len(runs) else f"{number(edge['count'])} times"
        arrows.append(
            Arrow(
                line=line,
                width=1.5 + 3 * edge["count"] / most,
                label=label,
                who=_tail(runs[0], 8) if len(runs) == 1 else "",
                title=f"State {edge['from']} to {edge['to']}, {edge['count']} times: {', '.join(runs)}",
                x=x,
                y=y,
                lone=several and len(runs) == 1,
            )
        )
    total = len(rows) * width + max(len(rows) - 1, 0) * gap + 2
    fitted = len(rows[0].means) if rows else 0
    return TrainingMap(total, top + height + bottom, cards, arrows, len(names), fitted)


def _wrapped(name: str) -> list[str]:
    """A name in the lines of a card."""
    return wrap(name, _CHARACTERS, max_lines=_LINES, placeholder=" …")


def _lines(titles: list[list[str]], values: list[str]) -> list[Text]:
    """Names and means one below the other."""
    found, y = list[Text](), _HEAD
    for title, value in zip(titles, values, strict=True):
        for part in title:
            found.append(Text(y, "small", part))
            y += _NAME
        found.append(Text(y + 2, "value", value))
        y += _VALUE + _GAP
    return found


def _mean(row: StateRow, name: str) -> str:
    """The mean over checkpoints, or the model's where the page does not hold the values."""
    return _brief(row.means[name] if row.frames[name] else row.model[name])


def _brief(value: float | None) -> str:
    """A number short enough for a card."""
    return number(value if value is None else float(f"{value:.3g}"))


def _reach(span: int) -> int:
    """Height of the handles of an arc over ``span`` states; a Bezier arc rises to 3/4 of it."""
    return 36 + 24 * span


def _route(source: Card, target: Card, span: int) -> tuple[str, float, float]:
    """Path of an edge and where its label stands."""
    if span == 1:
        y = source.y + source.height / 2
        start, end = source.x + source.width + 3, target.x - 12
        return f"M{start:.0f},{y:.0f} L{end:.0f},{y:.0f}", (start + end + 9) / 2, y
    forward = span > 0
    start = source.x + source.width * (0.68 if forward else 0.32)
    end = target.x + target.width * (0.32 if forward else 0.68)
    reach = _reach(abs(span))
    edge = source.y if forward else source.y + source.height
    away = -1 if forward else 1
    crest, tip, foot = edge + away * reach, edge + away * 12, edge + away * 3
    line = f"M{start:.0f},{foot:.0f} C{start:.0f},{crest:.0f} {end:.0f},{crest:.0f} {end:.0f},{tip:.0f}"
    return line, (start + end) / 2, edge + away * 0.75 * reach


def _tail(name: str, length: int) -> str:
    """The end of a run's name, where its seed or variant stands."""
    return name if len(name) <= length else "…" + name[1 - length :]
