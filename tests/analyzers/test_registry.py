"""Registration by decorator and by entry point."""

import re
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from analyzers import registry
from analyzers.base import ActivationAnalyzer, Metric
from analyzers.loss import LossAnalyzer
from analyzers.registry import UnknownAnalyzerError, find, load_all, register

BUILT_IN = {"loss", "massive", "spectra", "weights"}

THIRD_PARTY = '''
from analyzers.base import Metric, Result, Row, WeightAnalyzer

class Count(WeightAnalyzer):
    """Counts matrices."""

    name = "count"
    version = 1
    summary = "number of matrices"
    metrics = (Metric("matrices", "count", "1", ">= 1", "none"),)

    def measure_weights(self, weights):
        n = len(list(weights.matrices()))
        return Result([Row("matrices", float(n), n)])
'''


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes: the registry is restored afterwards."""
    load_all()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A third party's package with an entry point, as pip would leave it in a folder of sys.path."""
    (folder / "count_matrices.py").write_text(THIRD_PARTY)
    metadata = folder / "count_matrices-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: count-matrices\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[ontogeny.analyzers]\ncount = {value}\n")
    monkeypatch.syspath_prepend(folder)


def test_the_built_in_analyzers_are_there_in_order() -> None:
    names = list(load_all())
    assert set(names) >= BUILT_IN
    assert names == sorted(names)
    assert find("loss") is LossAnalyzer


def test_a_name_is_registered_once() -> None:
    class Other(LossAnalyzer):
        """Another class of the same name."""

    with pytest.raises(
        ValueError, match=r"'loss' is registered twice, by analyzers\.loss and .*test_registry"
    ):
        register(Other)
    assert find("loss") is LossAnalyzer
    assert register(LossAnalyzer) is LossAnalyzer


def test_a_metric_is_documented_once() -> None:
    class Twice(ActivationAnalyzer):
        """Names a metric twice."""

        name = "twice"
        metrics = (Metric("a", "f", "1", "real", "r"), Metric("a", "g", "1", "real", "r"))

    with pytest.raises(ValueError, match="analyzer 'twice' documents a metric twice"):
        register(Twice)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownAnalyzerError) as caught:
        find("spectre")
    assert str(caught.value).startswith("there is no analyzer 'spectre'; did you mean 'spectra'? (known: ")
    with pytest.raises(UnknownAnalyzerError, match=r"there is no analyzer 'zzz' \(known: .*loss, massive"):
        find("zzz")


def test_entry_points_of_importlib_metadata_register_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib_metadata  # answers for the standard library from now on, as after an import of Dask

    install(tmp_path, monkeypatch, "count_matrices:Count")
    (point,) = entry_points(group=registry.ENTRY_POINTS)
    assert isinstance(point, importlib_metadata.EntryPoint)
    assert "count" in load_all()


def test_a_third_party_registers_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "count_matrices:Count")
    assert "count" in load_all()
    cls = find("count")
    assert (cls.__module__, cls.summary) == ("count_matrices", "number of matrices")
    assert set(load_all()) >= {*BUILT_IN, "count"}  # again: the same class is no double registration


def test_without_the_third_party_its_analyzer_is_unknown() -> None:
    with pytest.raises(UnknownAnalyzerError, match="'count'"):
        find("count")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("not_there:Count", "ModuleNotFoundError: No module named 'not_there'"),
        ("count_matrices:Nothing", "AttributeError: module 'count_matrices' has no attribute 'Nothing'"),
        ("analyzers.base:Result", "TypeError: it is no subclass of Analyzer"),
    ],
)
def test_a_third_party_that_fails_is_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, reason: str
) -> None:
    monkeypatch.setattr(registry, "_broken", set())
    install(tmp_path, monkeypatch, value)
    sentence = f"the analyzer 'count' ({value}) of count-matrices is left out: {reason}"
    with pytest.warns(RuntimeWarning, match=re.escape(sentence)):
        found = load_all()
    assert set(found) >= BUILT_IN
    assert "count" not in found
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_all()  # said once
