"""Series, runs and checkpoints: what they are called and which of them are meant."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from storage.errors import UsageError
from storage.keys import check_name, weights_sha256

# step1000, step_20k, checkpoint-500, ckpt_40, stage1-step0-tokens0B, stage2-ingredient1-step23852-tokens51B
DEFAULT_PATTERN = (
    r"(?:stage(?P<stage>\d+)-)?(?:ingredient(?P<ingredient>\d+)-)?"
    r"(?:step_?|checkpoint-|ckpt_)(?P<step>\d+k?)(?:-tokens(?P<btokens>\d+)B)?"
)
# Stands in a repository's name for that of a checkpoint, where each checkpoint has a repository of its own.
PLACE = "{checkpoint}"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightFile(_Frozen):
    """One file of weights: its name, size in bytes, and SHA-256 where known."""

    name: str
    bytes: int
    sha256: str | None = None


class Checkpoint(_Frozen):
    """One saved state of a run. Listing gives its name; describing adds files, sizes and digests.

    ``fingerprint`` is what tells cheaply that the weights are the same as when their digest was taken: the
    commit on the Hub; names, sizes and modification times in a folder.
    """

    series: str
    run: str
    step: int
    stage: int | None = None
    tokens: int | None = None
    revision: str
    commit: str | None = None
    location: str
    files: tuple[WeightFile, ...] = ()
    bytes: int | None = None
    weights_sha256: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    config_digest: str | None = None
    tokenizer_digest: str | None = None
    text_bytes: int | None = None

    @property
    def label(self) -> str:
        """``run/revision``: how messages name a checkpoint."""
        return f"{self.run}/{self.revision}"

    def described(self, files: tuple[WeightFile, ...], fingerprint: str | None) -> "Checkpoint":
        """This checkpoint with its weight files, their total size, and the digest if every file has one."""
        pairs = [(file.name, file.sha256) for file in files if file.sha256 is not None]
        return self.model_copy(
            update={
                "files": files,
                "bytes": sum(file.bytes for file in files),
                "weights_sha256": weights_sha256(pairs) if len(pairs) == len(files) else None,
                "fingerprint": fingerprint,
            }
        )

    def described_as(self, known: "Checkpoint") -> "Checkpoint":
        """This checkpoint with the description of its weights taken from an earlier record of it."""
        taken = ["commit", "files", "bytes", "weights_sha256", "fingerprint", "dtype"]
        taken += ["config_digest", "tokenizer_digest", "text_bytes"]
        return self.model_copy(update={name: getattr(known, name) for name in taken})


class _Source(_Frozen):
    pattern: Annotated[
        str,
        Field(
            description="regular expression of checkpoint names with a group 'step' (digits; 20k is 20000)"
        ),
    ] = DEFAULT_PATTERN
    tokens_per_step: Annotated[
        int | None, Field(description="training tokens per step, where names do not say them", gt=0)
    ] = None
    loader: Annotated[
        str | None,
        Field(description="module:function that loads a model class of your own (docs/own_models.md)"),
    ] = None
    weights: Annotated[
        str | None,
        Field(description="weight files of a checkpoint, as *.pt; only with loader; absent: HF names"),
    ] = None

    @model_validator(mode="after")
    def _weights_need_a_loader(self) -> Self:
        # transformers reads its own file names, so the digest would be of other files than the numbers.
        if self.weights is not None and self.loader is None:
            raise ValueError(f"weights {self.weights!r} need a loader that reads them")
        return self

    @field_validator("weights")
    @classmethod
    def _inside(cls, weights: str | None) -> str | None:
        parts = PurePosixPath(weights or "*").parts
        if not parts or parts[0] == "/" or ".." in parts or "**" in parts:
            raise ValueError(f"weights {weights!r} are no file names inside a checkpoint's folder")
        return weights

    @field_validator("loader")
    @classmethod
    def _names_a_function(cls, loader: str | None) -> str | None:
        module, separator, function = (loader or "a:b").partition(":")
        if not (separator and all(map(str.isidentifier, module.split("."))) and function.isidentifier()):
            raise ValueError(f"loader {loader!r} is not module:function")
        return loader

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        if "step" not in groups:
            raise ValueError(f"pattern {pattern!r} has no group (?P<step>...)")
        return pattern


class HubSource(_Source):
    """A series on the Hugging Face Hub: one repository per run, one branch per checkpoint.

    Or one repository per checkpoint: ``google/multiberts-seed_0-{checkpoint}`` is every repository of that
    owner and form where ``pattern`` reads a step in what stands for ``{checkpoint}``; its main branch counts.
    """

    kind: Annotated[Literal["hub"], Field(description="repositories of the Hugging Face Hub")] = "hub"
    repos: Annotated[
        dict[str, str],
        Field(
            description="run name -> OWNER/NAME; OWNER/NAME-{checkpoint} for one repository per checkpoint",
            min_length=1,
        ),
    ]

    @field_validator("repos")
    @classmethod
    def _repos(cls, repos: dict[str, str]) -> dict[str, str]:
        for run, repo in repos.items():
            check_name("run", run)
            owner, _, name = repo.partition("/")
            if not (
                re.fullmatch(r"[\w.-]+", owner) and re.fullmatch(r"[\w.-]+", name.replace(PLACE, "x", 1))
            ):
                raise ValueError(f"{repo!r} is not a repository OWNER/NAME, or OWNER/NAME-{PLACE}")
        return repos


class DirSource(_Source):
    """A series in folders: PATH/step1000 (one run) or PATH/RUN/step1000 (several).

    A path with wildcards names one folder per run, ``runs/*/checkpoints``: a run is called what its wildcards
    matched.
    """

    kind: Annotated[Literal["dir"], Field(description="a folder of checkpoints")] = "dir"
    path: Annotated[
        str, Field(description="folder, or folders as runs/*/checkpoints; {root} stands for ROOT")
    ]
    made_by: Annotated[
        str | None, Field(description="the command that makes the folder, named where it does not exist")
    ] = None


