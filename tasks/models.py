"""From a checkpoint's folder to a model in memory, to its tokenizer, and to its weights one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from analyzers.adapters import Adapter
from analyzers.families import Family, family_of
from storage.errors import UsageError
from storage.keys import digest, file_sha256
from storage.local import DamagedCheckpointError, safetensors_header, weight_names
from storage.probe import Probe, ProbeConfig, build_probe

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


_probes: dict[tuple[str, ProbeConfig, str], Probe] = {}


def choose_device(device: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"measure.device is {device!r}, but this machine has no usable GPU")
    return torch.device(device)


def load_adapter(folder: Path, dtype: str, device: str) -> Adapter:
    """Load a causal language model in inference mode, with its adapter.

    Raises:
        DamagedCheckpointError: the weights are cut short, or do not fill the model.
        UnknownFamilyError: no adapter knows the architecture.
    """
    for name in weight_names(folder):
        if name.endswith(".safetensors"):
            safetensors_header(folder / name)
    config = AutoConfig.from_pretrained(folder)
    family_of(config.model_type)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise DamagedCheckpointError(
            f"{folder.name}: {len(report['missing_keys'])} parameters are not in the weights, {first} first"
        )
    return Adapter(model.to(choose_device(device)).eval())


def probe_of(folder: Path, config: ProbeConfig, root: str) -> Probe:
    """The probe as the checkpoint's own tokenizer (or ``probe.tokenizer``) cuts it.

    Built once per process for each tokenizer, so that a series shares one.

    Raises:
        UsageError: there is no tokenizer, or the text does not yield the sequences asked for.
    """
    source = folder if config.tokenizer is None else Path(config.tokenizer.replace("{root}", root))
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise UsageError(f"{str(source)!r} has no tokenizer; name one with probe.tokenizer")
    identity = digest([[file.name, file_sha256(file)] for file in files])
    key = (identity, config, root)
    if key not in _probes:
        _probes[key] = build_probe(config, AutoTokenizer.from_pretrained(source), root)
    return _probes[key]


class CheckpointWeights:
    """Weight matrices of a checkpoint's files, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._family: Family = family_of(self._config.get("model_type", ""))
        self._names = weight_names(folder)

    def matrices(self) -> Iterator[tuple[str, int, Tensor]]:
        """(site, layer, matrix) in the order of the files."""
        for name, tensor in self._tensors("weight"):
            yield from self._family.parts(name, tensor, self._config)

    def biases(self) -> Iterator[Tensor]:
        """Bias vectors of the measured matrices."""
        for _, tensor in self._tensors("bias"):
            yield tensor

    def _tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        def wanted(name: str) -> bool:
            place = self._family.place(name)
            return place is not None and place[2] == kind

        for file in self._names:
            path = self._folder / file
            if file.endswith(".safetensors"):
                safetensors_header(path)
                with safe_open(path, framework="pt") as tensors:
                    for name in filter(wanted, tensors.keys()):
                        yield name, tensors.get_tensor(name)
            else:
                # Weights only: a pickle that could run code is refused by torch.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                for name in filter(wanted, state):
                    yield name, state[name]
