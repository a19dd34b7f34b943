"""Crosscoders on disk: the export that others read, and the state from which a killed training goes on.

``ROOT/crosscoders/SERIES/RUN/KEY/`` holds ``weights.safetensors`` and, written last, ``config.json``; while a
training runs, ``state.safetensors``. Every file appears whole or not at all.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from analyzers.crosscoder.settings import TrainSettings
from analyzers.crosscoder.training import TrainerState
from analyzers.crosscoder.weights import Crosscoder
from storage.errors import DamagedCheckpointError, UsageError
from storage.keys import check_name
from storage.pool import pools_folder

FORMAT = "ontogeny-crosscoder-1"
WEIGHTS_FILE, CONFIG_FILE, STATE_FILE = "weights.safetensors", "config.json", "state.safetensors"


def crosscoder_folder(root: str, series: str, run: str, key: str) -> Path:
    """Folder of one crosscoder.

    Raises:
        UsageError: ROOT is no folder of this machine.
    """
    base = pools_folder(root).with_name("crosscoders")
    return base / check_name("series", series) / check_name("run", run) / check_name("key", key)


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a finished crosscoder."""
    return (folder / CONFIG_FILE).is_file()


def export(folder: Path, crosscoder: Crosscoder, about: dict[str, Any]) -> None:
    """Write the weights in the layouts ``W_enc [S, d, m]`` and ``W_dec [S, m, d]``, then the configuration.

    ``about`` is what the configuration says besides format, sizes, gate, activation and scales.
    """
    shape = (crosscoder.latents, crosscoder.snapshots, crosscoder.width)
    tensors = {
        "W_enc": crosscoder.encoder.view(shape).permute(1, 2, 0),
        "W_dec": crosscoder.decoder.view(shape).permute(1, 0, 2),
        "b_enc": crosscoder.encoder_bias,
        "b_dec": crosscoder.decoder_bias.view(shape[1:]),
        "threshold": crosscoder.threshold,
    }
    _save(folder / WEIGHTS_FILE, {name: tensor.contiguous() for name, tensor in tensors.items()}, {})
    config = {
        "format": FORMAT,
        "latents": crosscoder.latents,
        "snapshots": crosscoder.snapshots,
        "width": crosscoder.width,
        "activation": crosscoder.activation,
        "gate": crosscoder.gate,
        "scale": crosscoder.scale.tolist(),
        **about,
    }
    temporary = _beside(folder / CONFIG_FILE)
    temporary.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)  # noqa: PTH105


def read_config(folder: Path) -> dict[str, Any]:
    """What the configuration of a finished crosscoder says.

    Raises:
        UsageError: there is no finished crosscoder.
        DamagedCheckpointError: it is of another format.
    """
    if not is_trained(folder):
        raise UsageError(f"{str(folder)!r} holds no finished crosscoder")
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{str(folder)!r} has format {config.get('format')!r}, not {FORMAT!r}")
    return config


def load_crosscoder(folder: Path) -> Crosscoder:
    """The crosscoder of an export, equal to the one that was written; raises as :func:`read_config`."""
    config = read_config(folder)
    tensors = load_file(folder / WEIGHTS_FILE)

    def rows(name: str, order: tuple[int, int, int]) -> Float[Tensor, "latents inputs"]:
        found: Tensor = tensors[name].permute(order).reshape(config["latents"], -1).contiguous()
        return found

    return Crosscoder(
        encoder=rows("W_enc", (2, 0, 1)),
        encoder_bias=tensors["b_enc"],
        decoder=rows("W_dec", (1, 0, 2)),
        decoder_bias=tensors["b_dec"].reshape(-1),
        threshold=tensors["threshold"],
        scale=torch.tensor(config["scale"], dtype=torch.float32),
        activation=config["activation"],
        gate=config["gate"],
    )


def save_state(folder: Path, state: TrainerState) -> None:
    """Write the state of a training; the one before stays until this one is whole."""
    about = {
        "settings": state.settings.model_dump_json(),
        # JSON of a Python float reads back as the same bits.
        "numbers": json.dumps(state.numbers),
    }
    _save(folder / STATE_FILE, state.tensors, about)


def load_state(folder: Path) -> TrainerState | None:
    """The last state written; None where there is none, or where it is not readable."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            about = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return TrainerState(
        TrainSettings.model_validate_json(about["settings"]), tensors, json.loads(about["numbers"])
    )


def drop_state(folder: Path) -> None:
    """Delete the state, and what a kill left half written."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    for left in folder.glob(".*.part"):
        left.unlink()


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    save_file(tensors, temporary, metadata=about)
    os.replace(temporary, path)  # noqa: PTH105


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
