"""From a checkpoint's folder to a model in memory, to its tokenizer, and to its weights one at a time."""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from analyzers.adapters import Adapter, Model
from analyzers.base import WeightMatrices
from analyzers.families import Family, family_of, head_counts
from storage.errors import DamagedCheckpointError, UsageError, first_line
from storage.keys import digest, file_sha256
from storage.local import safetensors_header, weight_names
from storage.probe import Probe, ProbeConfig, build_probe
from tasks.loader import OwnWeights, load_own

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


# While a model is made, transformers and torch change what is global to the process: one thread at a time.
_loading = RLock()  # a loader of one's own may call load_adapter
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


def load_model(folder: Path, dtype: str, device: str, loader: str | None = None) -> Model:
    """Load a checkpoint in inference mode: through a person's own ``loader``, else by its family.

    Raises:
        DamagedCheckpointError: the weights are cut short, or do not fill the model.
        UnknownFamilyError: no adapter knows the architecture.
        UsageError, LoaderError: as :func:`tasks.loader.load_own`.
    """
    if loader is not None:
        with _loading:
            own = load_own(loader, folder)
        own.model.to(device=choose_device(device), dtype=getattr(torch, dtype))
        return own
    return load_adapter(folder, dtype, device)


def load_adapter(folder: Path, dtype: str, device: str) -> Adapter:
    """Load a causal language model of transformers in inference mode, with its adapter.

    Code that a repository brings along is not run.

    Raises:
        DamagedCheckpointError: the weights are cut short, or do not fill the model.
        UnknownFamilyError: no adapter knows the architecture.
    """
    for name in weight_names(folder):
        if name.endswith(".safetensors"):
            safetensors_header(folder / name)
    # Before transformers, which has another sentence for architectures that it does not know.
    family_of(_config(folder).get("model_type", ""))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with _loading:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            trust_remote_code=False,
        )
    if report["missing_keys"]:
        first = sorted(report["missing_keys"])[0]
        raise DamagedCheckpointError(
            f"{folder.name}: {len(report['missing_keys'])} parameters are not in the weights, {first} first"
        )
    return Adapter(model.to(choose_device(device)).eval())


def open_weights(folder: Path, loader: str | None = None) -> WeightMatrices:
    """The weights of a checkpoint as stored.

    Raises:
        DamagedCheckpointError, UnknownFamilyError, UsageError, LoaderError: as :func:`load_model`.
    """
    return CheckpointWeights(folder) if loader is None else OwnWeights(loader, folder)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{folder.name}: no readable config.json ({error})") from None
    return config if isinstance(config, dict) else {}


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
        _probes[key] = build_probe(
            config, AutoTokenizer.from_pretrained(source, trust_remote_code=False), root
        )
    return _probes[key]


@dataclass(frozen=True)
class Sizes:
    """What a configuration says of a model's size."""

    layers: int
    width: int
    vocabulary: int


def sizes_of(folder: Path) -> Sizes:
    """Sizes of a model of transformers, by its configuration alone.

    Raises:
        DamagedCheckpointError: there is no readable configuration.
        UnknownFamilyError: no adapter knows the architecture.
    """
    family_of(_config(folder).get("model_type", ""))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return Sizes(int(config.num_hidden_layers), int(config.hidden_size), int(config.vocab_size))
    except Exception as error:  # whatever transformers makes of wrong settings
        raise DamagedCheckpointError(
            f"{folder.name}: config.json does not say the model's sizes: {first_line(error)}"
        ) from error


def vocabulary_rows(folder: Path, unembedding: bool, size: int) -> Iterator[Tensor]:
    """Rows of W_U, or of W_E, as stored, ``size`` at a time.

    A model whose two are tied stores W_E alone: it is W_U too.

    Raises:
        DamagedCheckpointError: no file holds the matrix, or one is cut short.
        UnknownFamilyError: no adapter knows the architecture.
    """
    family = family_of(_config(folder).get("model_type", ""))
    if unembedding and not _holds(folder, lambda name: family.vocabulary_matrix(name, True)):
        if not AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings:
            raise DamagedCheckpointError(
                f"{folder.name}: no weight file holds W_U, and W_E is not tied to it"
            )
        unembedding = False
    for file in weight_names(folder):
        path = folder / file
        if file.endswith(".safetensors"):
            safetensors_header(path)
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no dictionary)
                    if family.vocabulary_matrix(name, unembedding):
                        rows = tensors.get_slice(name)
                        for start in range(0, rows.get_shape()[0], size):
                            yield rows[start : start + size]
                        return
        else:
            for name, tensor in _load_bin(path).items():
                if family.vocabulary_matrix(name, unembedding):
                    yield from torch.split(tensor, size)
                    return
    raise DamagedCheckpointError(f"{folder.name}: no weight file holds {'W_U' if unembedding else 'W_E'}")


def _holds(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Whether a weight file has a tensor of such a name."""
    for file in weight_names(folder):
        path = folder / file
        names = safetensors_header(path) if file.endswith(".safetensors") else _load_bin(path)
        if any(map(wanted, names)):
            return True
    return False


class CheckpointWeights:
    """Weight matrices of a checkpoint's files, read one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = _config(folder)
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

    def heads(self) -> Mapping[str, int]:
        """Number of heads by attention site, by the configuration with its class's defaults."""
        return head_counts(AutoConfig.from_pretrained(self._folder, trust_remote_code=False))

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
                state = _load_bin(path)
                for name in filter(wanted, state):
                    yield name, state[name]


def _load_bin(path: Path) -> dict[str, Tensor]:
    """Tensors of a .bin file, weights only: a pickle that could run code is refused by torch.

    Raises:
        DamagedCheckpointError: the file is refused or cannot be read.
    """
    try:
        # Files of torch before 1.6 are no zip files and cannot be mapped into memory.
        mapped = zipfile.is_zipfile(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle, zip and runtime errors, with pages of advice
        raise DamagedCheckpointError(
            f"{path.parent.name}: {path.name!r} cannot be read as weights only: {type(error).__name__}"
        ) from error
    return state
