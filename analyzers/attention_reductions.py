"""What is kept of attention rows and of token norms: sums per head, in float64. Padding never enters."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from analyzers.adapters import ATTENTION, VALUE_NORM
from analyzers.attention_blocks import QueryBlock
from analyzers.reductions import Batch, ranks, real


def _flag(condition: Tensor, of: Tensor) -> Tensor:
    """1 where a condition on ``of`` holds, 0 where not, NaN where ``of`` is NaN: NaN is no answer."""
    return torch.where(of.isnan(), of, condition.to(of.dtype))


def _kept(values: Tensor, where: Tensor) -> Tensor:
    """Values, 0 where they do not count: those of padding may be anything."""
    return torch.where(where, values, torch.zeros((), dtype=values.dtype, device=values.device))


# --- rows ---------------------------------------------------------------------------------------------------

ROW_MEANS = ("entropy", "normalised", "collapsed", "log_sum_exp", "previous")


class RowsState:
    """Sums over rows ``i >= 1`` of every head, and the largest logit of all rows.

    They stay on the device of the blocks until they are read: a copy to the host waits for all that the
    device has yet to do, and blocks are many.
    """

    knows_padding = True

    def __init__(self, collapse: float) -> None:
        self.collapse = collapse
        self.rows = 0
        self._repeats: Tensor | None = None
        self._sums: Tensor | None = None
        self._duplicate: Tensor | None = None
        self._maximum: Tensor | None = None

    def update(self, values: QueryBlock, batch: Batch) -> None:
        """Take a block of rows in."""
        block, device = values, values.maximum.device
        mask = real(batch)
        queries = slice(block.query, block.query + block.maximum.shape[2])
        kept = mask[:, queries]
        later = kept & (ranks(mask)[:, queries] >= 1)
        self.rows += int(later.sum())  # the mask is on the host
        counted = later.to(device)[:, None]

        normalised = block.entropy / block.visible.to(block.entropy.dtype).log()[:, None]
        rows = (
            block.entropy,
            normalised,
            _flag(normalised < self.collapse, normalised),
            block.log_sum_exp,
            band(block, 1),
        )
        sums = torch.stack([_kept(each, counted).sum((0, 2), dtype=torch.float64) for each in rows])
        largest = torch.where(kept.to(device)[:, None], block.maximum, -torch.inf).amax((0, 2)).double()
        repeats, duplicate = _duplicates(block, batch.tokens.to(device), kept.to(device))
        self._add(sums, duplicate, largest, repeats)

    def _add(self, sums: Tensor, duplicate: Tensor, maximum: Tensor, repeats: Tensor) -> None:
        self._sums = sums if self._sums is None else self._sums + sums
        self._duplicate = duplicate if self._duplicate is None else self._duplicate + duplicate
        self._maximum = maximum if self._maximum is None else torch.maximum(self._maximum, maximum)
        self._repeats = repeats if self._repeats is None else self._repeats + repeats

    @property
    def repeats(self) -> int:
        """Rows that have an earlier place of their token in sight."""
        return 0 if self._repeats is None else int(self._repeats)

    def merge(self, other: "RowsState") -> None:
        """Take in the sums of other sequences."""
        theirs = (other._sums, other._duplicate, other._maximum, other._repeats)
        if theirs[0] is not None:
            device = theirs[0].device if self._sums is None else self._sums.device
            self._add(*(each.to(device) for each in theirs if each is not None))
        self.rows += other.rows

    def means(self) -> dict[str, Float64[Tensor, "heads"]]:
        """Means over rows, by the names of ``ROW_MEANS``; NaN without rows; empty if no block came."""
        if self._sums is None:
            return {}
        return dict(zip(ROW_MEANS, self._sums.cpu() / self.rows, strict=True))

    @property
    def duplicate(self) -> Float64[Tensor, "heads"]:
        """Mean attention to earlier places of the query's token, over queries that have such a place."""
        return torch.zeros(0) if self._duplicate is None else self._duplicate.cpu() / self.repeats

    @property
    def maximum(self) -> Float64[Tensor, "heads"]:
        """The largest logit."""
        return torch.zeros(0, dtype=torch.float64) if self._maximum is None else self._maximum.cpu()


def band(block: QueryBlock, distance: int) -> Float[Tensor, "batch heads queries"]:
    """``A[i, i - distance]``; 0 where there is no such key, or it is out of the window."""
    offset = block.query - distance - block.key
    found = block.probabilities.diagonal(offset, -2, -1)
    return torch.nn.functional.pad(found, (block.maximum.shape[2] - found.shape[-1], 0))


