"""The plan of docs/scaling.md: ``python docs/scaling_plan.py`` writes its tables anew; a test compares them.

Every number is a formula over the sizes of the models and the assumptions below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- plan: written by docs/scaling_plan.py -->\n", "<!-- end of plan -->\n"


@dataclass(frozen=True)
class Assumptions:
    """What the plan rests on; change it here, and the tables follow."""

    tokens: int = 131_072
    """Tokens of the probe: 256 sequences of 512."""
    overhead: float = 1.25
    """Forward pass with all reductions over the bare one."""
    gpu: float = 67e12
    """Peak of one GPU in float32, FLOP/s: an H100 SXM by its data sheet."""
    utilisation: float = 0.3
    """Share of the peak that is reached."""
    core: float = 10e9
    """FLOP/s of one core in float64 Gram matrices and eigenvalues."""
    cores: int = 8
    """Cores beside each GPU; one matrix is one core's."""
    line: float = 100e6
    """Bytes per second from the Hub to one machine."""
    calls: float = 10.0
    """Files per second that the Hub gives one address: 3000 in 5 minutes without a token."""
    files: int = 6
    """Files of a checkpoint that are asked for, once each."""
    price: float = 3.0
    """Dollars for an hour of a machine with one GPU, whether it is busy or waits."""


