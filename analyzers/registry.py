"""The registry of analyzers: built-in ones, and third parties' by the entry-point group below."""

import difflib
import warnings
from importlib.metadata import entry_points
from typing import Any, TypeVar

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
        _load(point)
    return dict(sorted(_registry.items()))


# Third parties' entry points that were warned of: every command asks for all analyzers, several times.
_broken: set[str] = set()


def _load(point: Any) -> None:
    """Register a third party's analyzer; one that fails is named in a warning, and the others go on.

    ``point`` is an entry point of the standard library, or of the package importlib_metadata once any package
    has imported that: it then answers in the library's place, with classes of its own.
    """
    try:
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Analyzer)):
            raise TypeError("it is no subclass of Analyzer")
        register(cls)
    except Exception as error:  # whatever a package of others raises
        if point.value in _broken:
            return
        _broken.add(point.value)
        package = f" of {point.dist.name}" if point.dist is not None else ""
        reason = str(error).strip().partition("\n")[0]
        what = f"the analyzer {point.name!r} ({point.value}){package}"
        warnings.warn(
            f"{what} is left out: {type(error).__name__}: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


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
