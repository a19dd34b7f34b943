"""Growth curves: their class and peak run by run, and what the script draws beside the data."""

from dataclasses import dataclass

from analyzers.growth import FITTED, GROWTH_FORM
from analyzers.growth_forms import FORMS
from flows.report.data import ReportData, Row, read_json
from flows.report.phases import ALL_RUNS
from flows.report.text import ABSENT, number
from storage.store import column_name

# Why a trajectory has neither an early peak nor a rise to the end, by the form that AICc prefers.
_WHY_NONE = {
    "constant": "no curve beats a constant",
    "step": "a step fits better",
    "logistic": "a logistic curve fits better",
    "logarithm": "a logarithm fits best, and it does not rise",
    GROWTH_FORM: "the curve fits best, but neither peaks within the steps measured nor rises to their end",
}
Place = tuple[str, str | None, int | None, int | None]


@dataclass(frozen=True)
class GrowthRow:
    """One run, or all runs, at one place. ``fitted`` are the parameters that the script draws from."""

    name: str
    run: str
    pooled: bool
    shape: str
    preferred: str
    peak: str
    r2: float | None
    lead: float | None
    drawn: str
    fitted: list[float] | None
    note: str | None

    @property
    def verdict(self) -> str:
        """The class and, where it is none or mixed, why."""
        if self.shape == "none":
            return f"none: {_WHY_NONE.get(self.preferred, 'most runs have neither an early peak nor a rise')}"
        return "mixed: no class in most runs" if self.shape == "mixed" else self.shape


@dataclass(frozen=True)
class GrowthPlace:
    """One trajectory that growth curves were fitted to; ``rows`` are its runs, and all runs last."""

    name: str
    place: Place
    rows: list[GrowthRow]


def places(data: ReportData) -> list[GrowthPlace]:
    """The places in order of metric, site, layer and head."""
    found: dict[Place, list[Row]] = {}
    for row in data.curves:
        if row["form"] in FORMS:
            place = (row["metric"], row["site"], row["layer"], row["head"])
            found.setdefault(place, []).append(row)
    order = sorted(found, key=lambda p: (p[0], p[1] or "", -1 if p[2] is None else p[2], p[3] or 0))
    return [
        GrowthPlace(column_name(*place), place, _rows(column_name(*place), found[place])) for place in order
    ]


def _rows(name: str, rows: list[Row]) -> list[GrowthRow]:
    runs = sorted({row["run"] for row in rows}, key=lambda run: (run is None, run or ""))
    forms = {(row["run"], row["form"]): row for row in rows}
    return [
        _row(name, forms[run, GROWTH_FORM], [forms[run, form] for form in FORMS if (run, form) in forms])
        for run in runs
        if (run, GROWTH_FORM) in forms
    ]


def _row(name: str, row: Row, forms: list[Row]) -> GrowthRow:
    numbers = row["parameters"]
    criteria = {form["form"]: form["parameters"]["aicc"] for form in forms if "aicc" in form["parameters"]}
    others = [value for form, value in criteria.items() if form != GROWTH_FORM]
    lead = min(others) - criteria[GROWTH_FORM] if others and GROWTH_FORM in criteria else None
    return GrowthRow(
        name=name,
        run=ALL_RUNS if row["run"] is None else row["run"],
        pooled=row["run"] is None,
        shape=row["class"] or "not judged",
        preferred=next((f["form"] for f in forms if f["parameters"].get("preferred")), ABSENT),
        peak=_peak(row),
        r2=row["r2"] if row["run"] is not None else numbers.get("r2_median"),
        lead=lead,
        drawn=read_json(row["settings"]).get("drawn") or ABSENT,
        fitted=[numbers[key] for key in FITTED] if all(key in numbers for key in FITTED) else None,
        note=row["note"],
    )


def _peak(row: Row) -> str:
    """Step of the peak and its interval; nothing where the class has no peak."""
    if row["peak_step"] is None:
        return ABSENT
    span = row["intervals"].get("peak_step") or {}
    low, high = ("no end" if span.get(end) is None else number(round(span[end])) for end in ("low", "high"))
    return f"{number(row['peak_step'])} ({low} to {high})"


def payload(data: ReportData, found: list[GrowthPlace]) -> list[dict[str, object]]:
    """Per place its curves by run, and the index of its trajectory: None where the store shows it no more."""
    index = {(t.metric, t.site, t.layer, t.head): i for i, t in enumerate(data.trajectories)}
    return [
        {
            "trajectory": index.get(place.place),
            "rows": [
                {"run": row.run, "shape": row.shape, "fitted": [float(f"{x:.9g}") for x in row.fitted]}
                for row in place.rows
                if row.fitted is not None
            ],
        }
        for place in found
    ]
