"""Contexts and labels of features, as rows of ``feature_contexts``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64

from analyzers.crosscoder.active import Active, find_active, joined
from analyzers.crosscoder.contexts import Context, TopContexts, texts
from analyzers.crosscoder.labels import Label, Labeller
from analyzers.crosscoder.weights import Crosscoder
from storage.pool import Pool
from tasks.crosscoder_job import ReadJob, open_tokenizer, rows_in_order
from tasks.models import choose_device

_LABELLED_ROWS = 200_000


def context_rows(job: ReadJob, pool: Pool, crosscoder: Crosscoder) -> list[dict[str, Any]]:
    """The strongest activations of every feature with their text, and the feature's label.

    Labels rest on at most 200,000 rows, of whole sequences in pairs of neighbours, evenly over the pool.
    """
    tokenizer = open_tokenizer(job.tokenizer)

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids))
        return text

    tokens = np.asarray(pool.tokens)
    vocabulary = pool.sequences is None
    # Of vocabulary items the id is the place, in one sequence of all items.
    places = (
        np.stack([np.zeros(len(tokens), np.int64), tokens[:, 2]], axis=1) if vocabulary else tokens[:, :2]
    )
    found, sample = _pass(job, pool, crosscoder, places.astype(np.int64), vocabulary)
    labels: dict[int, Label] = {}
    why = "vocabulary items stand in no sequence"
    if sample is not None:
        at, active = sample
        try:
            labeller = Labeller(_ids(pool), torch.from_numpy(at))
            labels = {label.feature: label for label in labeller.labels(active)}
        except ValueError as error:
            why = str(error)
    all_tokens = torch.arange(int(tokens[:, 2].max()) + 1)[None] if vocabulary else _ids(pool)
    window = {"before": 0, "after": 0} if vocabulary else {}
    return [
        _row(context, decode, labels.get(context.feature), why, vocabulary)
        for context in found.contexts(all_tokens, **window)
    ]


def _ids(pool: Pool) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pool.sequences).astype(np.int64))


def _pass(
    job: ReadJob,
    pool: Pool,
    crosscoder: Crosscoder,
    places: Int64[np.ndarray, "rows 2"],
    vocabulary: bool,
) -> tuple[TopContexts, tuple[Int64[np.ndarray, "n 2"], Active] | None]:
    """Top contexts of all rows, and the active features of the rows that labels rest on, in one pass."""
    device = choose_device(job.device)
    found = TopContexts(crosscoder.latents, job.contexts)
    labelled = np.zeros(pool.rows, dtype=bool) if vocabulary else _labelled(places)
    parts = []
    for rows, values in rows_in_order(pool, np.arange(pool.rows)):
        # Labels do not ask at which snapshots a gate is open.
        active = replace(find_active(crosscoder, values.to(device)).to("cpu"), open=None)
        found.update(active, torch.from_numpy(places[rows]))
        parts.append(active.of_tokens(torch.from_numpy(labelled[rows])))
    return found, None if vocabulary else (places[labelled], joined(parts))


def _labelled(places: Int64[np.ndarray, "rows 2"]) -> Bool[np.ndarray, "rows"]:
    # Pairs of neighbours: labels are chosen on even sequences and scored on odd ones.
    every = -(-len(places) // _LABELLED_ROWS)
    return np.asarray((places[:, 0] // 2) % every == 0)


def _row(
    context: Context,
    decode: Callable[[Sequence[int]], str],
    label: Label | None,
    why: str,
    vocabulary: bool,
) -> dict[str, Any]:
    before, token, after = texts(context, decode)
    best = None if label is None else label.best
    return {
        "feature": context.feature,
        "rank": context.rank,
        "value": context.value,
        "sequence": None if vocabulary else context.sequence,
        "position": None if vocabulary else context.position,
        "before": before,
        "token": token,
        "after": after,
        "label": None if label is None else label.rule,
        "argument": None if label is None or label.rule is None else _argument(label, decode),
        "auc": None if best is None else best.auc,
        "purity": None if best is None else best.purity,
        "note": why if label is None else label.note,
    }


def _argument(label: Label, decode: Callable[[Sequence[int]], str]) -> str | None:
    argument = None if label.best is None else label.best.argument
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return f"{argument[0]} to {argument[1] - 1}"
    return decode([argument])
