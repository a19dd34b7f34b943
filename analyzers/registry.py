"""The registry of analyzers: built-in ones, and third parties' by the entry-point group below."""

import difflib
from importlib.metadata import entry_points
from typing import TypeVar

from analyzers.base import Analyzer

ENTRY_POINTS = "ontogeny.analyzers"

_registry: dict[str, type[Analyzer]] = {}
_A = TypeVar("_A", bound=Analyzer)


class UnknownAnalyzerError(LookupError):
    """No analyzer has that name."""


def register(cls: type[_A]) -> type[_A]:
    """Class decorator: make an analyzer known by its name.

    Raises:
        ValueError: the name is taken by another class, or two of its metrics share a name.
    """
    taken = _registry.get(cls.name)
    if taken is not None and taken is not cls:
        raise ValueError(
            f"analyzer {cls.name!r} is registered twice, by {taken.__module__} and {cls.__module__}"
        )
    names = [metric.name for metric in cls.metrics]
    if len(set(names)) != len(names):
        raise ValueError(f"analyzer {cls.name!r} documents a metric twice")
    _registry[cls.name] = cls
    return cls


def load_all() -> dict[str, type[Analyzer]]:
    """All analyzers by name, in order of name; imports the built-in ones and the entry points."""
    import analyzers.architecture
    import analyzers.attention
    import analyzers.attention_sinks
    import analyzers.induction
    import analyzers.local_dimension
    import analyzers.logits
    import analyzers.loss
    import analyzers.massive
    import analyzers.massive_channels
    import analyzers.ngrams
    import analyzers.patches
    import analyzers.similarity
    import analyzers.spectra
    import analyzers.weight_change
    import analyzers.weights  # noqa: F401

    for point in entry_points(group=ENTRY_POINTS):
        register(point.load())
    return dict(sorted(_registry.items()))


def find(name: str) -> type[Analyzer]:
    """The analyzer of that name.

    Raises:
        UnknownAnalyzerError: there is none; the message names those that exist and the nearest.
    """
    if name in _registry:
        return _registry[name]  # looking through all installed packages takes long
    known = load_all()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownAnalyzerError(f"there is no analyzer {name!r}{hint} (known: {', '.join(known)})")
    return known[name]
