"""What the decoded states say: where they change, which run is odd, how their number was chosen."""

from dataclasses import dataclass
from statistics import median

from analyzers.latent import training_map
from analyzers.latent.selection import AGREEMENT
from analyzers.latent.training_map import Oddity, Stay, changes, forks, reentries, stays, visitors
from flows.report.data import ReportData, Row, read_json
from flows.report.text import few, join, number, sentence

# Notes on a single metric (one that is constant, repeats another or has gaps) begin so; see analyzers.latent.
_REMARK = "Metric "


def paths(data: ReportData) -> dict[str, list[Stay]]:
    """The stays of every run that has states."""
    return {run.name: found for run in data.runs if (found := stays(run.steps, run.states))}


def describe_changes(walks: dict[str, list[Stay]]) -> list[str]:
    """One sentence per edge: at which steps it is taken and by which runs."""
    sentences = []
    for (source, target), found in changes(walks).items():
        runs = sorted({change.run for change in found})
        who = f"all {len(runs)} runs" if len(runs) == len(walks) > 1 else join(runs)
        steps = sorted(change.step for change in found)
        if steps[0] == steps[-1]:
            when = f"at step {number(steps[0])}"
        elif len(steps) == 2:
            when = f"at steps {number(steps[0])} and {number(steps[1])}"
        else:
            middle = number(median(steps))
            when = f"at steps {number(steps[0])} to {number(steps[-1])} (median {middle})"
        sentences.append(f"Phase {source} gives way to {target} {when} in {who}.")
    return sentences


def oddities(walks: dict[str, list[Stay]]) -> dict[str, list[str]]:
    """What sets single runs apart, in words, by run."""
    found: dict[str, list[str]] = {}
    for oddity in training_map.oddities(walks):
        found.setdefault(oddity.run, []).append(_reason(oddity))
    return found


def _reason(oddity: Oddity) -> str:
    match oddity.kind:
        case "alone":
            return f"visits phase {oddity.state}, which no other run visits"
        case "missing":
            return f"never visits phase {oddity.state}, which all others visit"
        case "order":
            return f"meets the phases in another order ({' → '.join(map(str, oddity.order))})"
        case "return":
            return f"re-enters phase {oddity.state} at step {number(oddity.step)}"


def describe_forks(walks: dict[str, list[Stay]]) -> list[str]:
    """One sentence per state that runs leave for different states."""
    sentences = []
    for fork in forks(walks):
        ways = []
        for target, runs in fork.ways.items():
            ways.append(f"{few(list(runs))} to phase {target}")
        sentences.append(f"Runs part after phase {fork.state}: {join(ways)}.")
    return sentences


def describe_oddities(walks: dict[str, list[Stay]]) -> list[str]:
    """Sentences on the runs that stand out and on what divides the runs."""
    if not walks:
        return []
    sentences = [f"{run} is odd: it {'; it '.join(reasons)}." for run, reasons in oddities(walks).items()]
    unsure = len(walks) < 3
    divided = []
    for state, there in visitors(walks).items():
        missing = len(walks) - len(there)
        if missing and (unsure or (len(there) > 1 and missing > 1)):
            verb = "visits" if len(there) == 1 else "visit"
            divided.append(f"Only {join(sorted(there))} {verb} phase {state}.")
    for state, back in reentries(walks).items():
        returning = sorted(back)
        if unsure or 2 * len(returning) >= len(walks):
            verb = "re-enters" if len(returning) == 1 else "re-enter"
            divided.append(f"{join(returning)} {verb} phase {state}.")
    divided += describe_forks(walks)
    if unsure:
        count = "one run has" if len(walks) == 1 else "two runs have"
        sentences.append(f"Only {count} phases, so no run can be called odd.")
    elif not sentences:
        same = "" if divided else ": all visit the same phases, and none returns to a phase it left"
        sentences.append(f"No run stands out{same}.")
    return sentences + divided


def describe_choice(models: list[Row], chosen: Row) -> str:
    """How the number of states was chosen."""
    k, tried = chosen["k"], [row["k"] for row in models]
    if len(tried) == 1:
        return f"The number of phases was {k}; no other number was tried."
    among = f"{k} phases were chosen among {tried[0]} to {tried[-1]}"
    if chosen.get("rule") == "agreement" and chosen["ari"] is not None:
        return (
            f"{among}: the largest number on which fits from other random starts agree (adjusted Rand index "
            f"{chosen['ari']:.2f} of 1, {AGREEMENT} is the least) and that still improves the fit (BIC)."
            + _otherwise(models, chosen)
        )
    score, what = _scored_by(models, chosen)
    scored = [row for row in models if row[score] is not None]
    if not scored:
        return f"{among}."
    low = score != "heldout_loglik"
    best = (min if low else max)(scored, key=lambda row: row[score])["k"]
    superlative = "lowest" if low else "highest"
    if best == k:
        return f"{among}: they give the {superlative} {what}."
    return f"{among}, though {best} give the {superlative} {what}."


