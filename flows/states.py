"""Flow: fit the latent-state model of a series to its stored metrics."""

from typing import Any

from prefect import flow
from pydantic import BaseModel

from flows.config import DEFAULT_TRAJECTORIES, SeriesConfig, StoredConfig, default_root
from flows.progress import console
from storage.store import Store
from tasks.importing import all_imported_instead
from tasks.provenance import invocation
from tasks.states import StatesJob, fit_series_states


class StatesSummary(BaseModel):
    """The fitted map in short."""

    k: int
    computed: bool
    model: str
    compared: bool
    boundaries: dict[str, list[tuple[int, int, int]]]
    spreads: dict[str, list[tuple[int | None, int | None, int]]]
    refits: int | None
    remark: str | None = None


def boundaries(store: Store, series: str) -> dict[str, list[tuple[int, int, int]]]:
    """Per run, (step, from, to) of every change of state, from the newest model's table."""
    rows = store.table("states", series).to_pandas().sort_values(["run", "step"])
    found: dict[str, list[tuple[int, int, int]]] = {}
    for run, part in rows.groupby("run"):
        before = part["state"].shift()
        moved = part[(part["state"] != before) & before.notna()]
        found[str(run)] = [
            (int(step), int(left), int(state))
            for step, left, state in zip(moved["step"], before[moved.index], moved["state"], strict=True)
        ]
    return found


def spreads(
    store: Store, series: str, found: dict[str, list[tuple[int, int, int]]]
) -> dict[str, list[tuple[int | None, int | None, int]]]:
    """Per run and change of ``found``: low, high and number of the refits to resampled runs that have it.

    Empty where the newest model has no refits.
    """
    rows = {
        (row["run"], row["step"]): (row["bootstrap_low"], row["bootstrap_high"], row["bootstrap_refits"])
        for row in store.table("boundaries", series).to_pylist()
        if row["bootstrap_refits"] is not None
    }
    return {
        run: [rows[run, step] for step, _, _ in changes]
        for run, changes in found.items()
        if all((run, step) in rows for step, _, _ in changes)
    }


@flow(name="states", flow_run_name="states {config.name}")
def fit_states_of(config: SeriesConfig | StoredConfig, root: str = default_root()) -> StatesSummary:
    """Fit the model unless the newest stored one is of the same data and settings.

    Where the series has none of the default trajectories, all imported metrics are taken, and ``remark`` says
    so.
    """
    store = Store(root)
    settings = config.states
    trajectories, remark = all_imported_instead(
        store, config.name, settings.trajectories, DEFAULT_TRAJECTORIES
    )
    job = StatesJob(
        root=root,
        series=config.name,
        trajectories=trajectories,
        transforms=settings.transforms,
        grid=settings.grid,
        min_share=settings.min_share,
        fit=settings.fit,
    )
    with (
        invocation(store, config.name, "states", config.model_dump(mode="json")) as counts,
        console.status(f"states of {config.name}: fitting hidden Markov models"),
    ):
        done: dict[str, Any] = fit_series_states(job)
        counts["models_computed"] = int(done["computed"])
    models = [row for row in store.table("state_models", config.name).to_pylist() if row["chosen"]]
    found = boundaries(store, config.name)
    return StatesSummary(
        k=models[0]["k"],
        boundaries=found,
        spreads=spreads(store, config.name, found),
        refits=models[0]["bootstrap_refits"],
        model=done["model"],
        computed=done["computed"],
        compared=done["compared"],
        remark=remark,
    )
