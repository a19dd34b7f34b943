"""Choice of the number of states: what is known about each K, and the named rules that decide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool
from sklearn.metrics import adjusted_rand_score

from analyzers.latent.bootstrap import Runs, agreement, prior_of, refit_resampled
from analyzers.latent.hmm import decode_runs, score
from analyzers.latent.parameters import Parameters
from analyzers.latent.restarts import Restart, fit_restarts
from analyzers.latent.settings import Rule, StateSettings

# Below this adjusted Rand index the best restarts tell different stories.
AGREEMENT = 0.9
# One of so many restarts is compared, the best first; three at least: two may be alike by luck.
COMPARED = 10


@dataclass(frozen=True)
class Candidate:
    """One number of states: its best restart, and how much it can be relied on.

    With L the log-likelihood, p the free parameters and n the frames with a value: AIC = -2 L + 2 p (Akaike
    1974), BIC = -2 L + p ln n (Schwarz 1978), ICL = -2 max_s ln p(x, s) + p ln n (Biernacki, Celeux and
    Govaert 2000, with the Viterbi path as the assignment); lower is better. Everything is None when all
    restarts failed.

    Attributes:
        k: number of states.
        loglik: log-likelihood of the training runs, in nats.
        bic: BIC on the training runs.
        aic: AIC on the training runs.
        icl: ICL on the training runs.
        heldout: BIC on the held-out runs, with the parameters of the training runs; None with a single run.
        heldout_loglik: log-likelihood of every run under a fit to the runs of the other folds, summed, in
            nats; None with a single run, without folds, or when all restarts of a fold failed.
        ari: mean adjusted Rand index of the Viterbi paths (training runs) over all pairs among the best
            tenth of the restarts (three at least), in [-0.5, 1]; None with fewer than two restarts.
        bootstrap_ari: mean adjusted Rand index between the paths of the best restart and of its refits to
            resampled training runs, on the training runs; None with a single training run or when all failed.
        bootstrap_refits: number of refits that did not fail; None where none was asked for or can be.
        refits: the refits that did not fail, their states in the order of the fit before it was relabelled.
        failures: one sentence per failed restart.
        converged: whether the best restart ended before the iterations ran out.
        parameters: the best restart, relabelled.
    """

    k: int
    loglik: float | None = None
    bic: float | None = None
    aic: float | None = None
    icl: float | None = None
    heldout: float | None = None
    heldout_loglik: float | None = None
    ari: float | None = None
    bootstrap_ari: float | None = None
    bootstrap_refits: int | None = None
    refits: tuple[Parameters, ...] = ()
    failures: tuple[str, ...] = ()
    converged: bool | None = None
    parameters: Parameters | None = None


@dataclass(frozen=True)
class Choice:
    """The chosen number of states, and sentences on what the choice rests on and what it cannot."""

    candidate: Candidate
    parameters: Parameters
    notes: tuple[str, ...]


def candidate(k: int, train: Runs, heldout: Runs, settings: StateSettings) -> Candidate:
    """Fit ``k`` states to the training runs and judge the fit; all values are scaled, NaN is missing.

    Nothing of the held-out runs enters the parameters. Folds are made of all runs.
    """
    done, failures = fit_k(train, k, settings.restarts, settings)
    if not done:
        return Candidate(k, failures=tuple(failures))
    best = done[0]
    decoded = decode_runs(best.parameters, train)
    path, seen = np.concatenate([each.path for each in decoded]), seen_frames(train)
    penalty = best.parameters.free * math.log(seen.sum())
    asked = settings.bootstraps > 0 and len(train) > 1
    refits = refit_resampled(best.parameters, train, settings)
    return Candidate(
        k=k,
        loglik=best.loglik,
        bic=-2 * best.loglik + penalty,
        aic=-2 * best.loglik + 2 * best.parameters.free,
        icl=-2 * sum(each.log_joint for each in decoded) + penalty,
        heldout=_heldout_bic(best.parameters, heldout),
        heldout_loglik=heldout_loglik(k, [*train, *heldout], settings),
        ari=_agreement(done, settings.restarts, train, seen),
        bootstrap_ari=agreement(refits, train, path, seen),
        bootstrap_refits=len(refits) if asked else None,
        refits=tuple(refits),
        failures=tuple(failures),
        converged=best.converged,
        parameters=best.parameters,
    )


def seen_frames(runs: Runs) -> Bool[np.ndarray, "frames"]:
    """True per frame, of all runs in turn, that has a value of any metric."""
    return np.asarray(~np.isnan(np.concatenate(runs)).all(axis=1))


def heldout_loglik(k: int, runs: Runs, settings: StateSettings) -> float | None:
    """Log-likelihood of every run under a fit to the runs of the other folds, summed, in nats.

    Folds are of whole runs, drawn by the seed, the same for every K. Every fold is fitted from starts of its
    own, so that no fit has seen the runs it is scored on. The scale of the values is that of the whole fit: a
    change of unit, which moves the sum by the same amount for every K.
    """
    count = min(settings.folds, len(runs))
    if count < 2:
        return None
    order = np.random.default_rng([settings.seed, len(runs)]).permutation(len(runs))
    total = 0.0
    for fold in np.array_split(order, count):
        others = [runs[i] for i in range(len(runs)) if i not in fold]
        if np.isnan(np.concatenate(others)).all(axis=0).any():
            # A metric that only this fold has leaves the others nothing to fit it by.
            return None
        done, _ = fit_k(others, k, settings.fold_restarts, settings)
        if not done:
            return None
        total += score(done[0].parameters, [runs[i] for i in fold])
    return total


def choose(candidates: Sequence[Candidate], settings: StateSettings, *, one_run: bool) -> Choice:
    """Choose K by the rule of the settings; of equal values the smaller K.

    ``candidates`` are sorted by K. ``agreement``: the largest K whose best restarts agree (ARI >= 0.9) and
    whose BIC is below that of every smaller K. ``paper``: lowest BIC on the held-out runs (arXiv 2308.09543).
    ``bic``, ``aic``, ``icl``: lowest on the training runs. ``heldout``: highest held-out log-likelihood.
    Where a rule cannot be applied, BIC on the training runs decides, and a note says so.

    Raises:
        RuntimeError: every restart of every K failed.
    """
    fitted = [each for each in candidates if each.parameters is not None and _number(each.bic) < math.inf]
    if not fitted:
        raise RuntimeError("no restart succeeded: " + "; ".join(candidates[0].failures))
    notes: list[str] = []
    by_bic = min(fitted, key=lambda each: _number(each.bic))
    chosen: Candidate | None = None
    if settings.rule == "agreement":
        chosen = _largest_agreeing(fitted)
        if chosen is None:
            notes.append(
                "the agreement of restarts is not known: K was chosen by BIC on the training runs alone"
            )
        elif chosen is not by_bic:
            notes.append(_passed_over(by_bic, chosen, settings.restarts))
    else:
        known = [each for each in fitted if _value(each, settings.rule) < math.inf]
        if known:
            chosen = min(known, key=lambda each: _value(each, settings.rule))
        elif not one_run:
            notes.append(
                f"the rule {settings.rule} has no value for any K: K was chosen by BIC on the training runs"
            )
    chosen = chosen or by_bic
    if chosen.parameters is None:
        raise RuntimeError(f"K = {chosen.k} was chosen without a model")
    return Choice(chosen, chosen.parameters, (*notes, *_cap(candidates, chosen, by_bic)))


def _largest_agreeing(fitted: Sequence[Candidate]) -> Candidate | None:
    if all(each.ari is None for each in fitted):
        return None
    found, lowest = None, math.inf
    for each in fitted:
        if _number(each.bic) < lowest:
            lowest = _number(each.bic)
            if each.ari is not None and each.ari >= AGREEMENT:
                found = each
    return found


def _passed_over(by_bic: Candidate, chosen: Candidate, restarts: int) -> str:
    agreement = "is not known" if by_bic.ari is None else f"is {by_bic.ari:.2f}"
    return (
        f"BIC is lowest at K = {by_bic.k}, but the adjusted Rand index of its best restarts (of {restarts}) "
        f"{agreement}, and {AGREEMENT} is the least: the data do not settle more than {chosen.k} states"
    )


def _cap(candidates: Sequence[Candidate], chosen: Candidate, by_bic: Candidate) -> list[str]:
    """Sentences on the largest K tried."""
    last = candidates[-1].k
    if chosen.k == last:
        return [f"cap reached: K = {last} is the cap, no larger K was tried, so the cap may have chosen K"]
    if by_bic.k == last and last > 1:
        return [
            f"cap reached: BIC still improves at K = {last}, the largest tried; a smooth drift does that "
            "too, so more states are no evidence of more phases"
        ]
    return []


def _value(each: Candidate, rule: Rule) -> float:
    """What a rule makes as small as it can; infinite where it is not known."""
    if rule == "paper":
        return _number(each.heldout)
    if rule == "heldout":
        return math.inf if each.heldout_loglik is None else _number(-each.heldout_loglik)
    return _number({"aic": each.aic, "icl": each.icl}.get(rule, each.bic))


def _number(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def fit_k(runs: Runs, k: int, restarts: int, settings: StateSettings) -> tuple[list[Restart], list[str]]:
    """:func:`analyzers.latent.restarts.fit_restarts` with the model, priors and seed of the settings."""
    return fit_restarts(
        runs,
        k,
        restarts=restarts,
        seed=settings.seed,
        covariance=settings.covariance,
        topology=settings.topology,
        prior=prior_of(settings),
        iterations=settings.max_iterations,
        tolerance=settings.tolerance,
    )


def _heldout_bic(parameters: Parameters, heldout: Runs) -> float | None:
    if not heldout:
        return None
    return -2 * score(parameters, heldout) + parameters.free * math.log(seen_frames(heldout).sum())


def _agreement(
    done: Sequence[Restart], restarts: int, train: Runs, seen: Bool[np.ndarray, "frames"]
) -> float | None:
    if len(done) < 2:
        return None
    paths = [
        np.concatenate([each.path for each in decode_runs(one.parameters, train)])[seen]
        for one in done[: max(3, restarts // COMPARED)]
    ]
    return float(np.mean([adjusted_rand_score(one, other) for one, other in combinations(paths, 2)]))
