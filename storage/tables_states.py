"""Schemas of the tables about latent states: models, states, their map, what stands beside it, online use."""

import pyarrow as pa

from storage.table_spec import F64, I32, I64, RECORDED, STEP, STR, TOKENS, TableSpec, schema

_OUTCOMES = pa.list_(pa.struct([("run", STR), ("value", F64)]))
_COEFFICIENTS = pa.list_(
    pa.struct(
        [
            ("state", I32),
            ("coefficient", F64),
            ("error", F64),
            ("p", F64),
            ("with_state", pa.list_(STR)),
            ("without_state", pa.list_(STR)),
            ("mean_with", F64),
            ("mean_without", F64),
            ("p_later", F64),
            ("detour", pa.bool_()),
            ("note", STR),
        ]
    )
)
_PARTS = pa.list_(pa.struct([("metric", STR), ("z", F64), ("value", F64), ("mean", F64)]))
_MAP = pa.struct([("edges", I32), ("forks", I32), ("returning", I32), ("usual", I32), ("linear", pa.bool_())])
_MODEL = ("model", STR, "identity of the fit: digest of its settings and data")
_COMPARISON = (
    "comparison",
    STR,
    "identity of what is compared: digest of the fit and of what stands beside it",
)

STATE_TABLES = (
    TableSpec(
        "state_models",
        "one row per number of states tried in a fit",
        schema(
            _MODEL,
            ("k", I32, "number of states"),
            ("chosen", pa.bool_(), "true for the K whose states and transitions are stored"),
            ("bic", F64, "BIC on the training runs (lower is better)"),
            ("heldout", F64, "BIC on the held-out runs (lower is better); null with a single run"),
            ("loglik", F64, "log-likelihood of the training runs in nats"),
            ("ari", F64, "mean adjusted Rand index among the best restarts; null with one restart"),
            ("aic", F64, "AIC on the training runs (lower is better)"),
            ("icl", F64, "ICL on the training runs (lower is better)"),
            (
                "heldout_loglik",
                F64,
                "log-likelihood of all runs, each left out of its fit, in nats; null with one run",
            ),
            (
                "bootstrap_ari",
                F64,
                "mean adjusted Rand index with refits to resampled runs; null with one run",
            ),
            ("bootstrap_refits", I32, "refits to resampled runs that kept all states; null with one run"),
            ("rule", STR, "rule the number of states was chosen by, one of docs/states.md"),
            ("failed_restarts", I32, "restarts that ended in an error, with the reasons in parameters"),
            ("metrics", pa.list_(STR), "the trajectories that entered, in the order of the parameters"),
            ("train_runs", pa.list_(STR), "runs the parameters were fitted on"),
            ("heldout_runs", pa.list_(STR), "runs the parameters never saw"),
            ("parameters", STR, "JSON: start, transition, means, covariances, scaler, settings, notes"),
            ("grid", STR, "grid of steps of the frames (docs/states.md); null in rows of earlier versions"),
            ("grid_steps", pa.list_(I64), "steps of all frames of all runs of the fit, ascending"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "states",
        "one row per checkpoint and fit",
        schema(
            _MODEL,
            STEP,
            TOKENS,
            ("state", I32, "state of the Viterbi path, numbered by mean time of occupancy"),
            ("posterior", F64, "smoothed probability of that state"),
            RECORDED,
        ),
        newest_of="model",
    ),
    TableSpec(
        "transitions",
        "one row per edge of the training map",
        schema(
            _MODEL,
            ("from", I32, "state left"),
            ("to", I32, "state entered"),
            ("count", I64, "times the edge was taken in the decoded paths of all runs"),
            ("runs", pa.list_(STR), "runs that took it"),
            ("probability", F64, "fitted transition probability per checkpoint"),
            (
                "dwell_checkpoints",
                F64,
                "checkpoints spent in the state left before the edge was taken: median over the times it was",
            ),
            ("dwell_steps", F64, "the same in steps, from the first checkpoint there to the next state's"),
            ("dwell_tokens", F64, "the same in tokens; null where they are unknown"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "boundaries",
        "one row per change of state of a run, with the interval of steps in which it lies",
        schema(
            _MODEL,
            ("from", I32, "state left"),
            ("to", I32, "state entered"),
            ("before", I64, "step of the last checkpoint in the state left"),
            ("step", I64, "step of the first checkpoint in the state entered"),
            TOKENS,
            (
                "low",
                I64,
                "last step of the stay before with a smoothed posterior of `to` below .1; null if none has",
            ),
            (
                "high",
                I64,
                "first step of the stay after with a smoothed posterior of `to` above .9; null if none has",
            ),
            (
                "bootstrap_low",
                I64,
                "5th percentile of `step` over the refits to resampled runs that have this change; null if "
                "none has",
            ),
            ("bootstrap_high", I64, "95th percentile of it"),
            (
                "bootstrap_refits",
                I32,
                "refits that have this change, of those in state_models; null with one training run",
            ),
            ("dwell_checkpoints", I64, "checkpoints of the stay that ends here"),
            ("dwell_steps", I64, "steps from the first checkpoint of that stay to `step`"),
            ("dwell_tokens", I64, "the same in tokens; null where they are unknown"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "state_means",
        "one row per state and metric of the training map",
        schema(
            _MODEL,
            ("state", I32, "number of the state"),
            ("metric", STR, "trajectory, named as in `metrics` of state_models"),
            ("mean", F64, "fitted mean in the metric's unit (a logarithm's: geometric mean); null per run"),
            ("low", F64, "fitted mean minus one standard deviation of the state, in the metric's unit"),
            ("high", F64, "fitted mean plus one standard deviation of the state, in the metric's unit"),
            ("mean_scaled", F64, "fitted mean in standard deviations, as the model sees it"),
            ("note", STR, "why there is no value in the metric's unit; null in the normal case"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "drivers",
        "one row per edge of the training map and metric (run null: all runs), and one per run that took it",
        schema(
            _MODEL,
            ("from", I32, "state left"),
            ("to", I32, "state entered"),
            ("metric", STR, "trajectory, named as in `metrics` of state_models"),
            (
                "score",
                F64,
                "mean of abs(d ln p(s_t = to, given x_1..t) / d x_t) at the arrival, nats per scaled unit; "
                "run null: mean over runs; null where no arrival has the metric",
            ),
            ("rank", I32, "place of the metric at this edge by score, from 1; null without a score above 0"),
            ("runs", I32, "runs the score rests on"),
            ("shift", F64, "mean of `to` minus mean of `from` in the metric's unit, signed"),
            ("shift_scaled", F64, "the same in standard deviations, as the model sees it"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "nulls",
        "one row per fit: the same fit on smooth surrogates of the runs, which have no phases",
        schema(
            _MODEL,
            _COMPARISON,
            ("k", I32, "number of states of all these fits: that of the map"),
            ("surrogates", I32, "surrogates that could be fitted"),
            ("restarts", I32, "restarts of each fit, on the observed runs too"),
            (
                "heldout",
                pa.bool_(),
                "true: likelihoods of the held-out runs; false: of the fitted run itself",
            ),
            ("loglik", F64, "log-likelihood of the observed runs, nats per checkpoint with a value"),
            ("surrogate_logliks", pa.list_(F64), "the same of each surrogate"),
            ("gap", F64, "loglik minus the mean of surrogate_logliks; null without a surrogate"),
            ("spread", F64, "standard deviation of surrogate_logliks; null with fewer than two"),
            ("explained", pa.bool_(), "whether smooth surrogates do as well; null where that is open"),
            ("rule_k", I32, "K by the rule on the observed runs with these restarts; null where not tried"),
            ("surrogate_rule_ks", pa.list_(I32), "K by the rule on the first surrogates"),
            ("runs", I32, "runs of the map"),
            (
                "map",
                _MAP,
                "map of the observed runs in this fit: edges, forks, runs that re-enter a state, runs that "
                "share the commonest order of states, whether it has neither fork nor re-entry",
            ),
            ("surrogate_maps", pa.list_(_MAP), "the same of each surrogate"),
            ("same_map", I32, "surrogates whose map has the edges of the observed one"),
            ("sentence", STR, "the answer in words, with the gap"),
            ("notes", pa.list_(STR), "sentences on the maps and on what this null cannot support"),
            RECORDED,
        ),
        newest_of="comparison",
        per="series",
    ),
    TableSpec(
        "baselines",
        "one row per fit, baseline, trajectory it is about, and run (run null: all runs)",
        schema(
            _MODEL,
            _COMPARISON,
            ("baseline", STR, "k-means, change points, or a form of the table curves"),
            ("trajectory", STR, "trajectory whose phases or growth curve these are; null for the others"),
            (
                "ari",
                F64,
                "adjusted Rand index with the states of the same checkpoints; null where the baseline has no "
                "boundary",
            ),
            ("n", I64, "checkpoints it rests on"),
            ("runs", I32, "runs it rests on"),
            ("boundaries", pa.list_(I64), "first step of every piece but the first; null for all runs"),
            (
                "labels",
                pa.list_(I32),
                "label of every piece; k-means: numbered like the states it matches best; change points: in "
                "order; geometric-phases: 0 collapse, 1 expansion, 2 after it; growth curve: 0 up to the "
                "peak, 1 after it",
            ),
            ("note", STR, "what a reader must know of this row; null in the normal case"),
            RECORDED,
        ),
        newest_of="comparison",
        per="series",
    ),
    TableSpec(
        "training_frames",
        "one row per frame with a value that a model was fitted to: what online use compares with",
        schema(
            _MODEL,
            STEP,
            (
                "values",
                pa.list_(F64),
                "scaled values in the order of `metrics` of state_models; null: missing",
            ),
            ("log_predicted", pa.list_(F64), "ln of the probability of every state before the frame"),
            RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "online_states",
        "one row per checkpoint and model that decoded it without looking ahead (docs/decode.md)",
        schema(
            _MODEL,
            ("model_series", STR, "series the model was fitted to"),
            STEP,
            TOKENS,
            ("fitted", pa.bool_(), "true where the model was fitted to this very checkpoint"),
            ("state", I32, "most probable state by the filter"),
            ("posterior", F64, "filtering probability of that state"),
            ("surprise", F64, "-ln p(x_t given x_1..t-1) in nats, of the metrics it has; may be negative"),
            ("misfit", F64, "smallest -ln p(x_t given a state) in nats over the states"),
            (
                "percentile",
                F64,
                "training frames with at most that surprise, of the same metrics, in per cent; null "
                "without any",
            ),
            ("compared", I64, "training frames that have all metrics of this checkpoint"),
            ("flags", pa.list_(STR), "new: no state explains it; unexpected: a state does, the past not"),
            ("parts", _PARTS, "farthest metrics: deviations z from the state, value and the state's mean"),
            ("missing", pa.list_(STR), "metrics of the model without a value here"),
            ("log_posterior", pa.list_(F64), "ln of the filtering probability of every state"),
            ("inputs", STR, "digest of this frame and all before it: a changed past is decoded again"),
            RECORDED,
        ),
        newest_by=("series", "run", "model", "step"),
    ),
    TableSpec(
        "outcomes",
        "one row per question whether the states tell an outcome of the runs",
        schema(
            _MODEL,
            ("outcome", STR, "what was asked, in words: a metric and its threshold, or a file"),
            ("values", _OUTCOMES, "outcome per run that has one"),
            ("without", pa.list_(STR), "runs with states and no outcome: they never pass the threshold"),
            ("r2", F64, "share of the variance explained by the shares of the states; null with a note"),
            ("r2_adjusted", F64, "r2 adjusted for the degrees of freedom"),
            ("f", F64, "F statistic against a constant outcome; infinite where the fit is exact"),
            ("p", F64, "p value of the F test"),
            ("p_permutation", F64, "p value of the permutation test"),
            ("permutations", I64, "reassignments of outcomes to runs that were tried"),
            ("rank", I32, "independent directions of the shares, the constant being one"),
            ("states", _COEFFICIENTS, "per state: coefficient, its error and p, who visits it, detour"),
            ("dissimilarity", F64, "mean Wasserstein distance between the bags of states of two runs"),
            ("notes", pa.list_(STR), "sentences a reader must know"),
            RECORDED,
        ),
        newest_by=("series", "outcome"),
        per="series",
    ),
)
