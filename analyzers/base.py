"""What an analyzer is: a name, a version, parameters, documented metrics, and a function to rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64
from pydantic import BaseModel, ConfigDict, Field

from analyzers.reductions import Spec, State


@dataclass(frozen=True)
class Metric:
    """Documentation of one metric; docs/metrics.md is generated from it."""

    name: str
    formula: str
    unit: str
    range: str
    reference: str


@dataclass(frozen=True)
class Row:
    """One number at one place. A value that is None or not finite is stored as absent, with a note."""

    metric: str
    value: float | None
    n: int
    site: str | None = None
    layer: int | None = None
    head: int | None = None
    note: str | None = None


def attempted(
    metric: str, compute: Callable[[], float], n: int, site: str | None = None, layer: int | None = None
) -> Row:
    """The row of a value; where ``compute`` raises a ValueError, one without a value and with that reason."""
    try:
        return Row(metric, compute(), n, site, layer)
    except ValueError as error:
        return Row(metric, None, n, site, layer, note=str(error))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in descending order, of the covariance (``centered``) or the raw second moment."""

    site: str
    layer: int | None
    half: str
    centered: bool
    n: int
    eigenvalues: Float64[np.ndarray, "rank"]


@dataclass(frozen=True)
class SequenceValues:
    """A metric on single sequences, by their numbers within the probe; NaN where one has no value."""

    metric: str
    site: str | None
    layer: int | None
    sequences: Int64[np.ndarray, "sequences"]
    values: Float64[np.ndarray, "sequences"]
    head: int | None = None


@dataclass
class Result:
    """All that an analyzer says about one checkpoint."""

    rows: list[Row] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    sequence_values: list[SequenceValues] = field(default_factory=list)


class Parameters(BaseModel):
    """Parameters of an analyzer: part of the protocol, hence of the key."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@runtime_checkable
class ModelShape(Protocol):
    """What an analyzer may know of a model before the pass."""

    layers: int
    width: int


@runtime_checkable
class WeightMatrices(Protocol):
    """The weights of one checkpoint, read one tensor at a time."""

    def matrices(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(site, layer, 2-D weight) of every measured matrix; a fused Q, K, V comes as three."""
        ...

    def biases(self) -> Iterator[torch.Tensor]:
        """Bias vectors of those matrices."""
        ...

    def heads(self) -> Mapping[str, int]:
        """Number of heads by site, for those of ``attention.query``, ``.key``, ``.value`` and ``.output``.

        Grouped keys and values have fewer. Empty where the numbers are not known.
        """
        ...


Reference = Literal["first", "previous", "last"]
"""Another checkpoint of the run: its first, the one before, its last."""

REFERENCES: Mapping[Reference, str] = {
    "first": "the run's first checkpoint",
    "previous": "the previous checkpoint measured",
    "last": "the run's last checkpoint",
}
"""How the formulas of comparing metrics name them."""


class Analyzer(ABC):
    """Base of all analyzers. Subclasses are registered by :func:`analyzers.registry.register`."""

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    metrics: ClassVar[Sequence[Metric]]
    parameters_type: ClassVar[type[Parameters]] = Parameters

    def __init__(self, parameters: Parameters | Mapping[str, Any] | None = None) -> None:
        if not isinstance(parameters, Parameters):
            parameters = self.parameters_type.model_validate(dict(parameters or {}))
        self.parameters = parameters

    @property
    def against(self) -> tuple[Reference, ...]:
        """Checkpoints of the run that it compares with."""
        return ()


@runtime_checkable
class TokenSource(Protocol):
    """Tokens that an analyzer draws itself; hashable, equal when they are the same tokens."""

    @property
    def size(self) -> tuple[int, int]:
        """Number of sequences and their length, known without a model."""
        ...

    def draw(self, shape: ModelShape) -> Int64[torch.Tensor, "sequences length"]:
        """The tokens for a model.

        Raises:
            ValueError: the model's vocabulary does not allow it, or is not known.
        """
        ...


class PassAnalyzer(Analyzer):
    """Reads what the one pass over the probe streams into reductions."""

    @property
    def tokens(self) -> TokenSource | None:
        """Tokens of its own, which cost a pass of their own; None: the probe. Comparisons read the probe.

        Equal sources share a pass. What they are must follow from the parameters: the probe is then no part
        of the key.
        """
        return None

    @abstractmethod
    def needs(self, shape: ModelShape) -> list[Spec]:
        """Reductions this analyzer reads; equal ones are shared between analyzers."""


class ActivationAnalyzer(PassAnalyzer):
    """Measures the activations of one checkpoint."""

    @abstractmethod
    def measure(self, states: Mapping[Spec, State], shape: ModelShape) -> Result:
        """Rows from the finished reductions."""


class WeightAnalyzer(Analyzer):
    """Measures weights, tensor by tensor, without a forward pass."""

    @abstractmethod
    def measure_weights(self, weights: WeightMatrices) -> Result:
        """Rows from the weights."""


class ComparisonParameters(Parameters):
    """What a checkpoint is compared with."""

    against: Annotated[
        tuple[Reference, ...],
        Field(
            description="checkpoints of the run: its first, the previous of those measured, its last",
            min_length=1,
        ),
    ] = ("first", "previous")


class _Comparison(Analyzer):
    parameters: ComparisonParameters

    @property
    def against(self) -> tuple[Reference, ...]:
        """Checkpoints of the run that it compares with."""
        return self.parameters.against


class ActivationComparison(PassAnalyzer, _Comparison):
    """Compares the activations of a checkpoint with those of others on the same probe."""

    @abstractmethod
    def compare(
        self,
        states: Mapping[Spec, State],
        others: Mapping[Reference, Mapping[Spec, State]],
        shape: ModelShape,
    ) -> Result:
        """Rows from the finished reductions of both; a reference that there is not is not in ``others``."""


class WeightComparison(_Comparison):
    """Compares the weights of a checkpoint with those of others."""

    @abstractmethod
    def compare_weights(self, weights: WeightMatrices, others: Mapping[Reference, WeightMatrices]) -> Result:
        """Rows from the weights of both; a reference that there is not is not in ``others``."""
