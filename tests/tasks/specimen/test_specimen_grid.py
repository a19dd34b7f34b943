import pytest

from tasks.specimen.grid import checkpoint_steps


@pytest.mark.parametrize(
    ("steps", "log_until", "every", "expected"),
    [
        (512, 64, 128, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]),
        (100, 8, 40, [0, 1, 2, 4, 8, 40, 80, 100]),  # the last step is always saved
        (20, 10, 5, [0, 1, 2, 4, 8, 15, 20]),  # 10 is no power of two, and not beyond log_until
        (5, 64, 32, [0, 1, 2, 4, 5]),  # shorter than the logarithmic part
        (1, 1, 1, [0, 1]),
        (6, 1, 2, [0, 1, 2, 4, 6]),
    ],
)
def test_known_grids(steps: int, log_until: int, every: int, expected: list[int]) -> None:
    assert checkpoint_steps(steps, log_until, every) == expected


def test_the_grid_of_pythia() -> None:
    steps = checkpoint_steps(143_000, 512, 1000)
    assert len(steps) == 154
    assert steps[:12] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
