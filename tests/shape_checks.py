"""What jaxtyping says in a signature, enforced by beartype at the cost of one compilation per signature."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKED: dict[object, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The check that jaxtyping puts before and after a function; it depends on the signature alone.

    A function within a function is decorated anew whenever the outer one runs: compiling a check each time
    took half of the time of measuring.
    """
    code = function.__code__
    names = (function.__module__, function.__qualname__, code.co_varnames, code.co_kwonlyargcount)
    key = (names, tuple(function.__annotations__.items()))
    try:
        if key not in _CHECKED:
            _CHECKED[key] = beartype(function)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(function)
    return _CHECKED[key]
