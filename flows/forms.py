"""Forms of the deployments: what a person fills in on Prefect's page instead of a series file."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from analyzers.latent import Grid
from analyzers.registry import load_all
from flows.config import SeriesConfig, StoredConfig, default_root, parse_override, resolve, resolve_stored
from storage.errors import UsageError
from storage.store import Store

AnalyzerName = Annotated[str, Field(json_schema_extra={"enum": list(load_all())})]
SeriesName = Annotated[
    str,
    Field(
        description="a name of deploy/series, a TOML file on the worker, hub:OWNER/NAME, or dir:PATH",
        examples=["specimen", "pythia-70m", "hub:EleutherAI/pythia-14m"],
    ),
]
# The server checks a form by its schema before it stores the run: a login in an address, which would stay in
# its database among the run's parameters, is refused. As storage.secrets.LOGIN; pydantic has no look-ahead.
_NO_LOGIN = {"pattern": r"""^(?![\s\S]*://[^/\s@'"]+@)"""}


def _series_first(schema: dict[str, Any]) -> None:
    """What every form inherits is shown last."""
    fields = schema["properties"]
    schema["properties"] = {k: v for k, v in fields.items() if k not in _LAST} | {
        k: fields[k] for k in _LAST if k in fields
    }


_LAST = ("settings", "root")


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_series_first)


class RootForm(_Form):
    """Where the tables are."""

    root: Annotated[
        str | None,
        Field(
            description="folder or URL of the store; absent: the worker's ONTOGENY_ROOT, else ontogeny-data",
            json_schema_extra=_NO_LOGIN,
        ),
    ] = None

    @property
    def store(self) -> str:
        """The root, the worker's own where the form names none."""
        return self.root or default_root()


class ReportForm(RootForm):
    """Which series a page is written about."""

    series: Annotated[str, Field(description="name of a series in the store, or one of deploy/series")]


class _SettingsForm(RootForm):
    settings: Annotated[
        list[Annotated[str, Field(json_schema_extra=_NO_LOGIN)]],
        Field(description="any other setting of docs/config.md, one SECTION.KEY=VALUE per line"),
    ] = []

    @field_validator("settings")
    @classmethod
    def _readable(cls, settings: list[str]) -> list[str]:
        try:
            for text in settings:
                parse_override(text)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return settings

    def overrides(self) -> dict[str, Any]:
        """What the form says otherwise than the series file; a field left empty says nothing."""
        return dict(parse_override(text) for text in self.settings)


class AuditForm(_SettingsForm):
    """Which checkpoints are listed and judged."""

    series: SeriesName
    steps: Annotated[
        str | None, Field(description="steps to take, as 0,1,2,4..512,1000..143000:1000; absent: all")
    ] = None

    def overrides(self) -> dict[str, Any]:
        """As above, with the steps."""
        chosen = {} if self.steps is None else {"measure.steps": self.steps}
        return super().overrides() | chosen

    def config(self) -> SeriesConfig:
        """The configuration of the series, with what the form says otherwise.

        Raises:
            UsageError: there is no such series, or a setting is not valid.
        """
        return resolve(self.series, self.overrides())


class MeasureForm(AuditForm):
    """Which checkpoints are measured, by what, and how."""

    analyzers: Annotated[
        list[AnalyzerName], Field(description="analyzers to run; none chosen: those of the series file")
    ] = []
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"] | None,
        Field(description="dtype the model runs in; absent: that of the series file"),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        Field(description="auto is a GPU if there is one; absent: that of the series file"),
    ] = None
    batch: Annotated[
        int | None, Field(description="sequences per forward pass; does not change a result", gt=0)
    ] = None
    disk_gb: Annotated[
        float | None, Field(description="GB (1e9 bytes) that downloads may hold; absent: no bound", gt=0)
    ] = None
    keep: Annotated[
        bool, Field(description="keep downloads on the worker instead of deleting each once measured")
    ] = False
    harvest: Annotated[
        bool, Field(description="also fill the pool that a crosscoder is trained on (docs/harvest.md)")
    ] = False

    def overrides(self) -> dict[str, Any]:
        """As above, with the fields of measuring."""
        given: dict[str, Any] = {
            "measure.dtype": self.dtype,
            "measure.device": self.device,
            "measure.batch": self.batch,
            "measure.disk_gb": self.disk_gb,
            "measure.analyzers": self.analyzers or None,
            "measure.keep": self.keep or None,
            "crosscoder.harvest": self.harvest or None,
        }
        return super().overrides() | {key: value for key, value in given.items() if value is not None}


class StatesForm(_SettingsForm):
    """Which stored trajectories the state model is fitted to."""

    series: Annotated[str, Field(description="name of a series in the store, or one of deploy/series")]
    trajectories: Annotated[
        list[str],
        Field(description="trajectories, as loss or rankme_cov[resid_post.last]; none: the default ones"),
    ] = []
    grid: Annotated[
        Grid | None,
        Field(description="steps of the fit: the union of those of all runs, each run's own, or common"),
    ] = None
    k_max: Annotated[
        int | None, Field(description="largest number of states tried; absent: 8", ge=1, le=100)
    ] = None

    def overrides(self) -> dict[str, Any]:
        """As above, with the fields of the fit."""
        given: dict[str, Any] = {
            "states.trajectories": self.trajectories or None,
            "states.grid": self.grid,
            "states.fit.k_max": self.k_max,
        }
        return super().overrides() | {key: value for key, value in given.items() if value is not None}

    def config(self) -> SeriesConfig | StoredConfig:
        """The configuration of the fit.

        Raises:
            UsageError: there is no such series, or a setting is not valid.
        """
        return resolve_stored(self.series, Store(self.store).series(), self.overrides())


class WatchForm(RootForm):
    """Which series are looked at for new checkpoints, and by which model."""

    series: Annotated[
        str | None,
        Field(description="a series of the store; absent: all that were measured, each as it was last"),
    ] = None
    of: Annotated[
        str | None,
        Field(description="series of the store whose state model decodes; absent: the series' own"),
    ] = None
    model: Annotated[
        str | None, Field(description="first digits of the model's identity; absent: the newest model")
    ] = None
