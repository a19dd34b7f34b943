"""The summary at the top of the page: what a person in a hurry must know, in sentences."""

from collections import Counter
from dataclasses import dataclass

from analyzers.latent.training_map import Stay
from flows.report import phases, states
from flows.report.data import ReportData, Row, read_json
from flows.report.stages import stages
from flows.report.text import join, number, plural, sentence, tokens
from flows.report.words import in_words

# Notes on the fit that the summary repeats; the section shows them all.
_NOTES = 4
# More runs than this are counted, not named.
_NAMES = 4
# Characters of a reason that the summary shows.
_REASON = 160


@dataclass(frozen=True)
class Point:
    """One question of the reader, its answer in a few words, the sentences behind it and where to read on.

    ``short`` is its part of the paragraph above all points; ``more`` is for the careful and stands folded.
    """

    title: str
    headline: str
    sentences: list[str]
    section: str
    alarming: bool = False
    short: str = ""
    more: tuple[str, ...] = ()
    more_title: str = ""


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


def in_short(points: list[Point]) -> str:
    """The answers of all points in one paragraph."""
    return " ".join(point.short for point in points if point.short)


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
        f"{plural(len(metrics), 'metric')}, in all {plural(len(data.trajectories), 'trajectory')}"
        + (
            f" over {plural(len(layers), 'layer')} (one metric at one place of the network each)."
            if layers
            else "."
        )
    )
    headline = f"{plural(len(runs), 'run')}, {plural(len(done), 'checkpoint')}"
    return Point(title, headline, [*_subject(data), *sentences], section)


def _subject(data: ReportData) -> list[str]:
    """What was studied and on which text, of the newest configuration that says so."""
    configs = [read_json(row["config"]) for row in data.provenance]
    config = next((each for each in configs if isinstance(each.get("probe"), dict)), {})
    said = [sentence(str(config["title"]))] if config.get("title") else []
    # Imported metrics have no probe, whatever the configuration of a later fit says of one.
    if config and any(protocol.fields.get("probe") for protocol in data.protocols):
        probe = config["probe"]
        text = probe.get("text")
        source = (
            f"the text {str(text).removeprefix('{root}/')}" if text else "the text that comes with ontogeny"
        )
        size = f"{number(probe.get('sequences'))} sequences of {number(probe.get('length'))} tokens"
        said.append(f"All read the same tokens: up to {size} of {source}.")
    return said


def _states(data: ReportData, walks: dict[str, list[Stay]]) -> Point:
    title, section = "How many phases, and when?", "map"
    chosen = data.chosen
    if chosen is None or not walks:
        text = "No phases have been looked for yet (they are the states of a model that is fitted)."
        return Point(title, "None fitted yet", [text], section, short="No phases have been looked for yet.")
    found = stages(data, walks)
    count = plural(len(found), "phase")
    sentences = states.describe_changes(walks) or ["No run leaves its phase."]
    cautions, remarks = states.cautions(chosen), states.remarks(chosen)
    metrics = plural(len(chosen["metrics"] or []), "metric")
    more = [
        f"Phase k is state k of a hidden Markov model: checkpoints that look alike in {metrics}.",
        states.describe_choice(data.models, chosen),
        *(f"Caution: {note}" for note in cautions[:_NOTES]),
    ]
    if left := len(cautions[_NOTES:]) + len(remarks):
        more.append(f"{plural(left, 'more note')} on the fit below.")
    begin = [number(stage.step) for stage in found]
    short = f"Training falls into {count}, which begin at steps {join(begin)}."
    if len(found) == 1:
        short = "Training is one phase."
    doubt = f" {plural(len(cautions), 'caution').capitalize()}." if cautions else ""
    return Point(
        title,
        count,
        sentences,
        section,
        short=short,
        more=tuple(more),
        more_title=f"How was this number chosen?{doubt}",
    )


def _phases(data: ReportData) -> Point:
    title, section = "Does the representation collapse and expand?", "phases"
    found = phases.places(data)
    if not found:
        return Point(title, "Not looked for yet", ["This has not been looked for yet."], section)
    plain = in_words(found[0].name)
    named = f"{plain} ({found[0].name})" if plain else found[0].name
    sentences = [f"In the trajectory of {named}:", *phases.describe(found[0])]
    if len(found) > 1:
        sentences.append(f"{plural(len(found) - 1, 'more trajectory')} below.")
    return Point(title, phases.headline(found[0]), sentences, section)


