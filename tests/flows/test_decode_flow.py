"""A run that is going on, decoded by the command line with the model of another series."""

from pathlib import Path

import numpy as np
import pytest
from flow_support import Cli

from storage import Store, open_root

STEPS = tuple(range(0, 300, 10))


def put(store: Store, series: str, run: int, steps: tuple[int, ...], odd: int | None = None) -> None:
    """Loss and norm with two states that change at step 150; at step ``odd`` the loss is 9."""
    rows = []
    for step in steps:
        rng = np.random.default_rng([run, step])
        late = step >= 150
        for metric, mean in (("loss", 2.0 if late else 5.0), ("norm", 80.0 if late else 10.0)):
            value = 9.0 if (metric, step) == ("loss", odd) else mean * np.exp(0.02 * rng.normal())
            rows.append(
                {"step": step, "metric": metric, "value": value, "analyzer": "import", "protocol": "p"}
            )
    store.write("metrics", rows, series=series, run=f"seed{run}", name=f"{steps[0]}-{steps[-1]}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    root = tmp_path_factory.mktemp("decoded")
    store = Store(root)
    for run in range(4):
        put(store, "old", run, STEPS)
    small = ("states.fit.k_max=2", "states.fit.restarts=4", 'states.trajectories=["loss", "norm"]')
    done = cli("states", "old", "--root", str(root), *(word for each in small for word in ("--set", each)))
    assert done.returncode == 0, done.stderr
    put(store, "going", 8, STEPS[:20])
    put(store, "going", 9, STEPS[:20], odd=190)
    return root


def test_the_newest_checkpoint_of_every_run_is_read(root: Path, cli: Cli) -> None:
    done = cli("decode", "going", "--of", "old", "--root", str(root))
    assert (done.returncode, done.stderr) == (0, "")
    assert "of series old (2 states): 40 checkpoints decoded now." in " ".join(done.stdout.split())
    assert "seed9, step 190: new: no state explains it (" in done.stdout
    assert "loss is 9, the state's mean 5.0" in done.stdout
    assert "seed8, step 190" not in done.stdout
    rows = open_root(root).table("online_states", "going").to_pandas()
    assert len(rows) == 40
    assert set(rows["model_series"]) == {"old"}
    normal = rows[(rows["run"] == "seed8")]
    assert (normal["state"] == (normal["step"] >= 150)).all()
    # Nothing is decoded twice, and a new checkpoint alone is read on from where the run was.
    put(open_root(root), "going", 8, STEPS[20:21])
    done = cli("decode", "going", "--of", "old", "--run", "seed8", "--root", str(root))
    assert " 1 checkpoints decoded" in " ".join(done.stdout.split())
    again = open_root(root).table("online_states", "going").to_pandas()
    kept = again.merge(rows, on=["run", "step", "surprise", "inputs", "recorded_at"])
    assert len(kept) == 40
    provenance = open_root(root).table("provenance", "going").to_pandas()
    assert set(provenance["command"]) == {"decode"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("going",), "no states of series 'going'"),
        (("going", "--of", "old", "--model", "0000"), "no model '0000' of series 'old'"),
        (("going", "--of", "old", "--run", "seed5"), "no run 'seed5' (it has seed8, seed9)"),
    ],
)
def test_what_cannot_be_decoded_is_one_sentence(
    root: Path, cli: Cli, arguments: tuple[str, ...], message: str
) -> None:
    done = cli("decode", *arguments, "--root", str(root))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