Source = Annotated[HubSource | DirSource, Field(discriminator="kind")]


@dataclass(frozen=True)
class ParsedName:
    """What a checkpoint's name says."""

    step: int
    stage: int | None
    ingredient: int | None
    tokens: int | None

    def run_of(self, run: str) -> str:
        """The run it belongs to: ingredients are runs of their own, because their steps count anew."""
        if self.ingredient is None:
            return run
        stage = "" if self.stage is None else f"-stage{self.stage}"
        return f"{run}{stage}-ingredient{self.ingredient}"


def parse_name(name: str, source: _Source) -> ParsedName | None:
    """Read a checkpoint's name by the source's pattern; None if it is no checkpoint's.

    It is the name of a branch or folder, or a part of a repository's. A step may be in thousands (``20k``).

    Tokens come from the name (``tokens21B``: billions, rounded by whoever named it), else from
    ``tokens_per_step``.
    """
    match = re.fullmatch(source.pattern, name)
    if match is None:
        return None
    groups = {name: match.groupdict().get(name) for name in ("step", "stage", "ingredient", "btokens")}
    written = groups["step"] or ""
    groups["step"] = written.removesuffix("k")
    if not all(value is None or value.isdecimal() for value in groups.values()):
        return None
    found = {name: int(value) for name, value in groups.items() if value is not None}
    step = found["step"] * (1000 if written.endswith("k") else 1)
    if "btokens" in found:
        tokens: int | None = found["btokens"] * 10**9
    else:
        tokens = step * source.tokens_per_step if source.tokens_per_step else None
    return ParsedName(step, found.get("stage"), found.get("ingredient"), tokens)


@dataclass(frozen=True)
class StepRange:
    """Steps ``first..last``, of which every ``stride``-th counted from ``first`` if a stride is given."""

    first: int
    last: int
    stride: int | None = None

    def __contains__(self, step: int) -> bool:
        inside = self.first <= step <= self.last
        return inside and (self.stride is None or (step - self.first) % self.stride == 0)


@dataclass(frozen=True)
class StepSelection:
    """A choice among the steps that a series has, written ``0,1,2,4..512,1000..143000:1000``.

    A single number must exist; ``a..b`` takes every checkpoint of that interval (both ends included);
    ``a..b:s`` those at a, a+s, a+2s, ...
    """

    text: str
    ranges: tuple[StepRange, ...]

    @classmethod
    def parse(cls, text: str) -> "StepSelection":
        """Parse the notation above.

        Raises:
            UsageError: a part is not of that form, or an interval is empty.
        """
        ranges = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+)(?::(\d+))?)?\s*", part)
            if match is None:
                raise UsageError(f"step list {text!r}: {part.strip()!r} is not N, A..B or A..B:STRIDE")
            first, last, stride = (int(g) if g is not None else None for g in match.groups())
            assert first is not None
            if (last is not None and last < first) or stride == 0:
                raise UsageError(f"step list {text!r}: {part.strip()!r} selects nothing")
            ranges.append(StepRange(first, first if last is None else last, stride))
        return cls(text, tuple(ranges))

    def select(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        """The chosen checkpoints, in their order.

        Raises:
            UsageError: a single number is no step of any run, or nothing is selected.
        """
        steps = {checkpoint.step for checkpoint in checkpoints}
        for item in self.ranges:
            if item.first == item.last and item.first not in steps:
                raise UsageError(f"step list {self.text!r}: there is no checkpoint at step {item.first}")
        chosen = [c for c in checkpoints if any(c.step in item for item in self.ranges)]
        if not chosen:
            span = f"{min(steps)} to {max(steps)}" if steps else "none at all"
            raise UsageError(f"step list {self.text!r} selects no checkpoint; the series has steps {span}")
        return chosen
