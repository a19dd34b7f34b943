"""What the checkpoints' models say of a crosscoder: spliced losses and indirect effects, one by one.

A checkpoint may be gone when the next one comes, so each leaves its part as a file beside the crosscoder.
What fails leaves none and is a row in ``failures``; the other checkpoints go on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from analyzers.crosscoder.active import find_active, reconstructed
from analyzers.crosscoder.contrasts import (
    ContrastTokens,
    parse_contrasts,
    subject_verb_agreement,
    tokenise,
)
from analyzers.crosscoder.effects import Site, ablate, indirect_effects, strongest
from analyzers.crosscoder.splice import activations_at, splice_losses
from storage.errors import OntogenyError, UsageError
from storage.pool import Pool
from storage.series import Checkpoint
from storage.store import Store
from tasks.crosscoder import held_out_rows
from tasks.crosscoder_job import ReadJob, open_tokenizer, read_json, write_json
from tasks.measure import record_failure, sentence
from tasks.models import load_model

ABLATED = 10
"""Features that are ablated together, at most."""


def splice_part(job: ReadJob, snapshot: int) -> Path:
    """File with the spliced losses of a snapshot."""
    return job.parts / f"splice-{snapshot}.json"


def contrast_part(job: ReadJob, snapshot: int) -> Path:
    """File with a snapshot's activations on the contrast task."""
    return job.parts / f"contrast-{snapshot}.npy"


def effects_part(job: ReadJob, snapshot: int) -> Path:
    """File with the effects at a snapshot."""
    return job.parts / f"effects-{snapshot}.json"


def spliced_sequences(pool: Pool, every: int, most: int) -> Int64[np.ndarray, "sequences"]:
    """Sequences that are spliced: those left out of training first, then the others, in order."""
    sequences = np.asarray(pool.tokens)[:, 0]
    out = np.unique(sequences[held_out_rows(pool, every)])
    rest = np.setdiff1d(sequences, out)
    return np.sort(np.concatenate([out, rest])[:most].astype(np.int64))


def attempt(job: ReadJob, checkpoint: Checkpoint, name: str | None, work: Callable[[], None]) -> bool:
    """Whether the work was done. If not, ``failures`` says why, and the other checkpoints go on."""
    try:
        work()
    except Exception as error:  # whatever a model does must not lose what the others gave
        record_failure(Store(job.root), checkpoint, name, sentence(error))
        return False
    return True


