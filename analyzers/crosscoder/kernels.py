"""Products with features of which few are active: decode, and the gradients of features and of weights.

Three implementations of one interface. :class:`Dense` is the definition, by matrix products over all latents;
it also serves where many latents are active. :class:`Bags` gathers rows with torch's own operations, on any
device. ``compiled.Compiled`` does so in loops compiled by numba, on the CPU.

Values have one column per group: one for a shared gate, one per snapshot for a gate per snapshot. Group g
stands for the g-th equal part of a row of weights or activations.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.optim.adam import adam

_DENSE_FROM = 1 / 12
"""Share of active pairs from which matrix products are faster than gathering (measured: 9 % on two cores)."""


@dataclass(frozen=True)
class Pairs:
    """The active pairs of row and latent, ordered by rows and then latents, and sorted once by latent.

    Attributes:
        row: of each pair.
        latent: of each pair.
        row_start: the pairs of row b are those from ``row_start[b]`` to ``row_start[b + 1]``.
        by_latent: numbers of the pairs in the order of latents and then of rows.
        latent_start: the like of ``row_start`` in that order.
    """

    row: Int[Tensor, "pairs"]
    latent: Int[Tensor, "pairs"]
    row_start: Int[Tensor, "row_starts"]
    by_latent: Int[Tensor, "pairs"]
    latent_start: Int[Tensor, "latent_starts"]

    @classmethod
    def of(cls, row: Int[Tensor, "pairs"], latent: Int[Tensor, "pairs"], batch: int, latents: int) -> "Pairs":
        """From pairs that are sorted by row and then by latent, each at most once."""
        by_latent = torch.argsort(latent, stable=True)
        return cls(row, latent, _starts(row, batch), by_latent, _starts(latent, latents))

    @property
    def count(self) -> int:
        """Number of pairs."""
        return self.row.shape[0]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.row_start.shape[0] - 1

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.latent_start.shape[0] - 1


def _starts(index: Int[Tensor, "pairs"], size: int) -> Int[Tensor, "starts"]:
    return F.pad(torch.bincount(index, minlength=size).cumsum(0), (1, 0))


def sum_by_latent(pairs: Pairs, values: Float[Tensor, "pairs groups"]) -> Float[Tensor, "latents groups"]:
    """Sums of the values of each latent's pairs, always in the same order."""
    if not pairs.count:
        return values.new_zeros(pairs.latents, values.shape[1])
    return F.embedding_bag(pairs.by_latent, values, pairs.latent_start, mode="sum", include_last_offset=True)


@dataclass(frozen=True)
class Share:
    """A matrix's gradient from some active pairs: ``sum_b v_bi rows_b``."""

    pairs: Pairs
    values: Float[Tensor, "pairs groups"]
    rows: Float[Tensor, "batch inputs"]


@dataclass(frozen=True)
class Learned:
    """A parameter, and Adam's running means of its gradient and of the gradient's square."""

    weights: Tensor
    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Descent:
    """A step of Adam (Kingma and Ba 2015, algorithm 1): its rate, and its number from 1 on."""

    rate: float
    number: int

    FIRST: ClassVar = 0.9
    SECOND: ClassVar = 0.999
    EPSILON: ClassVar = 1e-8

    def apply(self, learned: Learned, gradient: Tensor) -> None:
        """Move means and weights, in one fused pass over memory."""
        steps_before = torch.tensor(self.number - 1.0, device=learned.weights.device)
        adam(
            [learned.weights],
            [gradient],
            [learned.mean],
            [learned.square],
            [],
            [steps_before],
            fused=True,
            amsgrad=False,
            beta1=self.FIRST,
            beta2=self.SECOND,
            lr=self.rate,
            weight_decay=0.0,
            eps=self.EPSILON,
            maximize=False,
        )


