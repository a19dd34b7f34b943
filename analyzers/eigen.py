"""Eigenvalues of symmetric matrices: LAPACK in float64 on the CPU, by one thread."""

import threading

import torch
from jaxtyping import Float, Float64
from torch import Tensor

SERIAL_WIDTH = 2048
"""Widest matrix that one thread solves; it takes about a second."""

_one_at_a_time = threading.Lock()


def symmetric_eigenvalues(matrix: Float[Tensor, "width width"]) -> Float64[Tensor, "width"]:
    """Eigenvalues in ascending order.

    LAPACK's threads meet at a barrier in every step of the reduction. Where other work holds a core each
    barrier waits for it: two threads on two busy cores took 16 s at width 1024, one thread 0.12 s. The number
    of threads is the process's, hence the lock.
    """
    matrix = matrix.double().cpu()
    values: Tensor
    if matrix.shape[0] > SERIAL_WIDTH:
        values = torch.linalg.eigvalsh(matrix)
        return values
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            values = torch.linalg.eigvalsh(matrix)
        finally:
            torch.set_num_threads(threads)
    return values
