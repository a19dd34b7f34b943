"""The page itself: the template filled in, with the data, the script and plotly.js inside."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from analyzers.crosscoder.population import METRICS as CROSSCODER_METRICS
from analyzers.latent import training_map
from analyzers.registry import load_all
from flows.report import baselines, crosscoder, drivers, growth, heads, outcomes, phases, states, text
from flows.report.data import Protocol, ReportData, Row, Trajectory, read_json
from flows.report.pack import pack_values, packed_plotly
from flows.report.selection import HEIGHT, WIDTH, panels
from flows.report.stages import stages
from flows.report.summary import in_short, lasting, summarize
from flows.report.training_map import draw, ink_on, state_colors
from flows.report.words import PLAIN
from tasks.training_log import KNOWN

_HERE = Path(__file__).parent
_DEFAULT = ("rankme_cov", "resid_post")


def render(data: ReportData, crosscoders: list[crosscoder.CrosscoderPart]) -> str:
    """The complete page; everything that comes from the tables is escaped."""
    rows = states.state_rows(data)
    phase_places = phases.places(data)
    growth_places = growth.places(data)
    head_maps = heads.maps(data)
    walks = states.paths(data)
    bands = baselines.payload(data.baselines, walks)
    chosen = data.chosen
    points = summarize(data)
    packed = pack_values(data.shown, data.runs)
    colors = state_colors(1 + max((row.state for row in rows), default=-1))
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "moment": text.moment,
        "flat": text.flat,
        "join_words": text.join,
        "plural": text.plural,
    }
    return environment.get_template("template.html.j2").render(
        data=data,
        absent=text.ABSENT,
        points=points,
        short=in_short(points),
        states=rows,
        colors=colors,
        inks=[ink_on(color) for color in colors],
        walks=walks,
        stages=stages(data, walks),
        changes=training_map.changes(walks),
        odd=states.oddities(walks),
        cautions=states.cautions(chosen) if chosen is not None else [],
        remarks=states.remarks(chosen) if chosen is not None else [],
        selection=panels(data.models) if chosen is not None else [],
        selection_size=(WIDTH, HEIGHT),
        map=draw(data, rows, colors) if rows else None,
        score=drivers.score,
        strongest=drivers.strongest(data.drivers),
        null=baselines.null_lines(data.nulls),
        beside=baselines.whole(data.baselines),
        bands=bands,
        answers=[outcomes.describe(row) for row in data.outcomes],
        phase_places=phase_places,
        growth_places=growth_places,
        head_maps=head_maps,
        head_lines=heads.lines(head_maps),
        crosscoders=crosscoders,
        crosscoder_payload=Markup(crosscoder.payload_text(crosscoders)),
        crosscoder_script=Markup((_HERE / "crosscoder.js").read_text(encoding="utf-8")),
        layered=any(t.layer is not None for t in data.trajectories),
        lasting=lasting(data),
        protocols=[_protocol_row(protocol) for protocol in data.protocols],
        invocations=[_invocation_row(row) for row in data.provenance],
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(packed_plotly()),
        packed=packed,
        payload=Markup(
            _embed(
                payload(data, colors, phase_places, growth_places, head_maps)
                | {"bands": bands, "digits": packed.digits}
            )
        ),
    )


def payload(
    data: ReportData,
    colors: list[str],
    phase_places: list[phases.PhasePlace],
    growth_places: list[growth.GrowthPlace],
    head_maps: list[heads.HeadMap],
) -> dict[str, Any]:
    """What the script draws from: every trajectory once; its values are packed beside it."""
    return {
        "series": data.series,
        "runs": [
            {
                "name": run.name,
                "steps": run.steps,
                "tokens": run.tokens,
                "states": run.states,
                "posteriors": run.posteriors,
            }
            for run in data.runs
        ],
        "trajectories": [
            {
                "analyzer": t.analyzer,
                "metric": t.metric,
                "site": t.site,
                "layer": t.layer,
                "head": t.head,
                "over": t.over,
                "n": t.n,
            }
            for t in data.shown
        ],
        "start": _start(data.trajectories),
        "phases": phases.payload(data, phase_places),
        "growth": growth.payload(data, growth_places),
        "heads": heads.payload(data, head_maps),
        "stateColors": colors,
        "stateInks": [ink_on(color) for color in colors],
        "protocols": _captions(data.protocols),
        "metrics": _about({t.metric for t in data.trajectories}),
    }


def _about(names: set[str]) -> dict[str, dict[str, str]]:
    """Formula, unit and range of the metrics that are documented; those from elsewhere have none."""
    metrics = [*(m for cls in load_all().values() for m in cls.metrics), *CROSSCODER_METRICS]
    known = {metric.name: (metric.formula, metric.unit, metric.range) for metric in metrics}
    known |= {name: (meaning, unit, "") for name, (_, meaning, unit) in KNOWN.items()}
    # A metric without a dimension has the unit 1, which says nothing on an axis.
    return {
        name: {
            "formula": known[name][0],
            "unit": "" if known[name][1] == "1" else known[name][1],
            "range": known[name][2],
            "plain": PLAIN[name],
        }
        for name in sorted(names & known.keys())
    }


def _embed(value: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _start(trajectories: list[Trajectory]) -> int:
    """Index of the trajectory shown first: RankMe of the last block if measured, else the first one."""
    wanted = [
        (t.layer, i)
        for i, t in enumerate(trajectories)
        if (t.metric, t.site) == _DEFAULT and t.layer is not None and t.head is None
    ]
    return max(wanted)[1] if wanted else 0


def _captions(protocols: list[Protocol]) -> dict[str, str]:
    """Per analyzer, its protocol in one line; runs are named where they were measured differently."""
    lines: dict[str, list[str]] = {}
    for protocol in protocols:
        row = _protocol_row(protocol)
        parts = [f"{protocol.analyzer} {row['version']}".removesuffix(f" {text.ABSENT}")]
        parts += [
            f"{name} {row[name]}" for name in ("probe", "dtype", "parameters") if row[name] != text.ABSENT
        ]
        lines.setdefault(protocol.analyzer, []).append("; ".join(parts))
    runs = {analyzer: [p.runs for p in protocols if p.analyzer == analyzer] for analyzer in lines}
    return {
        analyzer: found[0]
        if len(found) == 1
        else " / ".join(f"{', '.join(who)}: {line}" for who, line in zip(runs[analyzer], found, strict=True))
        for analyzer, found in lines.items()
    }


def _protocol_row(protocol: Protocol) -> Row:
    fields = dict(protocol.fields)
    fields.pop("analyzer", None)
    known = {name: text.flat(fields.pop(name, None)) for name in ("version", "probe", "dtype", "parameters")}
    return {**known, "analyzer": protocol.analyzer, "runs": protocol.runs, "rest": text.flat(fields)}


def _invocation_row(row: Row) -> Row:
    started, finished = row["started"], row["finished"]
    parsed = {name: read_json(row[name]) for name in ("config", "versions", "machine", "counts")}
    minutes = (finished - started).total_seconds() / 60 if started and finished else None
    return {
        **parsed,
        "command": row["command"] or text.ABSENT,
        "started": started,
        "took": text.ABSENT if minutes is None else f"{minutes:.1f} min",
        "config_text": json.dumps(parsed["config"], indent=2, sort_keys=True),
    }