def visit(
    job: ReadJob, snapshot: int, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> bool:
    """Splice the snapshot's reconstruction into its model, and keep its activations on the contrast task.

    Returns whether all that was asked is there. ``error`` says why there is no folder.
    """
    pool, models = job.open_pool(), list[Any]()

    def load() -> None:
        models.append(load_model(_there(folder, error), job.dtype, job.device, job.loader))

    if not attempt(job, checkpoint, None, load):
        return False
    done = True
    if lacks_splice(job, snapshot):
        done &= attempt(job, checkpoint, "splice", lambda: _splice(job, pool, models[0], snapshot))
    if lacks_contrast(job, snapshot):
        done &= attempt(job, checkpoint, "effects", lambda: _keep_contrast(job, pool, models[0], snapshot))
    return done


def _there(folder: Path | None, error: str | None) -> Path:
    if folder is None:
        raise OntogenyError(error or "the checkpoint did not arrive")
    return folder


def _keep_contrast(job: ReadJob, pool: Pool, model: Any, snapshot: int) -> None:
    protocol, contrasts = pool.info.protocol, contrast_tokens(job.pairs, job.tokenizer, pool)
    device = next(model.model.parameters()).device
    places = contrasts.places()
    found = activations_at(model, protocol["site"], protocol["layer"], contrasts.tokens.to(device))
    values = found.float().cpu()[places[:, 0], places[:, 1]].numpy()
    path = contrast_part(job, snapshot)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")  # ends in .npy, so that numpy adds nothing
    np.save(temporary, values)
    temporary.replace(path)


def _splice(job: ReadJob, pool: Pool, model: Any, snapshot: int) -> None:
    assert pool.sequences is not None
    crosscoder = job.crosscoder()
    chosen = spliced_sequences(pool, job.held_out, job.splice)
    tokens = np.asarray(pool.tokens)
    rows = np.flatnonzero(np.isin(tokens[:, 0], chosen))
    places = np.stack([np.searchsorted(chosen, tokens[rows, 0]), tokens[rows, 1]], axis=1)
    active = find_active(crosscoder, torch.from_numpy(pool.read(rows)))
    losses = splice_losses(
        model,
        pool.info.protocol["site"],
        pool.info.protocol["layer"],
        torch.from_numpy(np.asarray(pool.sequences)[chosen].astype(np.int64)),
        torch.from_numpy(places.astype(np.int64)),
        reconstructed(active, crosscoder, snapshot),
    )
    recovered = losses.recovered()
    row = {
        "clean_loss": losses.clean,
        "spliced_loss": losses.spliced,
        "mean_ablated_loss": losses.mean_ablated,
        "loss_increase": losses.increase,
        "loss_recovered": recovered,
        "spliced_share": losses.share,
        "spliced_explained": losses.explained,
        "splice_note": None if recovered is not None else "mean ablation costs less than 0.01 nats",
    }
    write_json(splice_part(job, snapshot), row)


def contrast_tokens(pairs: str | None, tokenizer_folder: str, pool: Pool) -> ContrastTokens:
    """The contrast task, of the file ``pairs`` or our own, as tokens of the run.

    Raises:
        UsageError: the file cannot be read, or no item fits the tokenizer.
    """
    tokenizer = open_tokenizer(tokenizer_folder)
    first = pool.info.protocol["probe"]["bos"] == "first"

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    try:
        items = subject_verb_agreement()
        if pairs:
            items = parse_contrasts(Path(pairs).read_text(encoding="utf-8").splitlines())
        return tokenise(items, encode, tokenizer.bos_token_id if first else None)
    except (OSError, ValueError) as error:
        raise UsageError(f"contrasts: {error}") from None


def effects_at(
    job: ReadJob, snapshot: int, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> bool:
    """Indirect effects at one snapshot and the ablation of the strongest, once all snapshots were visited.

    Returns whether they are there. ``error`` says why there is no folder.
    """
    return attempt(job, checkpoint, "effects", lambda: _keep_effects(job, snapshot, _there(folder, error)))


def _keep_effects(job: ReadJob, snapshot: int, folder: Path) -> None:
    pool = job.open_pool()
    protocol, contrasts = pool.info.protocol, contrast_tokens(job.pairs, job.tokenizer, pool)
    crosscoder = job.crosscoder()
    scaled = [
        torch.from_numpy(np.load(contrast_part(job, s))) * scale for s, scale in enumerate(crosscoder.scale)
    ]
    active = find_active(crosscoder, torch.cat(scaled, dim=1))
    # Low precision rounds gradients.
    model = load_model(folder, "float32", job.device, job.loader)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    at = Site(model, protocol["site"], protocol["layer"], crosscoder, snapshot, contrasts, active)
    found = indirect_effects(at)
    (there,) = np.nonzero(found.effects)
    row: dict[str, Any] = {
        "features": there.tolist(),
        "effects": found.effects[there].tolist(),
        "items": found.items,
        "metric": found.full,
        "correct": found.correct,
        "all_ablated": found.ablated,
        "gap": found.gap,
        "left_out": len(contrasts.left_out),
    }
    try:
        ablation = ablate(at, strongest(found.effects, min(ABLATED, max(1, len(there) // 2))))
        row |= {
            "ablated": list(ablation.features),
            "ablated_change": ablation.change,
            "ablated_correct": ablation.correct,
            "random_changes": ablation.random.tolist(),
            "p": ablation.p,
        }
    except ValueError as error:  # too few features have an effect, or too few others to compare with
        row["note"] = str(error)
    write_json(effects_part(job, snapshot), row)


def effects_of(job: ReadJob, snapshots: int) -> list[dict[str, Any] | None]:
    """The parts of all snapshots in order; None where effects are missing or were not asked for."""
    return [read_json(effects_part(job, s)) for s in range(snapshots)]


def lacks_splice(job: ReadJob, snapshot: int) -> bool:
    """Whether the splice at a snapshot is asked for and missing."""
    return job.splice > 0 and not splice_part(job, snapshot).is_file()


def lacks_contrast(job: ReadJob, snapshot: int) -> bool:
    """Whether the activations on the contrast task are asked for and missing."""
    return job.effects and not contrast_part(job, snapshot).is_file()


def lacks_effects(job: ReadJob, snapshot: int) -> bool:
    """Whether the effects at a snapshot are asked for and missing."""
    return job.effects and not effects_part(job, snapshot).is_file()


def needs(job: ReadJob, snapshot: int) -> bool:
    """Whether a snapshot's model has still to be visited."""
    return lacks_splice(job, snapshot) or lacks_contrast(job, snapshot)


def missing(job: ReadJob, snapshots: int) -> list[str]:
    """What was asked of the models and is not there, as ``splice 3``."""
    asked = {"splice": lacks_splice, "effects": lacks_effects}
    return [f"{name} {s}" for name, lacks in asked.items() for s in range(snapshots) if lacks(job, s)]


@task(name="visit-snapshot", cache_policy=NO_CACHE, task_run_name="visit {checkpoint.label}")
def visit_snapshot(
    job: ReadJob, snapshot: int, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> State[None]:
    """Task: :func:`visit`. A failure is a Failed state."""
    return _state(checkpoint, visit(job, snapshot, checkpoint, folder, error))


@task(name="effects-at-snapshot", cache_policy=NO_CACHE, task_run_name="effects at {checkpoint.label}")
def effects_at_snapshot(
    job: ReadJob, snapshot: int, checkpoint: Checkpoint, folder: Path | None, error: str | None = None
) -> State[None]:
    """Task: :func:`effects_at`. A failure is a Failed state."""
    return _state(checkpoint, effects_at(job, snapshot, checkpoint, folder, error))


def _state(checkpoint: Checkpoint, done: bool) -> State[None]:
    return Completed() if done else Failed(message=f"{checkpoint.label}: see table failures")