def _otherwise(models: list[Row], chosen: Row) -> str:
    """What held-out runs alone would have chosen, where that is another number."""
    scored = [row for row in models if row["heldout"] is not None]
    best = min(scored, key=lambda row: row["heldout"])["k"] if scored else chosen["k"]
    return "" if best == chosen["k"] else f" BIC on {_held_out(chosen)} alone would choose {best}."


def _scored_by(models: list[Row], chosen: Row) -> tuple[str, str]:
    """Column and words of the number that K was chosen by; rows without a rule are of the first version."""
    rule = chosen.get("rule") or "paper"
    fitted = " on the runs they were fitted on"
    if rule == "paper" and chosen["heldout"] is not None:
        return "heldout", f"BIC on {_held_out(chosen)}"
    if rule == "heldout" and chosen.get("heldout_loglik") is not None:
        return "heldout_loglik", "log-likelihood of runs left out in turn"
    if rule in ("aic", "icl") and chosen.get(rule) is not None:
        return rule, rule.upper() + fitted
    held = "" if chosen["heldout"] is not None else " (no run was held out)"
    return "bic", f"BIC{fitted}{held}"


def _held_out(chosen: Row) -> str:
    runs = chosen["heldout_runs"] or []
    return f"held-out {join(runs)}" if runs else "held-out runs"


def cautions(chosen: Row) -> list[str]:
    """What may make a reader doubt the states, as sentences."""
    return [note for note in _notes(chosen) if not note.startswith(_REMARK)]


def remarks(chosen: Row) -> list[str]:
    """What was done to the data before the fit and changes no reading of the map, as sentences."""
    return [note for note in _notes(chosen) if note.startswith(_REMARK)]


def _notes(chosen: Row) -> list[str]:
    notes = read_json(chosen["parameters"]).get("notes") or []
    if isinstance(notes, dict):
        notes = [f"{name}: {text}" for name, text in notes.items()]
    return [sentence(str(note)) for note in (notes if isinstance(notes, list) else [notes])]


@dataclass(frozen=True)
class StateRow:
    """One state over all runs: where it is seen and the mean of each trajectory that entered the fit.

    ``means`` are over its checkpoints, ``frames`` says over how many of them; ``model`` holds the means of
    the fitted Gaussian in the same unit, None where the model has none (runs scaled by themselves).
    """

    state: int
    checkpoints: int
    first: int
    last: int
    runs: list[str]
    means: dict[str, float | None]
    model: dict[str, float | None]
    frames: dict[str, int]


def state_rows(data: ReportData) -> list[StateRow]:
    """All states seen, with means in the metrics' own units."""
    chosen = data.chosen
    if chosen is None:
        return []
    wanted = list(chosen["metrics"] or [])
    trajectories = {t.name: t for t in data.shown if t.name in set(wanted)}
    for t in data.trajectories:  # in order of layer: the last one stays
        name = f"{t.metric}[{t.site}.last]"
        if name in wanted and t.layer is not None and t.head is None:
            trajectories[name] = t
    at: dict[int, list[tuple[int, int]]] = {}
    for r, run in enumerate(data.runs):
        for i, state in enumerate(run.states):
            if state is not None:
                at.setdefault(state, []).append((r, i))
    fitted = {(row["state"], row["metric"]): row["mean"] for row in data.state_means}
    rows = []
    for state, places in sorted(at.items()):
        means: dict[str, float | None] = {}
        frames: dict[str, int] = {}
        for name in wanted:
            per_run = trajectories[name].values if name in trajectories else []
            values = [
                value
                for r, i in places
                if r < len(per_run) and (line := per_run[r]) is not None and (value := line[i]) is not None
            ]
            means[name] = sum(values) / len(values) if values else None
            frames[name] = len(values)
        steps = [data.runs[r].steps[i] for r, i in places]
        runs = sorted({data.runs[r].name for r, _ in places})
        model = {name: fitted.get((state, name)) for name in wanted}
        rows.append(StateRow(state, len(places), min(steps), max(steps), runs, means, model, frames))
    return rows
