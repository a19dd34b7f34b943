"""The benchmark of orchestration on tiny checkpoints, and a server with a thousand of them."""

from pathlib import Path

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled

from benchmarks import orchestration


def test_both_sides_measure_the_same_checkpoints() -> None:
    shape = orchestration.Shape(width=32, layers=1, vocabulary=300, length=16, sequences=4, steps=2, every=1)
    (line,) = orchestration.run(shape, repeats=1)
    assert line.name == "orchestration"
    assert line.notes["checkpoints"] == 3
    per = (line.seconds["ours"].median - line.seconds["against"].median) / 3
    assert line.notes["seconds_per_checkpoint"] == pytest.approx(per)
    assert line.ratio == pytest.approx(line.seconds["ours"].median / line.seconds["against"].median)


@task(cache_policy=NO_CACHE)
def checkpoint(number: int) -> int:
    return number


@flow
def thousand() -> int:
    return sum(checkpoint(number) for number in range(1000))


@flow
def queued(number: int) -> int:
    return number


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_server_survives_a_thousand_checkpoints(tmp_path: Path) -> None:
    """A thousand task runs of one flow run, while a thousand flow runs wait in the queue."""
    with (
        orchestration.server(tmp_path / "home") as url,
        temporary_settings({PREFECT_API_URL: url}),
        get_client(sync_client=True) as client,
    ):
        for number in range(1000):
            client.create_flow_run(queued, parameters={"number": number}, state=Scheduled())
        assert thousand() == 499500
        assert client.hello().status_code == 200
        assert queued(7) == 7
        waiting = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
        assert client.count_flow_runs(flow_run_filter=waiting) == 1000
