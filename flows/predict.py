"""Flow: how well the architecture of a model foretells its growth curves, over several stored series."""

from pathlib import Path

from prefect import flow
from pydantic import BaseModel

from flows.config import default_root
from flows.progress import console
from storage.errors import UsageError
from tasks.predict import predict_series_curves, score_series_predictor


class PredictorScore(BaseModel):
    """One regressor on one parameter of models it has not seen (:class:`analyzers.predictor.Score`)."""

    parameter: str
    regressor: str
    r2: float
    skill: float


class PredictSummary(BaseModel):
    """Scores, and the curves behind them: ``used`` per series, and ``left_out`` for want of a class."""

    models: int
    used: dict[str, int]
    left_out: int
    scores: list[PredictorScore]


@flow(name="predict")
def predict_growth(
    series: list[str],
    root: str = default_root(),
    metric: str = "top1_over_median",
    site: str = "resid_post",
    seed: int = 0,
) -> PredictSummary:
    """Predict the curves of each model from those of the others, and score it. Nothing is stored."""
    with console.status(f"predicting each of {len(series)} series from the others"):
        done = score_series_predictor(root, series, metric, site, seed)
    scores = [
        PredictorScore(parameter=parameter, regressor=regressor, r2=r2, skill=skill)
        for parameter, regressor, r2, skill in done["scores"]
    ]
    return PredictSummary(models=done["models"], used=done["used"], left_out=done["left_out"], scores=scores)


class PredictedCurves(BaseModel):
    """Curves of a model of given sizes, one per layer at the same steps; None where they are no curve.

    ``error`` is the median relative error of such curves on models left out, ``baseline`` that of the mean
    curve of the others; of ``scored`` predictions ``broken`` were no curve.
    """

    architecture: dict[str, int]
    regressor: str
    steps: list[int]
    curves: list[list[float] | None]
    error: float
    baseline: float
    broken: int
    scored: int
    remarks: list[str]


@flow(name="predict-curves")
def predict_model(
    series: list[str],
    architecture: str,
    root: str = default_root(),
    metric: str = "top1_over_median",
    site: str = "resid_post",
    regressor: str = "Ridge",
    seed: int = 0,
) -> PredictedCurves:
    """Predict the curves of a model from its sizes, learned from all series named. Nothing is stored."""
    with console.status(f"predicting from {len(series)} series"):
        found = predict_series_curves(root, series, metric, site, architecture, regressor, seed)
    return PredictedCurves(**found)


def write_predicted(found: PredictedCurves, metric: str, file: Path) -> None:
    """The curves as CSV (step, layer, value), or as a page with a plot that needs no network.

    Raises:
        UsageError: the name ends in neither .csv nor .html.
    """
    if file.suffix == ".csv":
        lines = ["step,layer,value"]
        for layer, values in enumerate(found.curves):
            shown: list[float] | list[None] = values or [None] * len(found.steps)
            lines += [
                f"{step},{layer},{'' if value is None else repr(value)}"
                for step, value in zip(found.steps, shown, strict=True)
            ]
        file.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return
    if file.suffix != ".html":
        raise UsageError(f"{str(file)!r} ends in neither .csv nor .html")
    from plotly import graph_objects as go

    sizes = ", ".join(f"{name} {size}" for name, size in found.architecture.items())
    figure = go.Figure(
        [
            go.Scatter(x=[step + 1 for step in found.steps], y=values, mode="lines", name=f"layer {layer}")
            for layer, values in enumerate(found.curves)
            if values is not None
        ]
    )
    figure.update_layout(
        title={"text": f"Predicted {metric}: {sizes}<br><sup>{score_sentence(found)}</sup>"},
        xaxis={"title": "training step + 1", "type": "log"},
        yaxis={"title": metric},
        template="plotly_white",
    )
    figure.write_html(file, include_plotlyjs=True)


def score_sentence(found: PredictedCurves) -> str:
    """How far such curves are from those of models left out."""
    broken = f"; {found.broken} of {found.scored} were no curve" if found.broken else ""
    return (
        f"{found.regressor}, each model left out in turn: median relative error of a curve "
        f"{found.error:.2f}, "
        f"of the mean curve of the other models {found.baseline:.2f}{broken}."
    )