def _duplicates(
    block: QueryBlock, tokens: Int64[Tensor, "batch time"], kept: Bool[Tensor, "batch queries"]
) -> tuple[Int64[Tensor, ""], Float64[Tensor, "heads"]]:
    """Queries with an earlier place of their token in sight, and the attention to such places, summed."""
    batch, heads, queries, keys = block.probabilities.shape
    mine = tokens[:, block.query : block.query + queries]
    equal = (
        (mine[:, :, None] == tokens[:, None, block.key : block.key + keys]) & block.mask & kept[:, :, None]
    )
    equal.diagonal(block.query - block.key, -2, -1).fill_(False)
    # One product per sequence: all heads at once read their rows a single time.
    weights = equal.to(block.probabilities.dtype).view(batch, queries * keys, 1)
    sums = block.probabilities.view(batch, heads, queries * keys) @ weights
    return equal.any(-1).sum(), sums.squeeze(-1).double().sum(0)


@dataclass(frozen=True)
class RowsSpec:
    """Entropy, logits and the previous-token and duplicate-token scores of a layer's attention rows."""

    layer: int | None
    collapse: float
    site: str = ATTENTION

    def create(self) -> RowsState:
        """An empty state."""
        return RowsState(self.collapse)


# --- attention received -------------------------------------------------------------------------------------


@dataclass
class Mean:
    """Sum of vectors over sequences, and their number."""

    n: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, values: Float[Tensor, "sequences size"]) -> None:
        """Take sequences in."""
        self.n += values.shape[0]
        self.total = self.total + values.sum(0, dtype=torch.float64).cpu()

    def merge(self, other: "Mean") -> None:
        """Take in other sequences."""
        self.n += other.n
        self.total = self.total + other.total

    @property
    def value(self) -> Float64[Tensor, "..."] | None:
        """The mean; None if no sequence came."""
        return self.total / self.n if self.n else None


@dataclass(frozen=True)
class SinkSpec:
    """Attention that keys receive in a layer: on the first tokens, on the most attended one, on the sink.

    The mass of the first ``positions`` tokens is kept. ``position`` is the sink's, and the sink rate is that
    of the first ``rate_length`` tokens. A head is dormant on a sequence if the queries after the sink put at
    least ``dormant`` of their attention there.
    """

    layer: int | None
    positions: int
    position: int
    rate_length: int
    rate_threshold: float
    dormant: float
    site: str = ATTENTION

    def create(self) -> "SinkState":
        """An empty state."""
        return SinkState(self)


