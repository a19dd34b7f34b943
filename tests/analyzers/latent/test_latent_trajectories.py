"""Building and scaling trajectories: what is kept, what is dropped, and that each drop is named."""

import json
import math
import random

import numpy as np
import pandas as pd
import pytest

from analyzers.latent import Scaler, Trajectories, from_long


def rows_of(runs=("a", "b"), steps=(0, 1, 2, 4), **metrics):
    """Long rows; each metric is a function of (index of the run, step)."""
    return [
        {"run": run, "step": step, "name": name, "value": metric(index, step)}
        for index, run in enumerate(runs)
        for step in steps
        for name, metric in metrics.items()
    ]


def loss(run, step):
    return 3.0 - step / 2 + run


def norm(run, step):
    return 1.0 + step**2 - run


def test_one_column_per_metric_whatever_the_order_of_the_rows():
    rows = rows_of(loss=loss, norm=norm)
    random.Random(0).shuffle(rows)
    built = from_long(rows)
    assert built.runs == ("a", "b")
    assert built.metrics == ("loss", "norm")
    assert [steps.tolist() for steps in built.steps] == [[0, 1, 2, 4]] * 2
    np.testing.assert_array_equal(built.values[1], [[4, 0], [3.5, 1], [3, 4], [2, 16]])
    assert built.dropped == ()


def test_a_data_frame_and_a_generator_give_the_same():
    rows = rows_of(loss=loss, norm=norm)
    frame = pd.DataFrame(rows).convert_dtypes()
    for built in (from_long(frame), from_long(row for row in rows)):
        np.testing.assert_array_equal(built.values[0], from_long(rows).values[0])


def test_a_constant_metric_is_dropped_with_a_sentence():
    built = from_long(rows_of(loss=loss, width=lambda run, step: 768.0))
    assert built.metrics == ("loss",)
    assert built.dropped == ("metric width dropped: it is constant",)


@pytest.mark.parametrize("absent", [None, math.nan, math.inf, "no row"])
def test_a_frame_without_a_value_is_dropped_and_named(absent):
    rows = rows_of(loss=loss, norm=norm)
    (row,) = (r for r in rows if (r["run"], r["step"], r["name"]) == ("b", 2, "norm"))
    row["value"] = absent
    built = from_long([r for r in rows if r["value"] != "no row"])
    assert [steps.tolist() for steps in built.steps] == [[0, 1, 2, 4], [0, 1, 4]]
    assert built.dropped == ("run b, step 2: frame dropped, no value of norm",)
    assert all(np.isfinite(values).all() for values in built.values)


def test_frames_without_the_same_metric_share_a_sentence():
    built = from_long(rows_of(loss=loss, norm=lambda run, step: None if run == 0 and step < 2 else step))
    assert built.dropped == ("run a, steps 0, 1: frames dropped, no value of norm",)


def test_a_run_left_with_one_frame_is_dropped_and_named():
    built = from_long(rows_of(loss=loss, norm=lambda run, step: None if run == 1 and step > 0 else step))
    assert built.runs == ("a",)
    assert built.dropped[-1] == "run b dropped: 1 complete frames, and a trajectory needs 2"


def test_a_run_without_a_metric_is_dropped_and_named():
    built = from_long(rows_of(loss=loss, norm=lambda run, step: None if run == 1 else step))
    assert built.runs == ("a",)
    assert built.dropped == (
        "run b, steps 0, 1, 2, 4: frames dropped, no value of norm",
        "run b dropped: 0 complete frames, and a trajectory needs 2",
    )


def test_a_sparse_metric_does_not_cost_the_frames_of_the_others():
    built = from_long(rows_of(loss=loss, evaluation=lambda run, step: 0.5 if step == 4 else None))
    assert built.metrics == ("loss",)
    assert len(built.steps[0]) == 4
    assert built.dropped == (
        "metric evaluation dropped: 25% of the frames have a usable value of it, and 50% is the least",
    )


def test_a_metric_that_moved_only_in_dropped_frames_is_dropped():
    built = from_long(
        rows_of(
            loss=lambda run, step: None if step == 0 else loss(run, step),
            spike=lambda run, step: float(step == 0),
        )
    )
    assert built.metrics == ("loss",)
    assert built.dropped[-1] == "metric spike dropped: it is constant"