def _null(data: ReportData, walks: dict[str, list[Stay]]) -> Point:
    """Whether curves without phases would have been cut into states as well."""
    title, section = "Are the phases more than smooth drift?", "map"
    if not walks:
        return Point(title, "Not known", ["There are no phases to compare with smooth curves."], section)
    if not data.nulls:
        text = (
            "The model cuts any drift into phases. Whether smooth curves without phases would be cut just so "
            "was not tested (states.fit.surrogates is 0): do not quote these phases without that test."
        )
        short = "Whether they are more than smooth drift was not tested."
        return Point(title, "Not tested", [text], section, alarming=True, short=short)
    explained = data.nulls[0]["explained"]
    headline = {True: "No: smooth curves do as well", False: "Yes, by the fit", None: "Open"}[explained]
    short = {
        True: "Smooth curves without phases fit as well, so they are no evidence of phases.",
        False: "They fit the runs better than smooth drift would.",
        None: "Whether they are more than smooth drift is open.",
    }[explained]
    plain = {
        True: "Made-up runs that follow smooth curves, without phases, suit the same model as well.",
        False: "Made-up runs that follow smooth curves, without phases, suit the same model clearly worse.",
        None: "The test against made-up runs that follow smooth curves, without phases, does not decide.",
    }[explained]
    lines = [plain, *(row["sentence"] for row in data.nulls)]
    lines += [said for row in data.nulls for said in _cut_alike(row)]
    return Point(title, headline, lines, section, alarming=explained is not False, short=short)


def _cut_alike(row: Row) -> list[str]:
    """What smooth runs look like after the same cutting: neither number nor order of phases is evidence."""
    cut, alike = [k for k in row["surrogate_rule_ks"] or [] if k], row["same_map"]
    said = []
    if cut:
        span = number(min(cut)) if min(cut) == max(cut) else f"{number(min(cut))} to {number(max(cut))}"
        said.append(f"By the same rule the made-up runs are cut into {span} phases too.")
    if alike:
        said.append(
            f"{number(alike)} of {number(row['surrogates'])} of them show the same transitions: the order of "
            "the phases alone is no evidence."
        )
    return said


def _odd(walks: dict[str, list[Stay]]) -> Point:
    title, section = "Which run is odd?", "map"
    if not walks:
        return Point(title, "Not known", ["Odd runs are judged by their phases; none are fitted."], section)
    odd = states.oddities(walks)
    headline = join(list(odd)) if 0 < len(odd) <= 3 else (plural(len(odd), "run") if odd else "None")
    verb = "is" if len(odd) == 1 else "are"
    short = f"{headline} {verb} odd." if odd else "No run is odd."
    if len(walks) < 3:
        headline, short = "Too few runs to say", "Fewer than three runs cannot tell which is odd."
    sentences = states.describe_oddities(walks)
    return Point(title, headline, sentences, section, alarming=bool(odd), short=short)


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
        verb = "is" if absent == 1 else "are"
        sentences.append(
            f"{number(absent)} of {plural(data.rows, 'value')} could not be computed and {verb} left blank. "
            f"Most often {often['metric']}: {_short(str(often['note']))}."
        )
    mixed = [name for name, n in Counter(p.analyzer for p in data.protocols).items() if n > 1]
    if mixed:
        sentences.append(f"Runs were measured under different protocols by {join(mixed)}.")
    problems = join([*parts[:2], *([plural(len(places), "failure")] if failed else [])])
    alarming = bool(counts["error"] or failed)
    if alarming:
        headline, short = f"With care: {problems}", f"Take the data with care: {problems}."
    elif not data.audited:
        headline, short = "Not audited", "The data were not audited."
    elif problems:
        headline, short = f"Yes, with {problems}", f"The data have no error; the audit found {problems}."
    else:
        headline, short = "No known problem", "The data have no known problem."
    return Point("Can I trust the data?", headline, sentences, "audit", alarming=alarming, short=short)
