"""The summary at the top of the page: what a person in a hurry must know, in sentences."""

from collections import Counter
from dataclasses import dataclass

from analyzers.latent.training_map import Stay
from flows.report import phases, states
from flows.report.data import ReportData, Row
from flows.report.text import join, number, plural, tokens

# Notes on the fit that the summary repeats; the section shows them all.
_NOTES = 4
# More runs than this are counted, not named.
_NAMES = 4


@dataclass(frozen=True)
class Point:
    """One question of the reader, its answer in a few words, the sentences behind it and where to read on."""

    title: str
    headline: str
    sentences: list[str]
    section: str
    alarming: bool = False


def summarize(data: ReportData) -> list[Point]:
    """The points of the summary, in the order of the page."""
    walks = states.paths(data)
    return [_measured(data), _states(data, walks), _phases(data), _odd(walks), _quality(data)]


def _measured(data: ReportData) -> Point:
    done = data.measured_checkpoints
    title, section = "What was measured", "trajectories"
    if not done:
        listed = f" The catalogue lists {plural(len(data.checkpoints), 'checkpoint')}."
        text = "No checkpoint has been measured yet." + (listed if data.checkpoints else "")
        return Point(title, "Nothing yet", [text], section)
    runs = sorted({run for run, _ in done})
    steps = sorted({step for _, step in done})
    seen = [count for run in data.runs for count in run.tokens if count is not None]
    last = f" ({tokens(max(seen))} tokens)" if seen else ""
    names = f" ({join(runs)})" if len(runs) <= _NAMES else ""
    span = f"from step {number(steps[0])} to {number(steps[-1])}"
    if steps[0] == steps[-1]:
        span = f"at step {number(steps[0])}"
    sentences = [
        f"{plural(len(done), 'checkpoint')} of {plural(len(runs), 'run')}{names} measured, {span}{last}."
    ]
    left = {(row["run"], row["step"]) for row in data.checkpoints} - done
    if left:
        sentences.append(f"{plural(len(left), 'checkpoint')} of the catalogue not measured.")
    metrics = {t.metric for t in data.trajectories}
    layers = {t.layer for t in data.trajectories if t.layer is not None}
    sentences.append(
        f"{plural(len(metrics), 'metric')}, {plural(len(data.trajectories), 'trajectory')}"
        + (f" over {plural(len(layers), 'layer')}." if layers else ".")
    )
    headline = f"{plural(len(runs), 'run')}, {plural(len(done), 'checkpoint')}"
    return Point(title, headline, sentences, section)


def _states(data: ReportData, walks: dict[str, list[Stay]]) -> Point:
    title, section = "States of training", "map"
    chosen = data.chosen
    if chosen is None or not walks:
        return Point(title, "None fitted yet", ["No states have been fitted yet."], section)
    seen = {segment.state for walk in walks.values() for segment in walk}
    sentences = [
        f"{plural(len(seen), 'state')} found in {plural(len(chosen['metrics'] or []), 'trajectory')}."
    ]
    sentences += states.describe_changes(walks) or ["No run changes its state."]
    sentences.append(states.describe_choice(data.models, chosen))
    sentences += [row["sentence"] for row in data.nulls]
    notes = states.caveats(chosen)
    sentences += notes[:_NOTES]
    if len(notes) > _NOTES:
        sentences.append(f"{plural(len(notes) - _NOTES, 'more note')} on the fit below.")
    return Point(title, plural(len(seen), "state"), sentences, section)


def _phases(data: ReportData) -> Point:
    title, section = "Geometric phases", "phases"
    found = phases.places(data)
    if not found:
        return Point(title, "Not looked for yet", ["No phases have been looked for yet."], section)
    sentences = [f"In {found[0].name}:", *phases.describe(found[0])]
    if len(found) > 1:
        sentences.append(f"{plural(len(found) - 1, 'more trajectory')} below.")
    return Point(title, phases.headline(found[0]), sentences, section)


def _odd(walks: dict[str, list[Stay]]) -> Point:
    title, section = "Odd runs", "map"
    if not walks:
        return Point(title, "Not known", ["Odd runs are judged by their states; none are fitted."], section)
    odd = states.oddities(walks)
    headline = join(list(odd)) if 0 < len(odd) <= 3 else (plural(len(odd), "run") if odd else "None")
    if len(walks) < 3:
        headline = "Too few runs to say"
    return Point(title, headline, states.describe_oddities(walks), section, alarming=bool(odd))


def lasting(data: ReportData) -> list[Row]:
    """Failed attempts that no later attempt made good."""
    whole = data.measured_checkpoints
    return [
        row
        for row in data.failures
        if ((row["run"], row["step"]) not in whole)
        or (row["analyzer"] is not None and (row["run"], row["step"], row["analyzer"]) not in data.measured)
    ]


def _quality(data: ReportData) -> Point:
    counts = Counter(row["severity"] for row in data.findings)
    parts = [plural(counts[kind], kind) for kind in ("error", "warning", "note") if counts[kind]]
    sentences = [f"The audit found {join(parts)}." if parts else "The audit found nothing to report."]
    if not data.audited:
        sentences = ["The series has not been audited."]
    failed = lasting(data)
    places = {(row["run"], row["step"]) for row in failed}
    if failed:
        verb = "remains" if len(places) == 1 else "remain"
        sentences.append(
            f"{plural(len(places), 'checkpoint')} failed and {verb} unmeasured, in part or whole."
        )
    if len(data.failures) > len(failed):
        made_good = plural(len(data.failures) - len(failed), "failed attempt")
        sentences.append(f"{made_good} succeeded on another try.")
    if not data.failures:
        sentences.append("No checkpoint failed.")
    absent = sum(row["absent"] for row in data.noted)
    if absent:
        sentences.append(f"{plural(absent, 'value')} could not be computed; lines have gaps there.")
    mixed = [name for name, n in Counter(p.analyzer for p in data.protocols).items() if n > 1]
    if mixed:
        sentences.append(f"Runs were measured under different protocols by {join(mixed)}.")
    clean = "Clean" if data.audited else "Not audited"
    headline = join([*parts[:2], *([plural(len(places), "failure")] if failed else [])]) or clean
    return Point("Data quality", headline, sentences, "audit", alarming=bool(counts["error"] or failed))