@runtime_checkable
class Kernels(Protocol):
    """What training needs of products with few active latents."""

    def positive(
        self,
        before: Float[Tensor, "batch latents"],
        factor: Float[Tensor, "latents"],
        least: Float[Tensor, "latents"],
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """Rows and latents, in order, where ``before`` is positive and ``before * factor >= least``."""

    def decode(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        decoder: Float[Tensor, "latents inputs"],
    ) -> Float[Tensor, "batch inputs"]:
        """``sum_i f_bi d_i``, without the bias."""

    def feature_gradient(
        self,
        pairs: Pairs,
        gradient: Float[Tensor, "batch inputs"],
        decoder: Float[Tensor, "latents inputs"],
        groups: int,
    ) -> Float[Tensor, "pairs groups"]:
        """``<gradient_b, d_i>`` within each group: what decode passes back to the values of the pairs."""

    def weight_gradient(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
        out: Float[Tensor, "latents inputs"],
        *,
        add: bool = False,
    ) -> None:
        """``sum_b v_bi rows_b`` into ``out`` (or onto it).

        With features and the reconstruction's gradient it is the decoder's gradient; with the gradients of
        the encoder's outputs and its inputs it is the encoder's.
        """

    def descend(
        self,
        share: Share,
        sums: Float[Tensor, "latents inputs"] | None,
        learned: Learned,
        descent: Descent,
    ) -> None:
        """A step of Adam with a share of the gradient, more than ``sums`` if there are any."""

    def columns(
        self, rows: Float[Tensor, "batch inputs"]
    ) -> tuple[Float64[Tensor, "inputs"], Float64[Tensor, "inputs"]]:
        """Sum of every column, and the sum of squared distances from its mean."""


class Dense:
    """The definition: every latent of every row, one matrix product for each group."""

    def positive(
        self,
        before: Float[Tensor, "batch latents"],
        factor: Float[Tensor, "latents"],
        least: Float[Tensor, "latents"],
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        """See :class:`Kernels`."""
        row, latent = torch.nonzero((before > 0) & (before * factor >= least), as_tuple=True)
        return row, latent

    def decode(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        decoder: Float[Tensor, "latents inputs"],
    ) -> Float[Tensor, "batch inputs"]:
        """See :class:`Kernels`."""
        parts = decoder.chunk(values.shape[1], dim=1)
        each = [_scatter(pairs, column) @ part for column, part in zip(values.T, parts, strict=True)]
        return torch.cat(each, dim=1)

    def feature_gradient(
        self,
        pairs: Pairs,
        gradient: Float[Tensor, "batch inputs"],
        decoder: Float[Tensor, "latents inputs"],
        groups: int,
    ) -> Float[Tensor, "pairs groups"]:
        """See :class:`Kernels`."""
        parts = zip(gradient.chunk(groups, dim=1), decoder.chunk(groups, dim=1), strict=True)
        return torch.stack([(g @ d.T)[pairs.row, pairs.latent] for g, d in parts], dim=1)

    def weight_gradient(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
        out: Float[Tensor, "latents inputs"],
        *,
        add: bool = False,
    ) -> None:
        """See :class:`Kernels`."""
        groups = values.shape[1]
        for column, part, into in zip(
            values.T, rows.chunk(groups, dim=1), out.chunk(groups, dim=1), strict=True
        ):
            into.addmm_(_scatter(pairs, column).T, part, beta=1.0 if add else 0.0)

    def descend(
        self,
        share: Share,
        sums: Float[Tensor, "latents inputs"] | None,
        learned: Learned,
        descent: Descent,
    ) -> None:
        """See :class:`Kernels`."""
        gradient = torch.empty_like(learned.weights) if sums is None else sums
        self.weight_gradient(share.pairs, share.values, share.rows, gradient, add=sums is not None)
        descent.apply(learned, gradient)

    def columns(
        self, rows: Float[Tensor, "batch inputs"]
    ) -> tuple[Float64[Tensor, "inputs"], Float64[Tensor, "inputs"]]:
        """See :class:`Kernels`."""
        sums = rows.sum(dim=0, dtype=torch.float64)
        away = rows - (sums / rows.shape[0]).float()
        return sums, away.square_().sum(dim=0, dtype=torch.float64)


def _scatter(pairs: Pairs, values: Float[Tensor, "pairs"]) -> Float[Tensor, "batch latents"]:
    dense = values.new_zeros(pairs.batch, pairs.latents)
    dense[pairs.row, pairs.latent] = values
    return dense


class Bags(Dense):
    """Weighted sums of gathered rows by ``embedding_bag``: sums run in a fixed order on every device."""

    def decode(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        decoder: Float[Tensor, "latents inputs"],
    ) -> Float[Tensor, "batch inputs"]:
        """See :class:`Kernels`."""
        return _bags(pairs.latent, pairs.row_start, values, decoder)

    def feature_gradient(
        self,
        pairs: Pairs,
        gradient: Float[Tensor, "batch inputs"],
        decoder: Float[Tensor, "latents inputs"],
        groups: int,
    ) -> Float[Tensor, "pairs groups"]:
        """See :class:`Kernels`; it is what autograd gives for the weights of the sums."""
        if not pairs.count:
            return gradient.new_zeros(0, groups)
        with torch.enable_grad():
            values = gradient.new_zeros(pairs.count, groups, requires_grad=True)
            out = self.decode(pairs, values, decoder.detach())
            (found,) = torch.autograd.grad(out, values, gradient)
        return found

    def weight_gradient(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
        out: Float[Tensor, "latents inputs"],
        *,
        add: bool = False,
    ) -> None:
        """See :class:`Kernels`."""
        sums = _bags(pairs.row[pairs.by_latent], pairs.latent_start, values[pairs.by_latent], rows)
        if add:
            out.add_(sums)
        else:
            out.copy_(sums)


def _bags(
    index: Int[Tensor, "pairs"],
    starts: Int[Tensor, "starts"],
    values: Float[Tensor, "pairs groups"],
    table: Float[Tensor, "rows inputs"],
) -> Float[Tensor, "bags inputs"]:
    """For each bag the sum of ``values * table[index]``, group by group."""
    groups, bags = values.shape[1], starts.shape[0] - 1
    if not index.shape[0]:
        return table.new_zeros(bags, table.shape[1])
    parts = table.reshape(table.shape[0] * groups, -1)
    each = [
        F.embedding_bag(
            index * groups + group,
            parts,
            starts,
            mode="sum",
            per_sample_weights=values[:, group].contiguous(),
            include_last_offset=True,
        )
        for group in range(groups)
    ]
    return torch.cat(each, dim=1) if groups > 1 else each[0]


class _Fastest:
    """Gathers where few latents are active, multiplies matrices where many are."""

    def __init__(self, sparse: Kernels) -> None:
        self.sparse, self.dense = sparse, Dense()

    def positive(
        self,
        before: Float[Tensor, "batch latents"],
        factor: Float[Tensor, "latents"],
        least: Float[Tensor, "latents"],
    ) -> tuple[Int[Tensor, "pairs"], Int[Tensor, "pairs"]]:
        return self.sparse.positive(before, factor, least)

    def _pick(self, pairs: Pairs) -> Kernels:
        return self.dense if pairs.count > _DENSE_FROM * pairs.batch * pairs.latents else self.sparse

    def decode(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        decoder: Float[Tensor, "latents inputs"],
    ) -> Float[Tensor, "batch inputs"]:
        return self._pick(pairs).decode(pairs, values, decoder)

    def feature_gradient(
        self,
        pairs: Pairs,
        gradient: Float[Tensor, "batch inputs"],
        decoder: Float[Tensor, "latents inputs"],
        groups: int,
    ) -> Float[Tensor, "pairs groups"]:
        return self._pick(pairs).feature_gradient(pairs, gradient, decoder, groups)

    def weight_gradient(
        self,
        pairs: Pairs,
        values: Float[Tensor, "pairs groups"],
        rows: Float[Tensor, "batch inputs"],
        out: Float[Tensor, "latents inputs"],
        *,
        add: bool = False,
    ) -> None:
        self._pick(pairs).weight_gradient(pairs, values, rows, out, add=add)

    def descend(
        self,
        share: Share,
        sums: Float[Tensor, "latents inputs"] | None,
        learned: Learned,
        descent: Descent,
    ) -> None:
        self._pick(share.pairs).descend(share, sums, learned, descent)

    def columns(
        self, rows: Float[Tensor, "batch inputs"]
    ) -> tuple[Float64[Tensor, "inputs"], Float64[Tensor, "inputs"]]:
        return self.sparse.columns(rows)


def kernels_for(device: torch.device) -> Kernels:
    """The fastest kernels for a device: on the CPU those of numba, elsewhere torch's own."""
    from analyzers.crosscoder.compiled import Compiled  # it builds on this module

    return _Fastest(Compiled() if device.type == "cpu" else Bags())