class SinkState:
    """Means over sequences of the attention that keys receive; every mean is per head.

    ``mass[k]`` over sequences longer than ``k``; ``rate`` over those of at least ``rate_length`` tokens;
    ``top`` and ``top_at_sink`` over all; ``dormant`` by domain, None for all together, over those that go on
    after the sink.
    """

    knows_padding = True

    def __init__(self, spec: SinkSpec) -> None:
        self.spec = spec
        self.sequences = 0
        self.mass = [Mean() for _ in range(spec.positions)]
        self.top, self.top_at_sink, self.rate = Mean(), Mean(), Mean()
        self.dormant: dict[str | None, Mean] = {None: Mean()}
        self._received: Tensor | None = None
        self._early: Tensor | None = None
        self._after: Tensor | None = None

    def update(self, values: QueryBlock, batch: Batch) -> None:
        """Take a block of rows in; the last one of its sequences closes them."""
        block, p = values, values.probabilities
        mask = real(batch)
        rank = ranks(mask).to(p.device)
        mask = mask.to(p.device)
        if block.query == 0:
            shape = (p.shape[0], p.shape[1])
            self._received = torch.zeros(*shape, mask.shape[1], dtype=torch.float64, device=p.device)
            self._early = torch.zeros(shape, dtype=torch.float64, device=p.device)
            self._after = torch.zeros(shape, dtype=torch.float64, device=p.device)
        assert self._received is not None
        assert self._early is not None
        assert self._after is not None
        queries = slice(block.query, block.query + p.shape[2])
        counted = mask[:, queries]
        weights = counted.to(p.dtype)[:, None, None]
        self._received[..., block.key : block.key + p.shape[3]] += (weights @ p).squeeze(2)

        sink = (rank == self.spec.position) & mask
        column = sink.long().argmax(1) - block.key
        inside = sink.any(1) & (column >= 0) & (column < p.shape[3])
        place = column.clamp(0, p.shape[3] - 1)[:, None, None, None]
        to_sink = p.gather(3, place.expand(-1, *p.shape[1:3], 1)).squeeze(3)
        row = rank[:, queries]
        counted = counted & inside[:, None]
        early = counted & (row < self.spec.rate_length)
        after = counted & (row > self.spec.position)
        self._early += _kept(to_sink, early[:, None]).sum(-1, dtype=torch.float64)
        self._after += _kept(to_sink, after[:, None]).sum(-1, dtype=torch.float64)
        if block.last:
            self._close(mask, batch, self._received, self._early, self._after)
            self._received = self._early = self._after = None

    def _close(
        self,
        mask: Bool[Tensor, "batch time"],
        batch: Batch,
        received: Float64[Tensor, "batch heads time"],
        early: Float64[Tensor, "batch heads"],
        after: Float64[Tensor, "batch heads"],
    ) -> None:
        spec, length = self.spec, mask.sum(1)
        start = mask.long().argmax(1)
        some = length > 0
        self.sequences += int(some.sum())
        for k, mean in enumerate(self.mass):
            long = length > k
            place = (start[long] + k)[:, None, None].expand(-1, received.shape[1], 1)
            mean.add(received[long].gather(2, place).squeeze(2) / (length[long] - k)[:, None])

        best = received.max(2)
        place = best.indices - start[:, None]
        self.top.add((best.values / (length[:, None] - place))[some])
        self.top_at_sink.add(_flag(place == spec.position, best.values)[some])

        long = length >= spec.rate_length
        alpha = early[long] / (spec.rate_length - spec.position)
        self.rate.add(_flag(alpha > spec.rate_threshold, alpha))

        long = length > spec.position + 1
        share = after / (length - 1 - spec.position).clamp(min=1)[:, None]
        dormant = _flag(share >= spec.dormant, share)
        self.dormant[None].add(dormant[long])
        labels = batch.domains or (None,) * len(long)
        for domain in sorted({label for label in labels if label is not None}):
            of_domain = torch.tensor([label == domain for label in labels], device=long.device)
            self.dormant.setdefault(domain, Mean()).add(dormant[long & of_domain])

    def merge(self, other: "SinkState") -> None:
        """Take in the means of other sequences."""
        self.sequences += other.sequences
        pairs = [*zip(self.mass, other.mass, strict=True), (self.top, other.top), (self.rate, other.rate)]
        for mine, theirs in (*pairs, (self.top_at_sink, other.top_at_sink)):
            mine.merge(theirs)
        for domain, mean in other.dormant.items():
            self.dormant.setdefault(domain, Mean()).merge(mean)


# --- the norm of one token ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenNormSpec:
    """Norm of the token at ``position``, and its ratio to the mean or the median over the other tokens.

    At ``value_norm`` the norms are those of every head, elsewhere of the activation.
    """

    site: str
    layer: int | None
    position: int
    median: bool

    def create(self) -> "TokenNormState":
        """An empty state."""
        return TokenNormState(self)


class TokenNormState:
    """Means over sequences, per head where there are heads: the norm, that of others, and their ratio."""

    knows_padding = True

    def __init__(self, spec: TokenNormSpec) -> None:
        self.spec = spec
        self.norm, self.others, self.ratio = Mean(), Mean(), Mean()

    def update(self, values: Float[Tensor, "batch time width"], batch: Batch) -> None:
        """Take a batch in. The median is the lower one."""
        mask = real(batch).to(values.device)
        norms = values if self.spec.site == VALUE_NORM else values.norm(dim=2, keepdim=True)
        chosen = (ranks(mask.cpu()).to(values.device) == self.spec.position) & mask
        use = chosen.any(1) & (mask.sum(1) > 1)
        norms, chosen, mask = norms[use].double(), chosen[use], mask[use]
        if norms.shape[0] == 0:
            return
        norm = norms[chosen]
        rest = (mask & ~chosen)[:, :, None]
        if self.spec.median:
            # Places that do not count go to the end, so the lower median stays where it is.
            ordered = torch.where(rest, norms, torch.inf).sort(1).values
            middle = ((rest.sum(1) - 1) // 2)[:, None].expand(-1, 1, norms.shape[2])
            others = ordered.gather(1, middle).squeeze(1)
            broken = (norms.isnan() & rest).any(1)
            others = torch.where(broken, torch.nan, others)
        else:
            others = _kept(norms, rest).sum(1) / rest.sum(1)
        self.norm.add(norm)
        self.others.add(others)
        self.ratio.add(norm / others)

    def merge(self, other: "TokenNormState") -> None:
        """Take in the means of other sequences."""
        self.norm.merge(other.norm)
        self.others.merge(other.others)
        self.ratio.merge(other.ratio)


def by_domain(means: Mapping[str | None, Mean]) -> dict[str, Mean]:
    """Means of labelled sequences, in order of the label."""
    return {name: means[name] for name in sorted(label for label in means if label is not None)}
