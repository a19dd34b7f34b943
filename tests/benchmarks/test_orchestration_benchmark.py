"""The benchmark of orchestration on tiny checkpoints, and that of a queue of them."""

import pytest

from benchmarks import orchestration, queue
from benchmarks.servers import postgresql_programs


def test_both_sides_measure_the_same_checkpoints() -> None:
    shape = orchestration.Shape(width=32, layers=1, vocabulary=300, length=16, sequences=4, steps=2, every=1)
    (line,) = orchestration.run(shape, repeats=1)
    assert line.name == "orchestration"
    assert line.notes["checkpoints"] == 3
    per = (line.seconds["ours"].median - line.seconds["against"].median) / 3
    assert line.notes["seconds_per_checkpoint"] == pytest.approx(per)
    assert line.ratio == pytest.approx(line.seconds["ours"].median / line.seconds["against"].median)


@pytest.mark.long
def test_all_checkpoints_of_a_queue_are_measured_and_the_server_goes_on() -> None:
    """Small here; ``python -m benchmarks queue`` has a thousand."""
    lines = list(queue.run(queue.Shape(checkpoints=12, waiting=5)))
    names = ["queue.sqlite", *(["queue.postgresql"] if postgresql_programs() else [])]
    assert [line.name for line in lines] == names
    for line in lines:
        assert line.ratio == line.seconds["ours"].median / line.seconds["against"].median > 0
        assert line.notes["database_bytes"] > 100_000
        assert 0 < line.notes["slowest_health"] < 60
