from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.audit import KINDS, Finding, audit, changed
from storage.series import Checkpoint

PYTHIA = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 143001, 1000)]


def checkpoint(step: int, run: str = "seed0", **more: Any) -> Checkpoint:
    base = {"series": "tiny", "run": run, "revision": f"step{step}", "location": "x", "dtype": "F16"}
    return Checkpoint(**({"step": step, "weights_sha256": f"{run}-{step}"} | base | more))


def gaps(steps: Sequence[int]) -> list[int | None]:
    findings = audit([checkpoint(step) for step in steps])
    assert {f.kind for f in findings} <= {"grid-gap"}
    return [f.step for f in findings]


def test_a_sound_series_has_no_finding() -> None:
    assert len(PYTHIA) == 154
    assert audit([checkpoint(step, run) for run in ("seed0", "seed1") for step in PYTHIA]) == []


@pytest.mark.parametrize("missing", [2, 16, 256, 2000, 57000, 142000])
def test_a_step_missing_inside_either_part_is_a_gap(missing: int) -> None:
    findings = audit([checkpoint(step) for step in PYTHIA if step != missing])
    assert findings == [
        Finding(
            "seed0",
            missing,
            "grid-gap",
            "warning",
            f"no checkpoint at step {missing}, where the grid has one",
        )
    ]


def test_many_missing_steps_are_all_found() -> None:
    absent = {4, 64, 3000, 4000, 100000}
    assert gaps([step for step in PYTHIA if step not in absent]) == sorted(absent)


@pytest.mark.parametrize(
    "steps",
    [
        [0, 1, 2, 4, 8, 16, 32],
        [0, 1, 2, 4, 8, 16, 20, 30, 40, 50],
        [0, 300, *range(10000, 200000, 10000), 197359],
        [500, 1000, 1500, 2000],
        [1, 2, 4, 1000, 11000, 21000, 31000],
        [10, 20, 40],
        [5],
        [],
    ],
)
def test_other_regular_grids_have_no_gap(steps: list[int]) -> None:
    assert gaps(steps) == []


def test_a_linear_part_need_not_lie_on_multiples_of_its_stride() -> None:
    assert gaps([1, 2, 4, 1000, 11000, 31000, 41000, 51000]) == [21000]


@given(st.lists(st.integers(0, 400), unique=True, max_size=30))
def test_gaps_are_steps_that_are_not_there(steps: list[int]) -> None:
    found = gaps(sorted(steps))
    assert not set(found) & set(steps)
    assert len(found) == len(set(found))


def test_equal_weights_at_steps_0_and_1_are_a_note() -> None:
    findings = audit([checkpoint(step, weights_sha256="same") for step in (0, 1)])
    detail = "weights of step 1 are those of step 0, as where the first update has learning rate 0"
    assert findings == [Finding("seed0", 1, "duplicate-weights", "note", detail)]


def test_other_equal_weights_are_an_error() -> None:
    findings = audit([checkpoint(step, weights_sha256="same") for step in (1000, 0, 1)])
    assert [(f.step, f.severity) for f in findings] == [(1, "note"), (1000, "error")]
    assert findings[1].detail == "weights of step 1000 are those of step 1"


def test_equal_weights_of_two_runs_are_not_compared() -> None:
    assert audit([checkpoint(5, run, weights_sha256="same") for run in ("seed0", "seed1")]) == []


def test_unknown_weights_equal_nothing() -> None:
    assert audit([checkpoint(step, weights_sha256=None) for step in (1, 2)]) == []


def test_names_that_did_not_parse_are_notes() -> None:
    findings = audit([checkpoint(1)], ["seed0/main", "seed0/refs/pr/1"])
    assert [(f.run, f.step, f.kind, f.severity, f.detail) for f in findings] == [
        ("seed0", None, "unparsed-name", "note", "'main' was passed over"),
        ("seed0", None, "unparsed-name", "note", "'refs/pr/1' was passed over"),
    ]


def test_a_minority_dtype_is_a_warning() -> None:
    kinds = {1: "F16", 2: "F32", 4: "F16", 8: None}
    findings = audit([checkpoint(step, dtype=dtype) for step, dtype in kinds.items()])
    assert findings == [
        Finding("seed0", 2, "dtype-change", "warning", "stored as F32, the run's others as F16")
    ]


def test_findings_come_by_run_and_step() -> None:
    members = [checkpoint(s, r, weights_sha256="same") for r in ("b", "a") for s in (0, 5, 9)]
    findings = audit(members, ["b/main"])
    assert [(f.run, f.step) for f in findings] == [("a", 5), ("a", 9), ("b", None), ("b", 5), ("b", 9)]


def test_weights_that_changed_under_a_name_are_a_warning() -> None:
    now = checkpoint(3, weights_sha256="b" * 64)
    detail = f"weights were {'a' * 12}, are now {'b' * 12}"
    assert changed(now, checkpoint(3, weights_sha256="a" * 64)) == [
        Finding("seed0", 3, "changed-weights", "warning", detail)
    ]
    assert changed(now, now) == changed(now, None) == []
    assert changed(now, checkpoint(3, weights_sha256=None)) == []


def test_every_kind_is_explained() -> None:
    planted = audit(
        [
            *(checkpoint(step, dtype="F32" if step == 9 else "F16") for step in (1, 2, 3, 4, 6, 7, 8, 9)),
            checkpoint(20, weights_sha256="seed0-1"),
        ],
        ["seed0/main"],
    )
    planted += changed(checkpoint(1), checkpoint(1, weights_sha256="other"))
    assert {f.kind for f in planted} | {"damaged"} == set(KINDS)
    assert planted[0].row().keys() == {"step", "kind", "severity", "detail"}
