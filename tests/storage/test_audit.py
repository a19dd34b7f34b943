from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.audit import KINDS, AuditConfig, Finding, audit, changed
from storage.series import Checkpoint, HubSource, WeightFile, parse_name

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
    detail = "step 1 has the same weights as step 0, which is allowed"
    assert findings == [Finding("seed0", 1, "duplicate-weights", "note", detail, "step1")]


def test_of_other_equal_weights_none_is_believed() -> None:
    findings = audit([checkpoint(step, weights_sha256="same") for step in (1000, 0, 1)])
    assert [(f.step, f.severity, f.detail) for f in findings] == [
        (0, "error", "step 0 has the same weights as steps 1, 1000"),
        (1, "error", "step 1 has the same weights as steps 0, 1000"),
        (1000, "error", "step 1000 has the same weights as steps 0, 1"),
    ]


def test_what_is_allowed_trusted_and_ignored_is_configured() -> None:
    members = [checkpoint(step, weights_sha256="same") for step in (0, 1, 2)]

    def severities(**config: Any) -> list[tuple[int | None, str]]:
        return [(f.step, f.severity) for f in audit(members, config=AuditConfig(**config))]

    assert severities(allow_equal=[[0, 1, 2]]) == [(1, "note"), (2, "note")]
    assert severities(allow_equal=[]) == [(0, "error"), (1, "error"), (2, "error")]
    assert severities(trusted=[2]) == [(0, "error"), (1, "error"), (2, "note")]
    assert severities(ignore=["duplicate-weights"]) == [(0, "warning"), (1, "warning"), (2, "warning")]
    with pytest.raises(ValidationError, match=r"'damaged' cannot be ignored; what can is duplicate-weights"):
        AuditConfig(ignore=("damaged",))


def test_weights_are_compared_with_those_recorded_earlier_too() -> None:
    now, earlier = checkpoint(7, weights_sha256="same"), checkpoint(9, weights_sha256="same")
    findings = audit([now], listed=[now, earlier], others=[now, earlier])
    assert [(f.step, f.detail) for f in findings] == [(7, "step 7 has the same weights as step 9")]


def test_a_step_in_two_stages_is_two_steps_and_two_names_of_one_are_disordered() -> None:
    names = ["stage1-step5", "stage2-step5", "stage2-step05"]
    stages = [1, 2, 2]
    members = [
        checkpoint(5, revision=n, stage=s, weights_sha256=n) for n, s in zip(names, stages, strict=True)
    ]
    detail = "'stage2-step05' means the step that 'stage2-step5' means"
    assert audit(members) == [Finding("seed0", 5, "disordered-name", "error", detail, "stage2-step05")]


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([0, 8, 16], []),
        ([0, 16, 8], [3]),
        ([5, 5, 6], [2]),
        ([10**9, 10**9, 2 * 10**9], []),
        ([3 * 10**9, 2 * 10**9, 4 * 10**9], [2]),
        ([8, None, 4], [3]),
        ([None, None, None], []),
    ],
)
def test_tokens_grow_with_steps(tokens: list[int | None], found: list[int]) -> None:
    findings = audit([checkpoint(step, tokens=t) for step, t in enumerate(tokens, start=1)])
    assert [(f.step, f.kind, f.severity) for f in findings] == [
        (step, "disordered-tokens", "warning") for step in found
    ]


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_minority_configuration_or_tokenizer_is_a_warning(kind: str) -> None:
    values = {1: "a" * 40, 2: "b" * 40, 4: "a" * 40, 8: None}
    findings = audit([checkpoint(step, **{f"{kind}_digest": value}) for step, value in values.items()])
    expected = {"config": "config-change", "tokenizer": "vocabulary-change"}[kind]
    assert [(f.step, f.kind, f.severity) for f in findings] == [(2, expected, "warning")]
    assert "bbbbbbbbbbbb" in findings[0].detail
    assert "aaaaaaaaaaaa" in findings[0].detail


# --- faults of published series ---


def shards(step: int, *digests: str) -> Checkpoint:
    names = [f"pytorch_model-{k:05}-of-{len(digests):05}.bin" for k in range(1, len(digests) + 1)]
    files = tuple(WeightFile(name=n, bytes=1, sha256=d) for n, d in zip(names, digests, strict=True))
    return checkpoint(step).described(files, "commit")


def errors(findings: list[Finding]) -> dict[str, set[int | None]]:
    found: dict[str, set[int | None]] = {}
    for finding in findings:
        if finding.severity == "error":
            found.setdefault(finding.kind, set()).add(finding.step)
    return found


