"""The steps at which a run is saved: dense on a logarithm at first, then evenly spaced."""


def checkpoint_steps(steps: int, log_until: int, every: int) -> list[int]:
    """Steps 0, 1, 2, 4, ... up to ``log_until``, then the multiples of ``every`` beyond it, and ``steps``.

    All three are counted in optimiser updates. The last step is always part of the grid.

    >>> checkpoint_steps(steps=20, log_until=8, every=5)
    [0, 1, 2, 4, 8, 10, 15, 20]
    """
    logarithmic = {2**power for power in range(log_until.bit_length()) if 2**power <= min(log_until, steps)}
    first = (log_until // every + 1) * every
    return sorted({0, steps} | logarithmic | set(range(first, steps + 1, every)))
