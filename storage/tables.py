"""Schemas of all tables. docs/schema.md is their specification, and a test compares the two."""

import pyarrow as pa

from storage.table_spec import AT, F64, I32, I64, RECORDED, STEP, STR, TOKENS, TableSpec, schema
from storage.tables_crosscoder import CROSSCODER_TABLES
from storage.tables_states import STATE_TABLES

__all__ = ["SCHEMA_VERSION", "TABLES", "TableSpec"]

SCHEMA_VERSION = 1

_FILES = pa.list_(pa.struct([("name", STR), ("bytes", I64), ("sha256", STR)]))
_NUMBERS = pa.map_(STR, F64)
_INTERVALS = pa.map_(STR, pa.struct([("low", F64), ("high", F64)]))
_KEY = ("key", STR, "content key of the result (weights digest and protocol)")
_PROTOCOL = ("protocol", STR, "JSON: analyzer, version, parameters, probe, dtype, schema version")

_SPECS = (
    TableSpec(
        "checkpoints",
        "one row per checkpoint of the catalogue",
        schema(
            STEP,
            TOKENS,
            ("stage", I32, "training stage where the series has several; null otherwise"),
            ("revision", STR, "branch or folder name the checkpoint was listed under"),
            ("commit", STR, "commit the branch was resolved to, pinned at first sight; null for folders"),
            ("location", STR, "repository or folder the checkpoint is read from"),
            ("weights_sha256", STR, "digest of the weight files; null where it is not known yet"),
            ("bytes", I64, "size of the weight files in bytes"),
            ("fingerprint", STR, "what tells that the digest still holds: commit, or sizes and times"),
            ("dtype", STR, "dtype of most weights as stored; null where it is not known yet"),
            ("files", _FILES, "weight files: name, size in bytes, SHA-256"),
            ("config_digest", STR, "git blob SHA-1 of config.json; null where there is none"),
            ("tokenizer_digest", STR, "digest of the tokenizer's files; null where there are none"),
            ("text_bytes", I64, "size of configuration and tokenizer files; null for folders"),
            RECORDED,
        ),
        newest_by=("series", "run", "step", "stage"),
    ),
    TableSpec(
        "findings",
        "one row per finding of the latest audit",
        schema(
            ("step", I64, "checkpoint the finding is about; null when it is about the run"),
            ("kind", STR, "what was found, one of the kinds listed in docs/audit.md"),
            ("severity", STR, "error, warning or note; an error excludes the checkpoint from measuring"),
            ("detail", STR, "one sentence with the values"),
            ("revision", STR, "branch or folder the finding is about; null when it is about the run"),
            RECORDED,
        ),
    ),
    TableSpec(
        "metrics",
        "one row per checkpoint, metric and place",
        schema(
            STEP,
            TOKENS,
            ("analyzer", STR, "analyzer that produced the row"),
            ("metric", STR, "metric, one of docs/metrics.md"),
            ("site", STR, "place in the network or kind of weight matrix; null for the whole model"),
            ("layer", I32, "block, counted from 0; null outside the blocks"),
            ("head", I32, "attention head; null where the row is not about one"),
            ("value", F64, "the number; null where it could not be computed, with the reason in note"),
            ("n", I64, "observations the value rests on (tokens, sequences or weights)"),
            ("note", STR, "what a reader must know of this value; null in the normal case"),
            _KEY,
            _PROTOCOL,
            RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "metric", "site", "layer", "head"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "spectra",
        "one row per checkpoint, site, layer and half",
        schema(
            STEP,
            ("analyzer", STR, "analyzer that produced the row"),
            ("site", STR, "place in the network"),
            ("layer", I32, "block, counted from 0; null outside the blocks"),
            ("half", STR, "all, first or second: whole sample or one half of its sequences"),
            ("centered", pa.bool_(), "true: centred covariance; false: raw second moment"),
            ("n", I64, "rows (tokens or sequences) the spectrum rests on"),
            ("eigenvalues", pa.list_(F64), "eigenvalues in descending order, divided by n"),
            _KEY,
            _PROTOCOL,
            RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "site", "layer", "half", "centered"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "sequence_values",
        "one row per checkpoint, metric and place whose values on single sequences are kept",
        schema(
            STEP,
            ("analyzer", STR, "analyzer that produced the row"),
            ("metric", STR, "metric, one of docs/metrics.md"),
            ("site", STR, "place in the network; null for the whole model"),
            ("layer", I32, "block, counted from 0; null outside the blocks"),
            ("head", I32, "attention head; null where the row is not about one"),
            ("sequences", pa.list_(I64), "numbers of the sequences within the probe, ascending, from 0"),
            ("values", pa.list_(F64), "the metric on each of them; null where it has no finite value"),
            _KEY,
            _PROTOCOL,
            RECORDED,
        ),
        newest_by=("series", "run", "step", "protocol", "metric", "site", "layer", "head"),
        newest_of="protocol",
        newest_within=("series", "run", "analyzer"),
    ),
    TableSpec(
        "curves",
        "one row per trajectory and form fitted to it, and one per series (run null) for all runs together",
        schema(
            ("curve", STR, "identity of the fit: digest of its data, form and settings"),
            ("metric", STR, "metric of the trajectory, one of docs/metrics.md"),
            ("site", STR, "place in the network; null for the whole model"),
            ("layer", I32, "block, counted from 0; null outside the blocks"),
            ("head", I32, "attention head; null where the row is not about one"),
            (
                "form",
                STR,
                "what was fitted; geometric-phases is docs/phases.md, head-birth is docs/massive.md",
            ),
            ("class", STR, "shape of the whole trajectory; null where it could not be judged"),
            ("n", I64, "checkpoints with a usable value"),
            ("runs", pa.list_(STR), "runs that entered"),
            ("parameters", _NUMBERS, "numbers of the fit by name; what was not found has no entry"),
            ("intervals", _INTERVALS, "low and high of those parameters that have an interval"),
            ("r2", F64, "share of the variance explained; null for forms that are no function"),
            ("aic", F64, "Akaike's criterion (lower is better); null for forms that are no function"),
            (
                "peak_step",
                I64,
                "step of the peak, or of the birth of a head, where the form has one; null: none is seen",
            ),
            ("note", STR, "what a reader must know of this row; null in the normal case"),
            ("settings", STR, "JSON: version and settings of the rule, protocols of the values it read"),
            RECORDED,
        ),
        newest_by=("series", "run", "curve", "metric", "site", "layer", "head"),
        newest_of="curve",
        newest_within=("series", "form"),
    ),
    *STATE_TABLES,
    *CROSSCODER_TABLES,
    TableSpec(
        "failures",
        "one row per failed attempt",
        schema(
            STEP,
            ("analyzer", STR, "analyzer at fault; null when the checkpoint could not be loaded at all"),
            ("error", STR, "the error in one line"),
            ("attempt", I32, "1 for the first attempt on this checkpoint"),
            ("at", AT, "when it failed (UTC)"),
        ),
    ),
    TableSpec(
        "provenance",
        "one row per invocation",
        schema(
            ("invocation", STR, "random identity of the invocation"),
            ("command", STR, "flow that ran"),
            ("config", STR, "JSON of the configuration it ran with"),
            ("versions", STR, "JSON: versions of Ontogeny, Python and the packages that compute"),
            ("machine", STR, "JSON: processor, cores, threads, accelerator, operating system"),
            ("started", AT, "start (UTC)"),
            ("finished", AT, "end (UTC)"),
            (
                "counts",
                STR,
                "JSON: checkpoints, keys computed, keys already there, forward passes, failures",
            ),
        ),
        per="series",
    ),
)

TABLES: dict[str, TableSpec] = {spec.name: spec for spec in _SPECS}