def test_steps_that_serve_the_final_weights() -> None:
    """EleutherAI/pythia issue 205: 86 branches of pythia-2.8b serve two blobs of the end of training."""
    final = {0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 53001, 1000)}
    final |= {55000, 60000, 65000, 70000, 80000, 90000, 100000, 103000, 110000, 120000, 130000, 140000}
    second = {54000, 56000, 57000, 58000, 59000, 61000, 62000, 63000, 64000, 143000}
    assert (len(final), len(second)) == (76, 10)
    blobs = dict.fromkeys(final, "main") | dict.fromkeys(second, "second")
    findings = audit([checkpoint(step, weights_sha256=blobs.get(step, f"own {step}")) for step in PYTHIA])
    assert errors(findings) == {"duplicate-weights": final | second}
    assert findings[0].detail == "step 0 has the same weights as steps 1, 2, 4, 8, 16 and 70 more"


def test_steps_that_serve_the_first_shard_of_the_end() -> None:
    """EleutherAI/pythia issue 206: in pythia-12b steps 50000 and 58000 have the last step's first shard."""
    last = {50000, 58000, 143000}
    members = [
        shards(step, "end" if step in last else f"{step}-1", f"{step}-2", f"{step}-3") for step in PYTHIA
    ]
    assert errors(audit(members)) == {"duplicate-shard": last}
    # The last step is known to be right: main serves the same files.
    findings = audit(members, config=AuditConfig(trusted=(143000,)))
    assert errors(findings) == {"duplicate-shard": {50000, 58000}}
    expected = "step 50000 has the same file 'pytorch_model-00001-of-00003.bin' as steps 58000, 143000"
    assert findings[0].detail == expected


def test_three_branches_with_one_payload() -> None:
    """allenai/OLMo issue 915: six shards are the same under three branches of OLMo-2-1124-7B."""
    source = HubSource(repos={"main": "allenai/OLMo-2-1124-7B"})
    names = [f"stage1-step{k}000-tokens{b}B" for k, b in ((101, 424), (102, 428), (175, 735), (300, 1259))]
    members = []
    for name in names:
        parsed = parse_name(name, source)
        assert parsed is not None
        digests = [f"{'own' if parsed.step == 102000 else 'same'}-{k}" for k in range(6)]
        described = shards(parsed.step, *digests)
        members.append(described.model_copy(update={"revision": name, "tokens": parsed.tokens, "stage": 1}))
    assert errors(audit(members)) == {"duplicate-weights": {101000, 175000, 300000}}


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
        Finding("seed0", 2, "dtype-change", "warning", "stored as F32, the run's others as F16", "step2")
    ]


def test_findings_come_by_run_and_step() -> None:
    members = [checkpoint(s, r, weights_sha256="same") for r in ("b", "a") for s in (0, 5, 9)]
    findings = audit(members, ["b/main"])
    assert [(f.run, f.step) for f in findings] == [
        *(("a", step) for step in (0, 5, 9)),
        ("b", None),
        *(("b", step) for step in (0, 5, 9)),
    ]


def test_weights_that_changed_under_a_name_are_a_warning() -> None:
    now = checkpoint(3, weights_sha256="b" * 64)
    detail = f"weights were {'a' * 12}, are now {'b' * 12}"
    assert changed(now, checkpoint(3, weights_sha256="a" * 64)) == [
        Finding("seed0", 3, "changed-weights", "warning", detail, "step3")
    ]
    assert changed(now, now) == changed(now, None) == []
    assert changed(now, checkpoint(3, weights_sha256=None)) == []


def test_every_kind_is_explained() -> None:
    planted = audit(
        [
            *(checkpoint(step, dtype="F32" if step == 9 else "F16") for step in (1, 2, 3, 4, 6, 7, 8, 9)),
            checkpoint(20, weights_sha256="seed0-1", config_digest="a", tokenizer_digest="a", tokens=9),
            checkpoint(21, config_digest="b", tokenizer_digest="b", tokens=8),
            checkpoint(21, revision="ckpt_21"),
            shards(22, "a", "b"),
            shards(23, "a", "c"),
        ],
        ["seed0/main"],
    )
    planted += changed(checkpoint(1), checkpoint(1, weights_sha256="other"))
    # What describing finds (tests of hub and local).
    described = {"damaged", "missing-shard", "lfs-pointer", "unreachable"}
    assert {f.kind for f in planted} | described == set(KINDS)
    assert planted[0].row().keys() == {"step", "kind", "severity", "detail", "revision"}
