"""Schemas of all tables. docs/schema.md is their specification, and a test compares the two."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TableSpec:
    """One table: its schema and how a reader finds the newest of several rows about the same thing.

    ``newest_by`` says what a later row replaces: rows that agree on these columns are versions of one
    another. ``newest_of`` names a column whose latest value alone is shown (per ``newest_within``), so that
    a trajectory never mixes two protocols. Both empty: all rows count. ``history=True`` turns both off.
    """

    name: str
    what: str
    schema: pa.Schema
    newest_by: tuple[str, ...] = ()
    newest_of: str | None = None
    newest_within: tuple[str, ...] = ("series",)
    per: Literal["run", "series"] = "run"


def _schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    head = [
        ("series", pa.string(), "name of the series"),
        ("run", pa.string(), "name of the run; null in tables about a whole series"),
    ]
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in [*head, *fields]])


_I32, _I64, _F64, _STR = pa.int32(), pa.int64(), pa.float64(), pa.string()
_FILES = pa.list_(pa.struct([("name", _STR), ("bytes", _I64), ("sha256", _STR)]))
_NUMBERS = pa.map_(_STR, _F64)
_INTERVALS = pa.map_(_STR, pa.struct([("low", _F64), ("high", _F64)]))
_OUTCOMES = pa.list_(pa.struct([("run", _STR), ("value", _F64)]))
_COEFFICIENTS = pa.list_(
    pa.struct(
        [
            ("state", _I32),
            ("coefficient", _F64),
            ("error", _F64),
            ("p", _F64),
            ("with_state", pa.list_(_STR)),
            ("without_state", pa.list_(_STR)),
            ("mean_with", _F64),
            ("mean_without", _F64),
            ("p_later", _F64),
            ("detour", pa.bool_()),
            ("note", _STR),
        ]
    )
)
_MAP = pa.struct(
    [("edges", _I32), ("forks", _I32), ("returning", _I32), ("usual", _I32), ("linear", pa.bool_())]
)
_AT = pa.timestamp("us", tz="UTC")
_PARTS = pa.list_(pa.struct([("metric", _STR), ("z", _F64), ("value", _F64), ("mean", _F64)]))
_STEP = ("step", _I64, "optimizer steps taken when the checkpoint was saved")
_TOKENS = ("tokens", _I64, "training tokens seen; null where unknown")
_RECORDED = ("recorded_at", _AT, "when the row was written (UTC)")
_KEY = ("key", _STR, "content key of the result (weights digest and protocol)")
_PROTOCOL = ("protocol", _STR, "JSON: analyzer, version, parameters, probe, dtype, schema version")
_MODEL = ("model", _STR, "identity of the fit: digest of its settings and data")
_COMPARISON = (
    "comparison",
    _STR,
    "identity of what is compared: digest of the fit and of what stands beside it",
)

_SPECS = (
    TableSpec(
        "checkpoints",
        "one row per checkpoint of the catalogue",
        _schema(
            _STEP,
            _TOKENS,
            ("stage", _I32, "training stage where the series has several; null otherwise"),
            ("revision", _STR, "branch or folder name the checkpoint was listed under"),
            ("commit", _STR, "commit the branch was resolved to, pinned at first sight; null for folders"),
            ("location", _STR, "repository or folder the checkpoint is read from"),
            ("weights_sha256", _STR, "digest of the weight files; null where it is not known yet"),
            ("bytes", _I64, "size of the weight files in bytes"),
            ("fingerprint", _STR, "what tells that the digest still holds: commit, or sizes and times"),
            ("dtype", _STR, "dtype of most weights as stored; null where it is not known yet"),
            ("files", _FILES, "weight files: name, size in bytes, SHA-256"),
            ("config_digest", _STR, "git blob SHA-1 of config.json; null where there is none"),
            ("tokenizer_digest", _STR, "digest of the tokenizer's files; null where there are none"),
            ("text_bytes", _I64, "size of configuration and tokenizer files; null for folders"),
            _RECORDED,
        ),
        newest_by=("series", "run", "step", "stage"),
    ),
    TableSpec(
        "findings",
        "one row per finding of the latest audit",
        _schema(
            ("step", _I64, "checkpoint the finding is about; null when it is about the run"),
            ("kind", _STR, "what was found, one of the kinds listed in docs/audit.md"),
            ("severity", _STR, "error, warning or note; an error excludes the checkpoint from measuring"),
            ("detail", _STR, "one sentence with the values"),
            ("revision", _STR, "branch or folder the finding is about; null when it is about the run"),
            _RECORDED,
        ),
    ),
    TableSpec(
        "metrics",
        "one row per checkpoint, metric and place",
        _schema(
            _STEP,
            _TOKENS,
            ("analyzer", _STR, "analyzer that produced the row"),
            ("metric", _STR, "metric, one of docs/metrics.md"),
            ("site", _STR, "place in the network or kind of weight matrix; null for the whole model"),
            ("layer", _I32, "block, counted from 0; null outside the blocks"),
            ("head", _I32, "attention head; null where the row is not about one"),
            ("value", _F64, "the number; null where it could not be computed, with the reason in note"),
            ("n", _I64, "observations the value rests on (tokens, sequences or weights)"),
            ("note", _STR, "what a reader must know of this value; null in the normal case"),
            _KEY,
            _PROTOCOL,
            _RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "metric", "site", "layer", "head"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "spectra",
        "one row per checkpoint, site, layer and half",
        _schema(
            _STEP,
            ("analyzer", _STR, "analyzer that produced the row"),
            ("site", _STR, "place in the network"),
            ("layer", _I32, "block, counted from 0; null outside the blocks"),
            ("half", _STR, "all, first or second: whole sample or one half of its sequences"),
            ("centered", pa.bool_(), "true: centred covariance; false: raw second moment"),
            ("n", _I64, "rows (tokens or sequences) the spectrum rests on"),
            ("eigenvalues", pa.list_(_F64), "eigenvalues in descending order, divided by n"),
            _KEY,
            _PROTOCOL,
            _RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "site", "layer", "half", "centered"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "sequence_values",
        "one row per checkpoint, metric and place whose values on single sequences are kept",
        _schema(
            _STEP,
            ("analyzer", _STR, "analyzer that produced the row"),
            ("metric", _STR, "metric, one of docs/metrics.md"),
            ("site", _STR, "place in the network; null for the whole model"),
            ("layer", _I32, "block, counted from 0; null outside the blocks"),
            ("head", _I32, "attention head; null where the row is not about one"),
            ("sequences", pa.list_(_I64), "numbers of the sequences within the probe, ascending, from 0"),
            ("values", pa.list_(_F64), "the metric on each of them; null where it has no finite value"),
            _KEY,
            _PROTOCOL,
            _RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "metric", "site", "layer", "head"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "curves",
        "one row per trajectory and form fitted to it, and one per series (run null) for all runs together",
        _schema(
            ("curve", _STR, "identity of the fit: digest of its data, form and settings"),
            ("metric", _STR, "metric of the trajectory, one of docs/metrics.md"),
            ("site", _STR, "place in the network; null for the whole model"),
            ("layer", _I32, "block, counted from 0; null outside the blocks"),
            ("head", _I32, "attention head; null where the row is not about one"),
            (
                "form",
                _STR,
                "what was fitted; geometric-phases is docs/phases.md, head-birth is docs/massive.md",
            ),
            ("class", _STR, "shape of the whole trajectory; null where it could not be judged"),
            ("n", _I64, "checkpoints with a usable value"),
            ("runs", pa.list_(_STR), "runs that entered"),
            ("parameters", _NUMBERS, "numbers of the fit by name; what was not found has no entry"),
            ("intervals", _INTERVALS, "low and high of those parameters that have an interval"),
            ("r2", _F64, "share of the variance explained; null for forms that are no function"),
            ("aic", _F64, "Akaike's criterion (lower is better); null for forms that are no function"),
            (
                "peak_step",
                _I64,
                "step of the peak, or of the birth of a head, where the form has one; null: none is seen",
            ),
            ("note", _STR, "what a reader must know of this row; null in the normal case"),
            ("settings", _STR, "JSON: version and settings of the rule, protocols of the values it read"),
            _RECORDED,
        ),
        newest_by=("series", "run", "curve", "metric", "site", "layer", "head"),
        newest_of="curve",
        newest_within=("series", "form"),
    ),
    TableSpec(
        "state_models",
        "one row per number of states tried in a fit",
        _schema(
            _MODEL,
            ("k", _I32, "number of states"),
            ("chosen", pa.bool_(), "true for the K whose states and transitions are stored"),
            ("bic", _F64, "BIC on the training runs (lower is better)"),
            ("heldout", _F64, "BIC on the held-out runs (lower is better); null with a single run"),
            ("loglik", _F64, "log-likelihood of the training runs in nats"),
            ("ari", _F64, "mean adjusted Rand index among the best restarts; null with one restart"),
            ("aic", _F64, "AIC on the training runs (lower is better)"),
            ("icl", _F64, "ICL on the training runs (lower is better)"),
            (
                "heldout_loglik",
                _F64,
                "log-likelihood of all runs, each left out of its fit, in nats; null with one run",
            ),
            (
                "bootstrap_ari",
                _F64,
                "mean adjusted Rand index with refits to resampled runs; null with one run",
            ),
            ("bootstrap_refits", _I32, "refits to resampled runs that kept all states; null with one run"),
            ("rule", _STR, "rule the number of states was chosen by, one of docs/states.md"),
            ("failed_restarts", _I32, "restarts that ended in an error, with the reasons in parameters"),
            ("metrics", pa.list_(_STR), "the trajectories that entered, in the order of the parameters"),
            ("train_runs", pa.list_(_STR), "runs the parameters were fitted on"),
            ("heldout_runs", pa.list_(_STR), "runs the parameters never saw"),
            ("parameters", _STR, "JSON: start, transition, means, covariances, scaler, settings, notes"),
            ("grid", _STR, "grid of steps of the frames (docs/states.md); null in rows of earlier versions"),
            ("grid_steps", pa.list_(_I64), "steps of all frames of all runs of the fit, ascending"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "states",
        "one row per checkpoint and fit",
        _schema(
            _MODEL,
            _STEP,
            _TOKENS,
            ("state", _I32, "state of the Viterbi path, numbered by mean time of occupancy"),
            ("posterior", _F64, "smoothed probability of that state"),
            _RECORDED,
        ),
        newest_of="model",
    ),
    TableSpec(
        "transitions",
        "one row per edge of the training map",
        _schema(
            _MODEL,
            ("from", _I32, "state left"),
            ("to", _I32, "state entered"),
            ("count", _I64, "times the edge was taken in the decoded paths of all runs"),
            ("runs", pa.list_(_STR), "runs that took it"),
            ("probability", _F64, "fitted transition probability per checkpoint"),
            (
                "dwell_checkpoints",
                _F64,
                "checkpoints spent in the state left before the edge was taken: median over the times it was",
            ),
            ("dwell_steps", _F64, "the same in steps, from the first checkpoint there to the next state's"),
            ("dwell_tokens", _F64, "the same in tokens; null where they are unknown"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "boundaries",
        "one row per change of state of a run, with the interval of steps in which it lies",
        _schema(
            _MODEL,
            ("from", _I32, "state left"),
            ("to", _I32, "state entered"),
            ("before", _I64, "step of the last checkpoint in the state left"),
            ("step", _I64, "step of the first checkpoint in the state entered"),
            _TOKENS,
            (
                "low",
                _I64,
                "last step of the stay before with a smoothed posterior of `to` below .1; null if none has",
            ),
            (
                "high",
                _I64,
                "first step of the stay after with a smoothed posterior of `to` above .9; null if none has",
            ),
            (
                "bootstrap_low",
                _I64,
                "5th percentile of `step` over the refits to resampled runs that have this change; null if "
                "none has",
            ),
            ("bootstrap_high", _I64, "95th percentile of it"),
            (
                "bootstrap_refits",
                _I32,
                "refits that have this change, of those in state_models; null with one training run",
            ),
            ("dwell_checkpoints", _I64, "checkpoints of the stay that ends here"),
            ("dwell_steps", _I64, "steps from the first checkpoint of that stay to `step`"),
            ("dwell_tokens", _I64, "the same in tokens; null where they are unknown"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "state_means",
        "one row per state and metric of the training map",
        _schema(
            _MODEL,
            ("state", _I32, "number of the state"),
            ("metric", _STR, "trajectory, named as in `metrics` of state_models"),
            ("mean", _F64, "fitted mean in the metric's unit (a logarithm's: geometric mean); null per run"),
            ("low", _F64, "fitted mean minus one standard deviation of the state, in the metric's unit"),
            ("high", _F64, "fitted mean plus one standard deviation of the state, in the metric's unit"),
            ("mean_scaled", _F64, "fitted mean in standard deviations, as the model sees it"),
            ("note", _STR, "why there is no value in the metric's unit; null in the normal case"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "drivers",
        "one row per edge of the training map and metric (run null: all runs), and one per run that took it",
        _schema(
            _MODEL,
            ("from", _I32, "state left"),
            ("to", _I32, "state entered"),
            ("metric", _STR, "trajectory, named as in `metrics` of state_models"),
            (
                "score",
                _F64,
                "mean of abs(d ln p(s_t = to, given x_1..t) / d x_t) at the arrival, nats per scaled unit; "
                "run null: mean over runs; null where no arrival has the metric",
            ),
            ("rank", _I32, "place of the metric at this edge by score, from 1; null without a score above 0"),
            ("runs", _I32, "runs the score rests on"),
            ("shift", _F64, "mean of `to` minus mean of `from` in the metric's unit, signed"),
            ("shift_scaled", _F64, "the same in standard deviations, as the model sees it"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "nulls",
        "one row per fit: the same fit on smooth surrogates of the runs, which have no phases",
        _schema(
            _MODEL,
            _COMPARISON,
            ("k", _I32, "number of states of all these fits: that of the map"),
            ("surrogates", _I32, "surrogates that could be fitted"),
            ("restarts", _I32, "restarts of each fit, on the observed runs too"),
            (
                "heldout",
                pa.bool_(),
                "true: likelihoods of the held-out runs; false: of the fitted run itself",
            ),
            ("loglik", _F64, "log-likelihood of the observed runs, nats per checkpoint with a value"),
            ("surrogate_logliks", pa.list_(_F64), "the same of each surrogate"),
            ("gap", _F64, "loglik minus the mean of surrogate_logliks; null without a surrogate"),
            ("spread", _F64, "standard deviation of surrogate_logliks; null with fewer than two"),
            ("explained", pa.bool_(), "whether smooth surrogates do as well; null where that is open"),
            ("rule_k", _I32, "K by the rule on the observed runs with these restarts; null where not tried"),
            ("surrogate_rule_ks", pa.list_(_I32), "K by the rule on the first surrogates"),
            ("runs", _I32, "runs of the map"),
            (
                "map",
                _MAP,
                "map of the observed runs in this fit: edges, forks, runs that re-enter a state, runs that "
                "share the commonest order of states, whether it has neither fork nor re-entry",
            ),
            ("surrogate_maps", pa.list_(_MAP), "the same of each surrogate"),
            ("same_map", _I32, "surrogates whose map has the edges of the observed one"),
            ("sentence", _STR, "the answer in words, with the gap"),
            ("notes", pa.list_(_STR), "sentences on the maps and on what this null cannot support"),
            _RECORDED,
        ),
        newest_of="comparison",
        per="series",
    ),
    TableSpec(
        "baselines",
        "one row per fit, baseline, trajectory it is about, and run (run null: all runs)",
        _schema(
            _MODEL,
            _COMPARISON,
            ("baseline", _STR, "k-means, change points, or a form of the table curves"),
            ("trajectory", _STR, "trajectory whose phases or growth curve these are; null for the others"),
            (
                "ari",
                _F64,
                "adjusted Rand index with the states of the same checkpoints; null where the baseline has no "
                "boundary",
            ),
            ("n", _I64, "checkpoints it rests on"),
            ("runs", _I32, "runs it rests on"),
            ("boundaries", pa.list_(_I64), "first step of every piece but the first; null for all runs"),
            (
                "labels",
                pa.list_(_I32),
                "label of every piece; k-means: numbered like the states it matches best; change points: in "
                "order; geometric-phases: 0 collapse, 1 expansion, 2 after it; growth curve: 0 up to the "
                "peak, 1 after it",
            ),
            ("note", _STR, "what a reader must know of this row; null in the normal case"),
            _RECORDED,
        ),
        newest_of="comparison",
        per="series",
    ),
    TableSpec(
        "training_frames",
        "one row per frame with a value that a model was fitted to: what online use compares with",
        _schema(
            _MODEL,
            _STEP,
            (
                "values",
                pa.list_(_F64),
                "scaled values in the order of `metrics` of state_models; null: missing",
            ),
            ("log_predicted", pa.list_(_F64), "ln of the probability of every state before the frame"),
            _RECORDED,
        ),
        newest_of="model",
        per="series",
    ),
    TableSpec(
        "online_states",
        "one row per checkpoint and model that decoded it without looking ahead (docs/decode.md)",
        _schema(
            _MODEL,
            ("model_series", _STR, "series the model was fitted to"),
            _STEP,
            _TOKENS,
            ("fitted", pa.bool_(), "true where the model was fitted to this very checkpoint"),
            ("state", _I32, "most probable state by the filter"),
            ("posterior", _F64, "filtering probability of that state"),
            ("surprise", _F64, "-ln p(x_t given x_1..t-1) in nats, of the metrics it has; may be negative"),
            ("misfit", _F64, "smallest -ln p(x_t given a state) in nats over the states"),
            (
                "percentile",
                _F64,
                "training frames with at most that surprise, of the same metrics, in per cent; null "
                "without any",
            ),
            ("compared", _I64, "training frames that have all metrics of this checkpoint"),
            ("flags", pa.list_(_STR), "new: no state explains it; unexpected: a state does, the past not"),
            ("parts", _PARTS, "farthest metrics: deviations z from the state, value and the state's mean"),
            ("missing", pa.list_(_STR), "metrics of the model without a value here"),
            ("log_posterior", pa.list_(_F64), "ln of the filtering probability of every state"),
            ("inputs", _STR, "digest of this frame and all before it: a changed past is decoded again"),
            _RECORDED,
        ),
        newest_by=("series", "run", "model", "step"),
    ),
    TableSpec(
        "outcomes",
        "one row per question whether the states tell an outcome of the runs",
        _schema(
            _MODEL,
            ("outcome", _STR, "what was asked, in words: a metric and its threshold, or a file"),
            ("values", _OUTCOMES, "outcome per run that has one"),
            ("without", pa.list_(_STR), "runs with states and no outcome: they never pass the threshold"),
            ("r2", _F64, "share of the variance explained by the shares of the states; null with a note"),
            ("r2_adjusted", _F64, "r2 adjusted for the degrees of freedom"),
            ("f", _F64, "F statistic against a constant outcome; infinite where the fit is exact"),
            ("p", _F64, "p value of the F test"),
            ("p_permutation", _F64, "p value of the permutation test"),
            ("permutations", _I64, "reassignments of outcomes to runs that were tried"),
            ("rank", _I32, "independent directions of the shares, the constant being one"),
            ("states", _COEFFICIENTS, "per state: coefficient, its error and p, who visits it, detour"),
            ("dissimilarity", _F64, "mean Wasserstein distance between the bags of states of two runs"),
            ("notes", pa.list_(_STR), "sentences a reader must know"),
            _RECORDED,
        ),
        newest_by=("series", "outcome"),
        per="series",
    ),
    TableSpec(
        "failures",
        "one row per failed attempt",
        _schema(
            _STEP,
            ("analyzer", _STR, "analyzer at fault; null when the checkpoint could not be loaded at all"),
            ("error", _STR, "the error in one line"),
            ("attempt", _I32, "1 for the first attempt on this checkpoint"),
            ("at", _AT, "when it failed (UTC)"),
        ),
    ),
    TableSpec(
        "provenance",
        "one row per invocation",
        _schema(
            ("invocation", _STR, "random identity of the invocation"),
            ("command", _STR, "flow that ran"),
            ("config", _STR, "JSON of the configuration it ran with"),
            ("versions", _STR, "JSON: versions of Ontogeny, Python and the packages that compute"),
            ("machine", _STR, "JSON: processor, cores, threads, accelerator, operating system"),
            ("started", _AT, "start (UTC)"),
            ("finished", _AT, "end (UTC)"),
            (
                "counts",
                _STR,
                "JSON: checkpoints, keys computed, keys already there, forward passes, failures",
            ),
        ),
        per="series",
    ),
)

TABLES: dict[str, TableSpec] = {spec.name: spec for spec in _SPECS}
