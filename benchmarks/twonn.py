"""Pointwise TwoNN of a sample against scikit-dimension's ``fit_pw`` on the same rows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from analyzers.dimension import local_dimensions
from analyzers.neighbours import distinct, nearest
from benchmarks.timing import Line, Seconds, alternate, machine, now

BAR = 1 / 50


@dataclass(frozen=True)
class Shape:
    """The sample: Gaussian rows, coordinate i with standard deviation i^-1/2."""

    rows: int = 5000
    width: int = 512
    neighbours: int = 128
    fitted: int = 400


def run(shape: Shape | None = None, repeats: int = 3) -> Iterator[Line]:
    """The whole way from the rows, then the fits alone, from neighbours that both sides are given.

    Theirs are ``fitted`` of all fits, scaled up: one fit after the other is independent work of one size, so
    their time is linear in the rows fitted. The notes hold the time of half as many beside it.
    """
    from skdim._commonfuncs import get_nn
    from skdim.id import TwoNN

    shape = shape or Shape()
    torch.manual_seed(0)
    spread = torch.arange(1, shape.width + 1) ** -0.5
    rows = torch.randn(shape.rows, shape.width) * spread
    theirs = rows.double().numpy()
    centred = rows - rows.mean(dim=0)
    distance, index = nearest(rows, shape.neighbours)
    _, lists = get_nn(theirs, k=shape.neighbours)
    found: dict[str, torch.Tensor] = {}

    def whole() -> None:
        kept = rows[distinct(rows)]
        found["ours"] = local_dimensions(kept, *nearest(kept, shape.neighbours))

    def fits(count: int) -> None:
        fitted = TwoNN().fit_pw(theirs, precomputed_knn=lists[:count])
        found["theirs"] = torch.from_numpy(fitted.dimension_pw_)

    def products() -> None:
        for block in centred.split(400):
            torch.mm(block, centred.T)

    times = alternate(
        {
            "whole": whole,
            "our_fits": lambda: local_dimensions(rows, distance, index),
            "neighbours": lambda: get_nn(theirs, k=shape.neighbours),
            "half": lambda: fits(shape.fitted // 2),
            "fits": lambda: fits(shape.fitted),
            "products": products,
        },
        repeats,
    )
    scale = shape.rows / shape.fitted
    scaled = [seconds * scale for seconds in times["fits"]]
    added = [a + b for a, b in zip(times["neighbours"], scaled, strict=True)]
    count = f"{shape.fitted} of {shape.rows} fits, scaled up"
    notes = {
        "seconds_of_fits": Seconds.of(times["fits"]).median,
        "seconds_of_half_the_fits": Seconds.of(times["half"]).median,
        "largest_difference": float((found["ours"][: len(found["theirs"])] - found["theirs"]).abs().max()),
    }

    def line(name: str, ours: list[float], against: list[float], what: str, limit: dict[str, Any]) -> Line:
        seconds = {"ours": Seconds.of(ours), "against": Seconds.of(against)}
        ratio = seconds["ours"].median / seconds["against"].median
        return Line(
            name=name,
            ratio=ratio,
            against=f"scikit-dimension {what}; {count}",
            bar=BAR,
            limit={**limit, "share_reached": limit["ratio"] / ratio},
            seconds=seconds,
            repeats=repeats,
            shapes=asdict(shape),
            machine=machine(torch.device("cpu")),
            date=now(),
            notes={**notes, "times_faster": 1 / ratio},
        )

    least = Seconds.of(times["products"]).median / Seconds.of(added).median
    kind = "FLOP: the dot products of all pairs in float32 take this share of the other side's time"
    work = {"kind": kind, "flops": 2 * shape.rows**2 * shape.width, "ratio": least}
    yield line("twonn", times["whole"], added, "TwoNN.fit_pw, one process", work)
    looked = {
        "kind": "operations: 16 look-ups a member against width x neighbours products for all its distances",
        "ratio": 16 / (shape.width * shape.neighbours),
    }
    yield line("twonn.fits", times["our_fits"], scaled, "TwoNN.fit_pw, neighbours given", looked)
