"""Loops compiled by numba, and the threads that run them.

The threads are Python's (compiled loops hold no lock on the interpreter): numba's own pool would have to
share the cores with torch's, and one of its forms ends the process when two threads use it.
"""

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from numba import njit


def compiled(*, reorder: bool) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function compiled, without what wraps it, since numba cannot read the tests' checks.

    Args:
        reorder: sums may be reordered for vector instructions; a product and a sum are always one operation
            where the processor has it. Not-a-number stays what it is, so that faults show.
    """
    fast = {"reassoc", "contract", "nsz"} if reorder else {"contract"}
    # Division by zero as in numpy: a test for it at every step would keep a loop from vector instructions.
    options = {"nogil": True, "cache": True, "fastmath": fast, "error_model": "numpy"}
    return lambda function: njit(**options)(inspect.unwrap(function))


def equal_cuts(count: int, parts: int) -> list[int]:
    """Cuts of ``range(count)`` into ``parts`` whose sizes differ by 1 at most."""
    return [count * part // parts for part in range(parts + 1)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="loops")


def over_threads(work: Callable[[int, int], Any], count: int) -> list[Any]:
    """``over_ranges`` with an equal part of ``range(count)`` for each of torch's threads."""
    return over_ranges(work, equal_cuts(count, torch.get_num_threads()))


def over_ranges(work: Callable[[int, int], Any], cuts: Sequence[int]) -> list[Any]:
    """``work(begin, end)`` for every two neighbours in ``cuts``, on torch's number of threads, in order.

    A range without an element is left out. What one thread is to do, the caller's does.
    """
    ranges = [(begin, end) for begin, end in pairwise(cuts) if begin < end]
    threads = torch.get_num_threads()
    if threads == 1 or len(ranges) == 1:
        return [work(begin, end) for begin, end in ranges]
    futures = [_pool(threads).submit(work, begin, end) for begin, end in ranges]
    return [future.result() for future in futures]
