"""How long a measuring will take, roughly: FLOPs of the forward passes over the speed of this machine."""

import time

import torch

from storage.series import Checkpoint

# What all activation analyzers together cost beside the bare forward pass (docs/performance.md: 1.23).
_OVERHEAD = 1.25
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Where the stored dtype is not known, most hubs' checkpoints are in 16 bits.
_USUAL_BYTES = 2
_SIDE = 1024


def matmul_speed(device: torch.device, dtype: str) -> float:
    """FLOP per second of a matrix product of side 1024, the best of five."""
    kind = getattr(torch, dtype)
    a = torch.randn(_SIDE, _SIDE, device=device).to(kind)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * _SIDE**3 / best


def forward_flops(checkpoint: Checkpoint, tokens: int) -> float | None:
    """FLOPs of measuring one checkpoint on ``tokens`` tokens: 2 per parameter and token, and the overhead.

    Parameters are the weight files' bytes over the bytes of their dtype. None if the size is not known.
    """
    if checkpoint.bytes is None:
        return None
    parameters = checkpoint.bytes / _BYTES.get(checkpoint.dtype or "", _USUAL_BYTES)
    return 2 * parameters * tokens * _OVERHEAD