@dataclass(frozen=True)
class Model:
    """One size: its shape, how its checkpoints are stored, and how many of them there are."""

    name: str
    layers: int
    width: int
    vocabulary: int
    runs: int
    checkpoints: int
    stored: int
    """Bytes per parameter on the Hub."""
    gated: int = 0
    """Width of a gated MLP of three matrices, without biases; 0: GPT-NeoX, two matrices of width 4 d."""

    @property
    def parameters(self) -> int:
        """All of them, embedding and unembedding too."""
        d = self.width
        if self.gated:  # OLMo 2: four norms of width d per block, queries' and keys' among them
            block = 4 * d * d + 3 * d * self.gated + 4 * d
            return 2 * self.vocabulary * d + self.layers * block + d
        return 2 * self.vocabulary * d + self.layers * (12 * d * d + 13 * d) + 2 * d

    @property
    def all_checkpoints(self) -> int:
        """Of all runs."""
        return self.runs * self.checkpoints

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint."""
        return self.stored * self.parameters

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.all_checkpoints * self.checkpoint_bytes

    def gpu_seconds(self, a: Assumptions) -> float:
        """Forward passes: ``2 parameters tokens checkpoints overhead / (utilisation peak)``."""
        flop = 2.0 * self.parameters * a.tokens * self.all_checkpoints * a.overhead
        return flop / (a.utilisation * a.gpu)

    def core_flop(self) -> float:
        """Float64 work on the processor for one checkpoint, analyzers ``spectra`` and ``weights``.

        Eigenvalues of a symmetric matrix of width d: ``4/3 d^3``. ``spectra`` takes four (all, raw, two
        halves) at each of ``layers + 2`` sites; ``weights`` one per matrix. Its Gram matrix of an m x n
        matrix costs ``max(m, n) min(m, n)^2``.
        """
        d = self.width
        matrices = 4 * [d] + (3 * [self.gated] if self.gated else 2 * [4 * d])
        eigen = 4 / 3 * d**3 * (4 * (self.layers + 2) + self.layers * len(matrices))
        return eigen + self.layers * sum(long * d * d for long in matrices)

    def cpu_seconds(self, a: Assumptions) -> float:
        """That work of all checkpoints on all cores of one machine."""
        return self.core_flop() * self.all_checkpoints / (a.core * a.cores)

    def line_seconds(self, a: Assumptions) -> float:
        """The longer of ``bytes / line`` and ``checkpoints files / calls``."""
        return max(self.bytes / a.line, self.all_checkpoints * a.files / a.calls)

    def table_bytes(self) -> int:
        """The table ``spectra``, by far the largest: four spectra of d float64 at ``layers + 2`` sites."""
        return self.all_checkpoints * 4 * (self.layers + 2) * self.width * 8

    def disk_bytes(self) -> int:
        """Downloads of one worker: the one measured, two ahead, and the first and the previous."""
        return 5 * self.checkpoint_bytes

    def alone_seconds(self, a: Assumptions) -> float:
        """One worker: downloads go on beside the rest, but its pass and its decompositions take turns.

        Up to width 2048 its decompositions are one core's (analyzers/eigen.py).
        """
        cores = a.cores if self.width <= 2048 else 1
        return max(self.line_seconds(a), self.gpu_seconds(a) + cores * self.cpu_seconds(a))


def limit(model: Model, a: Assumptions) -> tuple[str, float]:
    """Which of download, GPU and processor takes longest, and how long.

    With as many workers as cores they work at the same time, each for another worker.
    """
    times = {
        "download": model.line_seconds(a),
        "GPU": model.gpu_seconds(a),
        "processor": model.cpu_seconds(a),
    }
    name = max(times, key=times.__getitem__)
    return name, times[name]


POLYPYTHIAS = tuple(
    Model(f"pythia-{name}", layers, width, 50304, runs=10, checkpoints=154, stored=2)
    for name, layers, width in (
        ("14m", 6, 128),
        ("31m", 6, 256),
        ("70m", 6, 512),
        ("160m", 12, 768),
        ("410m", 24, 1024),
    )
)
OLMO = Model("OLMo-2-7B", 32, 4096, 100352, runs=1, checkpoints=929, stored=4, gated=11008)
OLMO_TENTH = Model("OLMo-2-7B, every 10th", 32, 4096, 100352, runs=1, checkpoints=93, stored=4, gated=11008)


def rows(a: Assumptions) -> list[list[str]]:
    """One line per size, and one for all PolyPythias together."""
    found = []
    for model in (*POLYPYTHIAS, OLMO_TENTH, OLMO):
        name, seconds = limit(model, a)
        parts = (model.line_seconds(a), model.gpu_seconds(a), model.cpu_seconds(a))
        times = (*parts, model.alone_seconds(a), seconds)
        size = (model.all_checkpoints, model.bytes, model.disk_bytes(), model.table_bytes())
        found.append(_row(model.name, f"{model.parameters:,}", size, times, name, a))
        if model is POLYPYTHIAS[-1]:
            found.append(_together(a))
    return found


def _together(a: Assumptions) -> list[str]:
    times = [
        sum(seconds)
        for seconds in zip(
            *(
                (m.line_seconds(a), m.gpu_seconds(a), m.cpu_seconds(a), m.alone_seconds(a), limit(m, a)[1])
                for m in POLYPYTHIAS
            ),
            strict=True,
        )
    ]
    size = (
        sum(m.all_checkpoints for m in POLYPYTHIAS),
        sum(m.bytes for m in POLYPYTHIAS),
        max(m.disk_bytes() for m in POLYPYTHIAS),
        sum(m.table_bytes() for m in POLYPYTHIAS),
    )
    return _row("all PolyPythias", "", size, times, "", a)


def _row(
    name: str, parameters: str, size: Sequence[int], times: Sequence[float], what: str, a: Assumptions
) -> list[str]:
    checkpoints, total, disk, tables = size
    hours = [f"{seconds / 3600:.2f}" for seconds in times]
    cost = f"{times[-1] / 3600 * a.price:,.2f}"
    gigabytes = [f"{number / 1e9:,.2f}" for number in (total, disk, tables)]
    return [name, parameters, f"{checkpoints:,}", *gigabytes, *hours, what, cost]


def plan(a: Assumptions | None = None) -> str:
    """The tables between the markers of the page."""
    a = a or Assumptions()
    head = (
        "| model | parameters | checkpoints | download, GB | disk per worker, GB | spectra, GB | download, h "
        "| GPU, h | processor, h | one worker, h | many workers, h | limit | $ |"
    )
    lines = [head, "|---|" + 12 * "---|", *(f"| {' | '.join(row)} |" for row in rows(a))]
    given = [
        "| assumption | value |",
        "|---|---|",
        f"| T: tokens of the probe | {a.tokens:,} (256 x 512) |",
        f"| o: pass with reductions over a bare one | {a.overhead} |",
        f"| F: peak of the GPU, float32 | {a.gpu / 1e12:g} TFLOP/s |",
        f"| u: share of it reached | {a.utilisation} |",
        f"| f: one core, float64 Gram matrices and eigenvalues | {a.core / 1e9:g} GFLOP/s |",
        f"| c: cores beside the GPU | {a.cores} |",
        f"| r: from the Hub to one machine | {a.line / 1e6:g} MB/s |",
        f"| q: files from the Hub to one address | {a.calls:g} per second |",
        f"| n: files of a checkpoint | {a.files} |",
        f"| p: a machine with one GPU | ${a.price:.2f} per hour |",
    ]
    return "\n".join([*given, "", *lines]) + "\n"


def page(text: str) -> str:
    """The page with the plan as it is now."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + plan() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