def test_transforms():
    built = from_long(
        rows_of(loss=loss, norm=lambda run, step: step - 1.0), {"loss": "log", "norm": "symlog"}
    )
    np.testing.assert_allclose(built.values[0][:, 0], np.log([3, 2.5, 2, 1]))
    np.testing.assert_allclose(built.values[0][:, 1], [-math.log(2), 0, math.log(2), math.log(4)])
    assert built.transforms == {"loss": "log", "norm": "symlog"}


def test_a_value_without_a_logarithm_is_named():
    built = from_long(rows_of(loss=loss, norm=lambda run, step: step), {"norm": "log"})
    assert built.dropped[0] == "run a, step 0: frame dropped, norm is not positive and has no logarithm"
    assert built.steps[0].tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "no rows"),
        (lambda rows: [{"run": "a", "step": 0, "name": "x"}], "lack the column 'value'"),
        (lambda rows: [*rows, rows[0]], "run a, step 0: two values of loss"),
        (lambda rows: [*rows, {**rows[0], "step": 0.5}], "step 0.5 is not a whole number"),
        (lambda rows: [*rows, {**rows[0], "step": None}], "not a whole number"),
        (lambda rows: [*rows, {**rows[0], "run": None}], "a row has no run"),
        (lambda rows: [{**row, "value": 1.0} for row in rows], "no metric is left: metric loss dropped"),
        (lambda rows: rows[:1] + rows[4:5], "no run has 2 complete frames: run a dropped"),
    ],
)
def test_unusable_rows_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_long(change(rows_of(loss=loss)))


def test_unusable_transforms_are_refused():
    with pytest.raises(ValueError, match="'root' of loss is unknown"):
        from_long(rows_of(loss=loss), {"loss": "root"})
    with pytest.raises(ValueError, match="no row has that name"):
        from_long(rows_of(loss=loss), {"los": "log"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": ()}, "at least one run"),
        ({"runs": ("a", "a")}, "occur twice"),
        ({"runs": ("a",)}, "1 runs, 2 steps"),
        ({"metrics": ("x", "y")}, "not \\(2, 2\\)"),
        ({"values": (np.array([[1.0], [np.nan]]),) * 2}, "not all finite"),
        ({"steps": (np.array([1, 1]),) * 2}, "steps do not increase"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    parts = {
        "runs": ("a", "b"),
        "steps": (np.array([0, 1]),) * 2,
        "values": (np.array([[1.0], [2.0]]),) * 2,
        "metrics": ("x",),
    }
    with pytest.raises(ValueError, match=message):
        Trajectories(**{**parts, **change})


def test_select_orders_columns_and_refuses_unknown_names():
    built = from_long(rows_of(loss=loss, norm=norm), {"norm": "symlog"})
    chosen = built.select(["norm"])
    np.testing.assert_array_equal(chosen.values[0], built.values[0][:, 1:])
    assert (chosen.metrics, chosen.transforms) == (("norm",), {"norm": "symlog"})
    assert built.select(["loss"]).transforms == {}
    with pytest.raises(ValueError, match="'rank'"):
        built.select(["rank"])


def test_scaler_uses_the_training_runs_only_and_survives_json():
    train, other = np.array([[1.0, 10.0], [3.0, 30.0]]), np.array([[5.0, 50.0], [5.0, 10.0]])
    scaler = Scaler.fit(("x", "y"), [train], "train")
    np.testing.assert_allclose(scaler.apply(train), [[-1, -1], [1, 1]])
    np.testing.assert_allclose(scaler.apply(other), [[3, 3], [3, -1]])
    again = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(again.apply(other), scaler.apply(other))


def test_scaler_per_run_only_centres_what_is_constant_in_a_run():
    scaler = Scaler.fit(("x", "y"), [np.zeros((2, 2))], "per-run")
    np.testing.assert_allclose(scaler.apply(np.array([[5.0, 1.0], [5.0, 3.0]])), [[0, -1], [0, 1]])
    assert Scaler.from_dict(json.loads(json.dumps(scaler.to_dict()))) == scaler


def test_scaler_refuses_a_constant_metric():
    with pytest.raises(ValueError, match="y is constant over the training runs"):
        Scaler.fit(("x", "y"), [np.array([[1.0, 2.0], [2.0, 2.0]])], "train")
