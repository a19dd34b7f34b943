"""The summary at the top of the page: what a person in a hurry must know, in sentences."""

from collections import Counter
from dataclasses import dataclass

from analyzers.latent.training_map import Stay
from flows.report import phases, states
from flows.report.data import ReportData, Row
from flows.report.text import join, number, plural, sentence, tokens

# Notes on the fit that the summary repeats; the section shows them all.
_NOTES = 4
# More runs than this are counted, not named.
_NAMES = 4
# Characters of a reason that the summary shows.
_REASON = 160


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
    return [
        _states(data, walks),
        _null(data, walks),
        _odd(walks),
        _quality(data),
        _phases(data),
        _measured(data),
    ]


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
    title, section = "Phases of training, as states", "map"
    chosen = data.chosen
    if chosen is None or not walks:
        return Point(title, "None fitted yet", ["No states have been fitted yet."], section)
    seen = {segment.state for walk in walks.values() for segment in walk}
    sentences = [
        f"{plural(len(seen), 'state')} found in {plural(len(chosen['metrics'] or []), 'trajectory')}."
    ]
    sentences += states.describe_changes(walks) or ["No run changes its state."]
    sentences.append(states.describe_choice(data.models, chosen))
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


def _null(data: ReportData, walks: dict[str, list[Stay]]) -> Point:
    """Whether curves without phases would have been cut into states as well."""
    title, section = "Are the phases more than smooth drift?", "map"
    if not walks:
        return Point(title, "Not known", ["There are no states to compare with smooth curves."], section)
    if not data.nulls:
        text = (
            "No smooth surrogates were fitted (states.fit.surrogates is 0), and a hidden Markov model cuts "
            "any drift into states. Do not quote these states as phases without that comparison."
        )
        return Point(title, "Not tested", [text], section, alarming=True)
    explained = data.nulls[0]["explained"]
    headline = {True: "No: smooth curves do as well", False: "Yes", None: "Open"}[explained]
    lines = [row["sentence"] for row in data.nulls]
    return Point(title, headline, lines, section, alarming=explained is not False)


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


def _failed(rows: list[Row]) -> str:
    """Which checkpoints failed, and the last reason."""
    places = sorted({(row["run"] or "", -1 if row["step"] is None else row["step"]) for row in rows})
    named = [f"{run} step {number(step)}" if step >= 0 else run for run, step in places[:_NAMES]]
    more = f" and {number(len(places) - _NAMES)} more" if len(places) > _NAMES else ""
    return sentence(f"Failed: {join(named)}{more}; last reason: {_short(str(rows[-1]['error']))}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _REASON else line[: _REASON - 1] + "\u2026"


def _quality(data: ReportData) -> Point:
    counts = Counter(row["severity"] for row in data.findings)
    parts = [plural(counts[kind], kind) for kind in ("error", "warning", "note") if counts[kind]]
    sentences = [f"The audit found {join(parts)}." if parts else "The audit found nothing to report."]
    worst = [row for row in data.findings if row["severity"] == "error"]
    for row in worst[:_NAMES]:
        where = " ".join(
            part
            for part in (row["run"], None if row["step"] is None else f"step {number(row['step'])}")
            if part
        )
        sentences.append(f"Error{f' in {where}' if where else ''}: {_short(sentence(str(row['detail'])))}")
    if not data.audited:
        sentences = ["The series has not been audited."]
    failed = lasting(data)
    places = {(row["run"], row["step"]) for row in failed}
    if failed:
        verb = "remains" if len(places) == 1 else "remain"
        sentences.append(
            f"{plural(len(places), 'checkpoint')} failed and {verb} unmeasured, in part or whole."
        )
        sentences.append(_failed(failed))
    if len(data.failures) > len(failed):
        made_good = plural(len(data.failures) - len(failed), "failed attempt")
        sentences.append(f"{made_good} succeeded on another try.")
    if not data.failures:
        sentences.append("No checkpoint failed.")
    absent = sum(row["absent"] for row in data.noted)
    if absent:
        often = max(data.noted, key=lambda row: row["absent"])
        sentences.append(
            f"{plural(absent, 'value')} could not be computed; lines have gaps there. Most often: "
            f"{_short(str(often['note']))} ({often['metric']})."
        )
    mixed = [name for name, n in Counter(p.analyzer for p in data.protocols).items() if n > 1]
    if mixed:
        sentences.append(f"Runs were measured under different protocols by {join(mixed)}.")
    clean = "No known problem" if data.audited else "Not audited"
    headline = join([*parts[:2], *([plural(len(places), "failure")] if failed else [])]) or clean
    return Point("Data quality", headline, sentences, "audit", alarming=bool(counts["error"] or failed))
