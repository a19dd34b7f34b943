"""Configuration: one typed model for command line, files and the Prefect UI. It round-trips TOML."""

import difflib
import os
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from analyzers.growth import GrowthSettings
from analyzers.head_births import HeadSettings
from analyzers.latent import Grid, StateSettings, Transform
from analyzers.phases import PhaseSettings
from analyzers.registry import UnknownAnalyzerError, find
from flows.config_crosscoder import CrosscoderConfig
from storage.audit import AuditConfig
from storage.errors import UsageError
from storage.keys import check_name
from storage.probe import ProbeConfig
from storage.series import PLACE, Source, StepSelection
from storage.store import DEFAULT_ROOT

_M = TypeVar("_M", bound=BaseModel)

SERIES_FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "series"
DEFAULT_ANALYZERS = (
    "attention",
    "induction",
    "logits",
    "loss",
    "massive",
    "massive_channels",
    "patch_entropy",
    "similarity",
    "sinks",
    "spectra",
    "weight_change",
    "weights",
)
# Attention is seen in models of transformers only.
OF_TRANSFORMERS = ("attention", "induction", "sinks")
DEFAULT_TRAJECTORIES = (
    "loss",
    "rankme_cov[resid_post.last]",
    "alpha_req[resid_post.last]",
    "top1_over_median[resid_post.mean]",
    "l2",
    "spectral_norm",
    "weight_var",
)
DEFAULT_PHASES = ("rankme_cov[resid_post.last]", "rankme_cov[final_norm]")
DEFAULT_GROWTH = ("top1_over_median[resid_post.*]",)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasureConfig(_Section):
    """What is measured, and how the model is run."""

    steps: Annotated[
        str | None,
        Field(description="steps to measure, as 0,1,2,4..512,1000..143000:1000; absent: all"),
    ] = None
    analyzers: Annotated[
        tuple[str, ...],
        Field(
            description="analyzers to run, by name; default with source.loader: without those of attention",
            min_length=1,
        ),
    ] = DEFAULT_ANALYZERS
    parameters: Annotated[
        dict[str, dict[str, Any]], Field(description="parameters per analyzer, where not the default")
    ] = {}
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        Field(description="dtype the model runs in; statistics are float32 at least"),
    ] = "float32"
    device: Annotated[str, Field(description="'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'")] = (
        "auto"
    )
    devices: Annotated[
        tuple[str, ...],
        Field(
            description="devices of this machine instead of device, as ['cuda:0', 'cuda:1'], dealt to the "
            "workers; a worker with several splits the probe over them (docs/scaling.md)"
        ),
    ] = ()
    batch: Annotated[int, Field(description="sequences per forward pass; does not change a result", gt=0)] = (
        16
    )

    prefetch: Annotated[
        int, Field(description="checkpoints downloaded while another is measured", ge=0, le=64)
    ] = 2
    disk_gb: Annotated[
        float | None,
        Field(
            description="GB (1e9 bytes) that downloads may hold, and pools of the series where one is "
            "harvested; absent: what is needed",
            gt=0,
        ),
    ] = None
    keep: Annotated[
        bool, Field(description="keep downloads under ROOT/downloads instead of deleting each when measured")
    ] = False

    runner: Annotated[
        Literal["threads", "processes", "dask", "ray"],
        Field(description="what runs the workers, each with a share of the checkpoints (docs/scaling.md)"),
    ] = "threads"
    workers: Annotated[
        int, Field(description="workers; each holds a model and prefetch of its own", ge=1, le=4096)
    ] = 1
    address: Annotated[
        str | None,
        Field(description="a cluster that runs, as tcp://HOST:8786 or ray://HOST:10001; absent: one here"),
    ] = None
    gpus: Annotated[
        float | None,
        Field(
            description="GPUs that Dask or Ray set aside for each worker; absent: 1 where device is a GPU",
            ge=0,
        ),
    ] = None

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: str | None) -> str | None:
        if steps is not None:
            StepSelection.parse(steps)
        return steps

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if device not in ("auto", "cpu", "cuda") and not _numbered(device):
            raise ValueError(f"device {device!r} is not 'auto', 'cpu', 'cuda' or 'cuda:N'")
        return device

    @field_validator("devices")
    @classmethod
    def _devices(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        for device in devices:
            if device != "cpu" and not _numbered(device):
                raise ValueError(f"device {device!r} is not 'cpu' or 'cuda:N'")
        return devices

    @model_validator(mode="after")
    def _one_way(self) -> "MeasureConfig":
        if self.devices and self.device != "auto":
            raise ValueError(f"device is {self.device!r} and devices are given: name them in one of the two")
        if self.devices and (self.runner == "ray" or self.address is not None):
            raise ValueError("devices are given, but Ray and clusters choose those of their workers")
        return self

    @model_validator(mode="after")
    def _known(self) -> "MeasureConfig":
        for name in (*self.analyzers, *self.parameters):
            try:
                cls = find(name)
            except UnknownAnalyzerError as error:
                raise ValueError(str(error)) from None
            cls(self.parameters.get(name, {}))
        return self


def _numbered(device: str) -> bool:
    return device.startswith("cuda:") and device[5:].isdigit()


class StatesConfig(_Section):
    """Which trajectories the latent-state model reads, and how it is fitted."""

    trajectories: Annotated[
        tuple[str, ...],
        Field(
            description="metric, metric[site], metric[site.layer] or metric[site.layer.head]; layer and head "
            "are numbers, last, mean, min, max or * (each); metric and site may hold * and ?; of collinear "
            "ones the earlier in the list is kept",
            min_length=1,
        ),
    ] = DEFAULT_TRAJECTORIES
    transforms: Annotated[
        dict[str, Transform],
        Field(description="none, log, symlog or difference, per trajectory, metric or pattern"),
    ] = {"top1_over_median": "log"}
    grid: Annotated[
        Grid,
        Field(
            description="frames of a run: union (every step of any run within its span, missing where it has "
            "no checkpoint), own (its checkpoints), common (steps that all runs have)"
        ),
    ] = "union"
    min_share: Annotated[
        float,
        Field(description="a metric with values at a smaller share of checkpoints is dropped", ge=0, le=1),
    ] = 0.1
    fit: StateSettings = StateSettings()


class PhasesConfig(_Section):
    """Which trajectories the phase finder reads, and its rule (docs/phases.md)."""

    trajectories: Annotated[
        tuple[str, ...],
        Field(
            description="trajectories the phase finder reads, named as those of the states; no means",
            min_length=1,
        ),
    ] = DEFAULT_PHASES
    rule: PhaseSettings = PhaseSettings()


class GrowthConfig(_Section):
    """Which trajectories growth curves are fitted to, and how (docs/growth.md)."""

    trajectories: Annotated[
        tuple[str, ...],
        Field(
            description="trajectories of any metric: metric, metric[site], metric[site.layer], "
            "metric[site.layer.head], with * for each layer or head; no means",
            min_length=1,
        ),
    ] = DEFAULT_GROWTH
    rule: GrowthSettings = GrowthSettings()


class CurvesConfig(_Section):
    """What is fitted to single trajectories."""

    phases: PhasesConfig = PhasesConfig()
    growth: GrowthConfig = GrowthConfig()
    heads: HeadSettings = HeadSettings()


class SeriesConfig(_Section):
    """One series: where its checkpoints are, and how they are studied."""

    name: Annotated[str, Field(description="name of the series in the tables")]
    title: Annotated[str, Field(description="one line about the series")] = ""
    source: Annotated[Source, Field(description="where the checkpoints are")]
    audit: AuditConfig = AuditConfig()
    probe: ProbeConfig = ProbeConfig()
    measure: MeasureConfig = MeasureConfig()
    crosscoder: CrosscoderConfig = CrosscoderConfig()
    curves: CurvesConfig = CurvesConfig()
    states: StatesConfig = StatesConfig()

    @model_validator(mode="before")
    @classmethod
    def _own_model(cls, data: Any) -> Any:
        """The default analyzers of a model of one's own leave out what it cannot answer."""
        if not isinstance(data, dict) or not isinstance(data.get("source"), dict):
            return data
        measure = data.get("measure", {})
        if data["source"].get("loader") and isinstance(measure, dict) and "analyzers" not in measure:
            names = tuple(name for name in DEFAULT_ANALYZERS if name not in OF_TRANSFORMERS)
            return {**data, "measure": {**measure, "analyzers": names}}
        return data

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        try:
            return check_name("series", name)
        except UsageError as error:
            raise ValueError(str(error)) from None

    def to_toml(self) -> str:
        """The configuration as TOML; :func:`from_toml` reads it back to an equal one."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class StoredConfig(_Section):
    """A series of the store without a source: how its stored trajectories are studied."""

    name: Annotated[str, Field(description="name of the series in the tables")]
    curves: CurvesConfig = CurvesConfig()
    states: StatesConfig = StatesConfig()


def from_toml(text: str, where: str, overrides: Mapping[str, Any] | None = None) -> SeriesConfig:
    """Read a configuration; ``overrides`` maps ``section.key`` to the value to use instead.

    Raises:
        UsageError: not TOML, an unknown key, or a value that is not allowed; the sentence names it.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from None
    for path, value in (overrides or {}).items():
        _override(data, path, value)
    return validated(SeriesConfig, data, where)


def validated(model: type[_M], data: Any, where: str) -> _M:
    """Validate ``data`` as ``model``.

    Raises:
        UsageError: one sentence with the first offending field and value.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence with the offending value."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown setting {place!r} (value {first['input']!r})"
    if first["type"] == "missing":
        return f"setting {place!r} is missing"
    value = first["input"]
    shown = "" if isinstance(value, dict) else f" (value {value!r})"
    return f"{place}: {message}{shown}" if place else message


def parse_override(text: str) -> tuple[str, Any]:
    """``section.key=value`` into path and value; the value is TOML, a bare word a string.

    Raises:
        UsageError: there is no ``=``.
    """
    path, separator, written = text.partition("=")
    if not separator or not path:
        raise UsageError(f"override {text!r} is not section.key=value")
    try:
        return path, tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return path, written


def _override(data: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UsageError(f"override {path!r}: {section!r} is no section")
    data[key] = value


def resolve(series: str, overrides: Mapping[str, Any] | None = None) -> SeriesConfig:
    """Configuration of SERIES: a name of deploy/series, a TOML file, ``hub:OWNER/NAME`` or ``dir:PATH``.

    Raises:
        UsageError: there is no such series or file, or its configuration is not valid.
    """
    if series.startswith("hub:"):
        repo = series[4:]
        name = repo.rpartition("/")[2].replace(PLACE, "").strip("-_.")
        data = {"name": name, "source": {"kind": "hub", "repos": {"main": repo}}}
        return from_toml(tomli_w.dumps(data), series, overrides)
    if series.startswith("dir:"):
        path = Path(series[4:]).expanduser()
        data = {"name": _folder_name(path), "source": {"kind": "dir", "path": str(path)}}
        return from_toml(tomli_w.dumps(data), series, overrides)
    file = Path(series)
    if file.suffix != ".toml":
        file = SERIES_FOLDER / f"{series}.toml"
        if not file.is_file():
            names = shipped()
            near = difflib.get_close_matches(series, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"there is no series {series!r}{hint} (give one of {', '.join(names)}, a TOML file, "
                "hub:OWNER/NAME or dir:PATH)"
            )
    if not file.is_file():
        raise UsageError(f"series file {series!r} does not exist")
    return from_toml(file.read_text(encoding="utf-8"), file.name, overrides)


def resolve_stored(
    series: str, stored: Collection[str], overrides: Mapping[str, Any] | None = None
) -> SeriesConfig | StoredConfig:
    """As :func:`resolve`; SERIES may also be the name of a series in the store, of which ``stored`` are all.

    Raises:
        UsageError: as :func:`resolve`.
    """
    if series not in stored or series in shipped():
        return resolve(series, overrides)
    data: dict[str, Any] = {"name": series}
    for path, value in (overrides or {}).items():
        _override(data, path, value)
    return validated(StoredConfig, data, series)


def _folder_name(path: Path) -> str:
    """Name of a folder, or of the last one before the first wildcard: ``runs`` of ``runs/*/checkpoints``."""
    wild = [number for number, part in enumerate(path.parts) if set(part) & set("*?[")]
    if wild and not path.is_dir():
        path = Path(*path.parts[: wild[0]])
    return path.resolve().name


def shipped() -> list[str]:
    """Names of the series that come with the project."""
    return sorted(path.stem for path in SERIES_FOLDER.glob("*.toml"))


def default_root() -> str:
    """ROOT where none is given: the environment's ONTOGENY_ROOT, else a folder beside the caller."""
    return os.environ.get("ONTOGENY_ROOT", DEFAULT_ROOT)
