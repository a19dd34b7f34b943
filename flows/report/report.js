// Draws the plots of the report from the data embedded in the page.
"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);

  // ---- unpacking: flows/report/pack.py is the other half

  async function unpack(id) {
    const raw = Uint8Array.from(atob(byId(id).textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }

  if (!("DecompressionStream" in window)) {
    byId("too-old").hidden = false;
    return;
  }
  const library = document.createElement("script");
  library.textContent = new TextDecoder().decode(await unpack("plotly-packed"));
  document.head.append(library);
  const planes = new Uint8Array(await unpack("values-packed")), total = planes.length / 4;
  const bits = new DataView(new ArrayBuffer(8));
  const valueAt = (i) => {
    for (let plane = 0; plane < 4; plane++) bits.setUint8(plane, planes[plane * total + i]);
    const value = bits.getFloat64(0);
    return Number.isNaN(value) ? null : Number(value.toPrecision(data.digits));
  };
  // A page may hold millions of values, a plot shows a few thousand: they are unpacked where they are asked for.
  let begin = 0;
  const lengths = data.runs.map((run) => run.steps.length), stride = lengths.reduce((a, b) => a + b, 0);
  for (const t of data.trajectories) {
    const offset = begin;
    let found;
    Object.defineProperty(t, "values", { get: () => {
      if (!found) {
        let at = offset;
        found = lengths.map((n) => { const values = Array.from({ length: n }, (_, i) => valueAt(at + i)); at += n; return values.some((v) => v !== null) ? values : null; });
      }
      return found;
    } });
    begin += stride;
  }
  // A list of what is wanted: by default Plotly offers a button that uploads the chart to its makers.
  const config = {
    displaylogo: false, displayModeBar: true, responsive: true, plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const runColors = 6;

  // ---- words and numbers

  // Plotly reads a little HTML in its texts; names from tables must stay plain.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const spell = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 6 });
  const short = (x) => {
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) if (x >= size) return `${Number((x / size).toPrecision(4))}${letter}`;
    return String(x);
  };
  const siteName = (site) => site === null ? "whole model" : site;
  const unitOf = (metric) => (data.metrics[metric] || {}).unit || "";
  const titled = (metric) => plain(metric) + (unitOf(metric) ? ` (${plain(unitOf(metric))})` : "");
  const measured = (metric, value) => `${plain(metric)} ${value === null ? "absent" : spell(value) + (unitOf(metric) ? ` ${plain(unitOf(metric))}` : "")}`;
  const overLayers = { mean: "mean over layers", min: "least over layers", max: "largest over layers" };
  const layerName = (t) => t.over !== null ? overLayers[t.over] || t.over : t.layer === null ? "none" : String(t.layer);
  // What a metric is called on our pages, and what it is in plain words where we have any.
  const inWords = (metric) => { const words = (data.metrics[metric] || {}).plain; return words && words !== metric ? words : ""; };
  const optionName = (metric) => inWords(metric) ? `${metric}: ${inWords(metric)}` : metric;
  const headName = (head) => head === null ? "all" : String(head);
  const placeOf = (t) => siteName(t.site) + (t.over !== null ? `, ${layerName(t)}` : t.layer === null ? "" : `, layer ${t.layer}`) + (t.head === null ? "" : `, head ${t.head}`);

  // ---- the step axis

  // Every plot over training shares this axis: what it counts, its scale, and the part that is zoomed into.
  const chosenView = () => ({ unit: byId("step-unit") ? byId("step-unit").value : "step", scale: byId("step-axis") ? byId("step-axis").value : "symlog" });
  const growing = (numbers) => numbers.every((x, i) => x !== null && (i === 0 || x > numbers[i - 1]));
  const tokensKnown = data.runs.length > 0 && data.runs.every((run) => growing(run.tokens));
  const pace = (run) => { const i = run.steps.findIndex((step) => step > 0); return i < 0 ? 1 : run.tokens[i] / run.steps[i] || 1; };
  // Tokens of one step: where it differs between runs, what is said of all runs together has no place in tokens.
  const paces = tokensKnown ? data.runs.map(pace) : [];
  const onePace = paces.every((x) => x === paces[0]);

  function amount(run, step, view) {
    if (view.unit === "step") return step;
    if (!run) return onePace ? step * paces[0] : null;
    const last = run.steps.length - 1;
    let i = run.steps.findIndex((s) => s >= step);
    if (i < 0) i = last;
    if (run.steps[i] === step || last === 0) return run.tokens[i];
    i = Math.max(i, 1);
    const part = (step - run.steps[i - 1]) / (run.steps[i] - run.steps[i - 1]);
    return run.tokens[i - 1] + part * (run.tokens[i] - run.tokens[i - 1]);
  }

  // symlog is log10(1 + x), x in steps or in the tokens of one step: linear around 0, so that step 0 has a place.
  function spot(x, view) {
    if (x === null || view.scale === "linear") return x;
    if (view.scale === "log") return x > 0 ? Math.log10(x) : null;
    return Math.log10(1 + x / (view.unit === "token" ? Math.min(...paces) : 1));
  }

  const position = (step, view, run) => spot(amount(run, step, view), view);

  function stepAxis(runs, view) {
    const noun = view.unit === "token" ? "training tokens" : "training step";
    const all = runs.flatMap((run) => run.steps.map((step) => amount(run, step, view)));
    const first = Math.min(...all), last = Math.max(...all);
    const ends = runs.flatMap((run) => cellEdges(run, view)).filter(Number.isFinite);
    const whole = [Math.min(...ends), Math.max(...ends)];
    const axis = { title: { text: view.scale === "linear" ? noun : `${noun} (${view.scale})`, font: { size: 13 }, standoff: 8 }, zeroline: false, range: zoom && linked() ? zoom : whole };
    if (view.scale === "linear") return axis;
    const inside = (x) => x >= first && x <= last;
    const least = view.unit === "token" ? 10 ** Math.floor(Math.log10(Math.min(...paces))) : 1;
    let ticks = [];
    for (const digits of [[1], [1, 3], [1, 2, 5]]) {
      ticks = first === 0 && view.scale === "symlog" ? [0] : [];
      for (let decade = least; decade <= last; decade *= 10) ticks.push(...digits.map((d) => d * decade).filter(inside));
      if (ticks.length >= 5) break;
    }
    return { ...axis, tickmode: "array", tickvals: ticks.map((x) => spot(x, view)), ticktext: ticks.map(short) };
  }

  // Edges of cells around steps: halfway to the neighbours on the axis as drawn. A logarithm leaves no place for
  // step 0: its cell has no width.
  function cellEdges(run, view) {
    const at = run.steps.map((step) => position(step, view, run));
    if (at[0] === null) {
      if (at.length === 1) return [null, null];
      const rest = halfway(at.slice(1));
      return [rest[0], ...rest];
    }
    return halfway(at);
  }

  function halfway(at) {
    if (at.length === 1) return [at[0] - 0.5, at[0] + 0.5];
    const middle = at.slice(1).map((x, i) => (x + at[i]) / 2);
    const n = at.length;
    return [at[0] - (middle[0] - at[0]), ...middle, at[n - 1] + (at[n - 1] - middle[n - 2])];
  }

  // ---- zooming one plot zooms the others

  let zoom = null, following = false;
  const linked = () => !byId("link-axes") || byId("link-axes").checked;

  function link(plot) {
    if (!plot || plot.dataset.linked || !plot.on) return;
    plot.dataset.linked = "yes";
    plot.on("plotly_relayout", async (change) => {
      const from = change["xaxis.range[0]"] ?? (change["xaxis.range"] || [])[0];
      const to = change["xaxis.range[1]"] ?? (change["xaxis.range"] || [])[1];
      if (following || !linked() || (from === undefined && !change["xaxis.autorange"])) return;
      following = true;
      try {
        zoom = change["xaxis.autorange"] || same([from, to], plot) ? null : [from, to];
        if (zoom === null) drawAll();
        else for (const other of plots()) if (other !== plot && other.layout) await Plotly.relayout(other, { "xaxis.range": [...zoom] });
      } finally { following = false; }
    });
  }

  // Back at the range that the axis had at first.
  const same = ([from, to], plot) => {
    const start = plot._fullLayout.xaxis._rangeInitial0 ?? null, end = plot._fullLayout.xaxis._rangeInitial1 ?? null;
    return start !== null && Math.abs(from - start) + Math.abs(to - end) < 1e-9;
  };

  // ---- theme

  const root = document.documentElement;
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function layoutBase() {
    const axis = { gridcolor: color("--grid"), linecolor: color("--rule"), zerolinecolor: color("--rule"), automargin: true, ticks: "outside", tickcolor: color("--rule"), ticklen: 4 };
    return {
      axis,
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--ink") },
        hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--rule"), font: { color: color("--ink") }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--ink") },
      },
    };
  }

  // ---- pickers: each one offers what the choices before it leave

  const levels = {
    metric: { key: (t) => `${t.analyzer}\n${t.metric}`, name: (t) => optionName(t.metric), group: (t) => t.analyzer },
    site: { key: (t) => JSON.stringify(t.site), name: (t) => siteName(t.site) },
    layer: { key: (t) => JSON.stringify([t.layer, t.over]), name: layerName },
    head: { key: (t) => JSON.stringify(t.head), name: (t) => headName(t.head) },
  };

  function offer(select, level, candidates) {
    const before = select.value;
    const options = new Map();
    for (const t of candidates) if (!options.has(level.key(t))) options.set(level.key(t), t);
    select.replaceChildren();
    const groups = new Map();
    for (const [key, t] of options) {
      let parent = select;
      if (level.group) {
        parent = groups.get(level.group(t));
        if (!parent) {
          parent = document.createElement("optgroup");
          parent.label = level.group(t);
          groups.set(parent.label, parent);
          select.append(parent);
        }
      }
      parent.append(new Option(level.name(t), key));
    }
    // The last layer is what most readers want; elsewhere the first option will do.
    const keys = [...options.keys()], single = keys.filter((key) => options.get(key).over === null);
    select.value = options.has(before) ? before : level === levels.layer && single.length ? single[single.length - 1] : keys[0];
    select.disabled = keys.length < 2;
  }

  function pickers(prefix, names, trajectories, changed) {
    const chain = names.map((name) => [byId(`${prefix}-${name}`), levels[name]]);
    function refresh() {
      let left = trajectories;
      for (const [select, level] of chain) {
        offer(select, level, left);
        left = left.filter((t) => level.key(t) === select.value);
        if (level === levels.head) select.parentElement.hidden = select.disabled;
      }
      return left;
    }
    const start = data.trajectories[data.start];
    for (const [select, level] of chain) select.append(new Option("", level.key(start), true, true));
    for (const [select] of chain) select.addEventListener("change", () => { refresh(); changed(); });
    refresh();
    refresh.choose = (t) => {
      for (const [select, level] of chain) select.replaceChildren(new Option("", level.key(t), true, true));
      refresh();
      changed();
    };
    return refresh;
  }

  // ---- trajectories and ribbons

  const stateText = (run, i) => {
    if (run.states[i] === null) return "";
    const sure = run.posteriors[i] === null ? "" : ` (posterior ${spell(run.posteriors[i])})`;
    return `<br>state ${run.states[i]}${sure}`;
  };
  const tokenText = (run, i) => run.tokens[i] === null ? "" : ` (${spell(run.tokens[i])} tokens)`;

  function lineTraces(trajectory, scale, bend = (value) => value) {
    return data.runs.map((run, r) => ({ run, r, values: trajectory.values[r] })).filter((line) => line.values).map(({ run, r, values }) => ({
      type: "scatter", mode: "lines+markers", name: plain(run.name), connectgaps: false,
      x: run.steps.map((step) => position(step, scale, run)), y: values.map(bend),
      line: { width: 2, color: color(`--run-${r % runColors}`), dash: dashes[Math.floor(r / runColors) % dashes.length] },
      marker: { size: run.steps.length > 60 ? 3 : 5 },
      customdata: run.steps.map((step, i) => `step ${spell(step)}${tokenText(run, i)}<br>${measured(trajectory.metric, values[i])}${stateText(run, i)}`),
      hovertemplate: "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
    }));
  }

  function stays(run, scale) {
    const edges = cellEdges(run, scale), found = [];
    run.states.forEach((state, i) => {
      const last = found[found.length - 1];
      if (state === null) return;
      if (last && last.state === state && last.to === i - 1) { last.to = i; last.end = edges[i + 1]; }
      else found.push({ run, state, from: i, to: i, start: edges[i], end: edges[i + 1] });
    });
    return found;
  }

  function ribbonTraces(scale) {
    const all = data.runs.flatMap((run) => stays(run, scale));
    return data.stateColors.map((fill, state) => ({ fill, state, mine: all.filter((stay) => stay.state === state) })).filter(({ mine }) => mine.length).map(({ fill, state, mine }) => ({
      type: "bar", orientation: "h", yaxis: "y2", name: `state ${state}`, showlegend: false, width: 0.82,
      base: mine.map((stay) => stay.start), x: mine.map((stay) => stay.end - stay.start), y: mine.map((stay) => plain(stay.run.name)),
      marker: { color: fill, line: { width: 1, color: color("--paper") } },
      text: mine.map(() => String(state)), textposition: "inside", insidetextanchor: "middle", textangle: 0,
      textfont: { color: data.stateInks[state] }, constraintext: "inside", cliponaxis: true,
      customdata: mine.map(({ run, from, to }) => `steps ${spell(run.steps[from])} to ${spell(run.steps[to])}, ${to - from + 1} ${to === from ? "checkpoint" : "checkpoints"}`),
      hovertemplate: `<b>%{y}</b><br>state ${state}: %{customdata}<extra></extra>`,
    }));
  }

  const caption = (t) => {
    const count = t.n === null ? "" : ` n = ${t.n[0] === t.n[1] ? spell(t.n[0]) : `${spell(t.n[0])} to ${spell(t.n[1])}`} observations per value.`;
    const about = data.metrics[t.metric];
    const meaning = about ? ` It is ${about.formula}; ${about.unit ? `unit ${about.unit}` : "no unit"}${about.range ? `, range ${about.range}` : ""}.` : "";
    const words = inWords(t.metric) ? ` (${inWords(t.metric)})` : "";
    return `${t.metric}${words}, ${placeOf(t)}.${meaning}${count} Protocol: ${data.protocols[t.analyzer] || "not recorded"}.`;
  };

  // Plotly labels the steps between decades with single digits, which read as values.
  function logAxis(values) {
    const positive = values.filter((value) => value > 0);
    if (!positive.length) return { type: "log" };
    const low = Math.min(...positive), high = Math.max(...positive), decades = Math.log10(high / low);
    const digits = decades < 1.2 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : decades < 3 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d++) ticks.push(...digits.map((x) => Number(`${x}e${d}`)));
    const shown = ticks.filter((x) => x >= low / 1.3 && x <= high * 1.3);
    // A narrow range may hold none of these.
    return shown.length < 3 ? { type: "log", dtick: "D2" } : { type: "log", tickmode: "array", tickvals: shown, ticktext: shown.map((x) => x >= 1e6 || x < 1e-4 ? x.toExponential() : String(x)) };
  }

  // Values on a symlog axis: linear around 0 up to the smallest magnitude of the upper thousand-fold, so that
  // signs and zeros have a place.
  function valueAxis(values, kind) {
    const known = values.filter((value) => value !== null), most = Math.max(...known.map(Math.abs), 0);
    if (kind === "log") return { bend: (value) => value, axis: logAxis(known) };
    if (kind !== "symlog" || most === 0) return { bend: (value) => value, axis: { type: "linear" } };
    const sizes = known.map(Math.abs).filter((size) => size >= most / 1000);
    const unit = 10 ** Math.floor(Math.log10(Math.min(...sizes)));
    const bend = (value) => value === null ? null : Math.sign(value) * Math.log10(1 + Math.abs(value) / unit);
    const ticks = [0];
    for (let size = unit; size <= most; size *= 10) ticks.push(size, -size);
    const low = Math.min(...known), high = Math.max(...known);
    const shown = ticks.filter((x) => x >= Math.min(low, 0) && x <= Math.max(high, 0));
    return { bend, axis: { type: "linear", tickmode: "array", tickvals: shown.map(bend), ticktext: shown.map((x) => String(Number(x.toPrecision(3))).replace("-", "\u2212")) } };
  }

  let pickLine = null, pickHeat = null;

  function drawLines() {
    if (!pickLine) return;
    const trajectory = pickLine()[0];
    const scale = chosenView();
    const decoded = data.runs.filter((run) => run.states.some((state) => state !== null));
    const { axis, layout } = layoutBase();
    const plot = 360, gap = decoded.length ? 14 : 0, ribbons = decoded.length * 26, inner = plot + gap + ribbons;
    const margin = { l: 70, r: 40, t: 44, b: 56 };
    const { bend, axis: bent } = valueAxis(trajectory.values.flatMap((values) => values || []), byId("value-axis").value);
    const x = { ...axis, ...stepAxis(data.runs, scale), anchor: decoded.length ? "y2" : "y" };
    Plotly.react(byId("line-plot"), [...lineTraces(trajectory, scale, bend), ...ribbonTraces(scale)], {
      ...layout, margin, modebar: { ...layout.modebar, orientation: "v" }, height: inner + margin.t + margin.b, barmode: "overlay", hovermode: "closest", showlegend: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
      uniformtext: { minsize: 9, mode: "hide" },
      xaxis: x,
      yaxis: { ...axis, ...bent, domain: [(ribbons + gap) / inner, 1], title: { text: `${titled(trajectory.metric)}<br><span style="font-size:11px">${plain([inWords(trajectory.metric), placeOf(trajectory)].filter(Boolean).join(", "))}</span>`, standoff: 8, font: { size: 13 } }, exponentformat: "power" },
      yaxis2: { ...axis, type: "category", visible: decoded.length > 0, domain: [0, decoded.length ? ribbons / inner : 0.001], categoryorder: "array", categoryarray: decoded.map((run) => plain(run.name)), autorange: "reversed", showgrid: false, ticks: "", fixedrange: true },
    }, config);
    byId("line-caption").textContent = caption(trajectory);
  }

  // ---- heat map

  function drawHeat() {
    if (!pickHeat) return;
    const scale = chosenView(), log = byId("heat-colors").value === "log";
    const r = Number(byId("heat-run").value), run = data.runs[r];
    const rows = pickHeat().filter((t) => t.values[r]).sort((a, b) => a.layer - b.layer);
    const shown = (value) => value === null || (log && value <= 0) ? null : log ? Math.log10(value) : value;
    const z = rows.map((t) => t.values[r].map(shown));
    const { axis, layout } = layoutBase();
    const margin = { l: 70, r: 16, t: 30, b: 56 };
    const numbers = z.flat().filter((value) => value !== null);
    const bar = { thickness: 12, outlinewidth: 0, title: { text: rows.length ? titled(rows[0].metric) : "", side: "right", font: { size: 13 } } };
    if (log && numbers.length) {
      const decades = [];
      for (let d = Math.ceil(Math.min(...numbers)); d <= Math.max(...numbers); d++) decades.push(d);
      if (decades.length > 1) Object.assign(bar, { tickvals: decades, ticktext: decades.map((d) => `10<sup>${d}</sup>`) });
      else Object.assign(bar, tickEnds(numbers));
    }
    const trace = {
      type: "heatmap", colorscale: "Viridis", hoverongaps: false, colorbar: bar, z,
      x: cellEdges(run, scale), y: rows.map((t) => String(t.layer)),
      customdata: rows.map((t) => t.values[r].map((value, i) => value === null ? "" : `step ${spell(run.steps[i])}${tokenText(run, i)}<br>${measured(t.metric, value)}${stateText(run, i)}`)),
      hovertemplate: "<b>layer %{y}</b><br>%{customdata}<extra></extra>",
    };
    Plotly.react(byId("heat-plot"), [trace], {
      ...layout, margin, height: Math.max(240, Math.min(rows.length * 26, 560)) + margin.t + margin.b,
      xaxis: { ...axis, ...stepAxis([run], scale), showgrid: false },
      yaxis: { ...axis, type: "category", title: { text: "layer", standoff: 8, font: { size: 13 } }, showgrid: false, nticks: 24 },
    }, config);
    byId("heat-caption").textContent = rows.length
      ? `${caption({ ...rows[0], layer: null })} Run ${run.name}.`
      : `Run ${run.name} has no values of this metric.`;
  }

  function tickEnds(numbers) {
    const ends = [Math.min(...numbers), Math.max(...numbers)];
    return { tickvals: ends, ticktext: ends.map((value) => (10 ** value).toPrecision(3)) };
  }

  // ---- phases

  const phaseNames = { collapse: "end of collapse", expansion: "end of expansion" };

  const runOf = (row) => data.runs.find((run) => run.name === row.run);

  function phaseTraces(rows, scale) {
    const floor = cellEdges(data.runs[0], scale)[0];
    return Object.entries(phaseNames).map(([phase, name]) => ({ phase, name, mine: rows.filter((row) => row.ends[phase] && amount(runOf(row), row.ends[phase][0], scale) !== null) })).filter(({ mine }) => mine.length).flatMap(({ phase, name, mine }) => {
      const at = (row, i) => Math.max(position(row.ends[phase][i], scale, runOf(row)) ?? floor, floor);
      const shared = { yaxis: "y2", name, y: mine.map((row) => plain(row.run)) };
      return [
        {
          ...shared, type: "bar", orientation: "h", showlegend: false, hoverinfo: "skip", width: 0.7,
          base: mine.map((row) => at(row, 1)), x: mine.map((row) => at(row, 2) - at(row, 1)),
          marker: { color: color(`--phase-${phase}`), opacity: 0.35 },
        },
        {
          ...shared, type: "scatter", mode: "markers", showlegend: true, x: mine.map((row) => at(row, 0)),
          marker: { symbol: "diamond", size: 9, color: color(`--phase-${phase}`) },
          customdata: mine.map((row) => `step ${spell(row.ends[phase][0])} (${spell(row.ends[phase][1])} to ${spell(row.ends[phase][2])})`),
          hovertemplate: `<b>%{y}</b><br>${name}: %{customdata}<extra></extra>`,
        },
      ];
    });
  }

  function drawPhases() {
    if (!byId("phase-plot")) return;
    const chosen = data.phases[Number(byId("phase-place").value)];
    const scale = chosenView();
    if (chosen.trajectory === null) {
      Plotly.purge(byId("phase-plot"));
      byId("phase-caption").textContent = "The store no longer shows the trajectory of these phases.";
      return;
    }
    const trajectory = data.trajectories[chosen.trajectory];
    const { axis, layout } = layoutBase();
    const plot = 300, gap = 14, bars = chosen.rows.some((row) => Object.keys(row.ends).length) ? chosen.rows.length * 24 : 0, inner = plot + gap + bars;
    const margin = { l: 70, r: 40, t: 44, b: 56 };
    const pooled = chosen.rows.find((row) => row.pooled);
    const floor = cellEdges(data.runs[0], scale)[0];
    const bands = pooled && (scale.unit === "step" || onePace) ? Object.entries(pooled.ends).map(([phase, [, low, high]]) => ({
      type: "rect", xref: "x", yref: "y domain", x0: position(low, scale) ?? floor, x1: position(high, scale) ?? floor, y0: 0, y1: 1,
      fillcolor: color(`--phase-${phase}`), opacity: 0.14, line: { width: 0 }, layer: "below",
    })) : [];
    Plotly.react(byId("phase-plot"), [...lineTraces(trajectory, scale), ...phaseTraces(chosen.rows, scale)], {
      ...layout, margin, shapes: bands, modebar: { ...layout.modebar, orientation: "v" }, height: inner + margin.t + margin.b, barmode: "overlay", hovermode: "closest", showlegend: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
      xaxis: { ...axis, ...stepAxis(data.runs, scale), anchor: "y2" },
      yaxis: { ...axis, ...logAxis(trajectory.values.flatMap((values) => values || [])), domain: [(bars + gap) / inner, 1], title: { text: titled(trajectory.metric), standoff: 8, font: { size: 13 } }, exponentformat: "power" },
      yaxis2: { ...axis, type: "category", visible: bars > 0, domain: [0, bars ? bars / inner : 0.001], categoryorder: "array", categoryarray: chosen.rows.map((row) => plain(row.run)), range: [chosen.rows.length - 0.5, -0.5], showgrid: false, ticks: "", fixedrange: true },
    }, config);
    byId("phase-caption").textContent = `${caption(trajectory)} Value axis: log.`;
  }

  // ---- growth curves

  const curveAt = ([beta, tau0, a1, a2, k], t) => Math.exp(-beta * t) * (a1 * Math.log(t + tau0) + a2) + k;

  function fitTraces(rows, scale) {
    return rows.map((row) => ({ row, r: data.runs.findIndex((run) => run.name === row.run) })).filter(({ r }) => r >= 0).map(({ row, r }) => {
      const steps = data.runs[r].steps, first = Math.log1p(steps[0]), last = Math.log1p(steps[steps.length - 1]);
      const grid = Array.from({ length: 121 }, (_, i) => Math.expm1(first + (last - first) * i / 120));
      return {
        type: "scatter", mode: "lines", name: plain(row.run), showlegend: false, x: grid.map((t) => position(t, scale, data.runs[r])), y: grid.map((t) => curveAt(row.fitted, t)),
        line: { width: 1.5, color: color(`--run-${r % runColors}`), dash: dashes[Math.floor(r / runColors) % dashes.length] },
        customdata: grid.map((t) => `step ${spell(Math.round(t))}<br>fit ${spell(curveAt(row.fitted, t))}, ${plain(row.shape)}`),
        hovertemplate: "<b>%{fullData.name}</b><br>%{customdata}<extra></extra>",
      };
    });
  }

  function drawGrowth() {
    if (!byId("growth-plot")) return;
    const chosen = data.growth[Number(byId("growth-place").value)];
    if (chosen.trajectory === null) {
      Plotly.purge(byId("growth-plot"));
      byId("growth-caption").textContent = "The store no longer shows the trajectory of these curves.";
      return;
    }
    const trajectory = data.trajectories[chosen.trajectory], scale = chosenView();
    const { axis, layout } = layoutBase();
    const dots = lineTraces(trajectory, scale).map((trace) => ({ ...trace, mode: "markers", marker: { size: 5, color: trace.line.color } }));
    Plotly.react(byId("growth-plot"), [...dots, ...fitTraces(chosen.rows, scale)], {
      ...layout, margin: { l: 70, r: 40, t: 44, b: 56 }, modebar: { ...layout.modebar, orientation: "v" }, height: 420, hovermode: "closest", showlegend: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
      xaxis: { ...axis, ...stepAxis(data.runs, scale) },
      yaxis: { ...axis, title: { text: titled(trajectory.metric), standoff: 8, font: { size: 13 } }, exponentformat: "power" },
    }, config);
    byId("growth-caption").textContent = caption(trajectory);
  }

  // ---- states beside simpler ways to cut a run

  function bandTraces(run, bands, scale) {
    const edges = cellEdges(run, scale);
    const start = (step) => edges[run.steps.indexOf(step)];
    const all = bands.flatMap((band) => band.pieces.map(([label, step], i) => {
      const next = band.pieces[i + 1];
      const end = next ? start(next[1]) : edges[edges.length - 1];
      const fill = band.states ? data.stateColors[label] : color(`--run-${label % runColors}`);
      const until = next ? `to before ${spell(next[1])}` : "to the end";
      return { band: band.name, label, begin: start(step), length: end - start(step), fill, ink: band.states ? data.stateInks[label] : color("--paper"), text: `${band.states ? "state" : "piece"} ${label}: step ${spell(step)} ${until}` };
    })).filter((piece) => Number.isFinite(piece.begin) && Number.isFinite(piece.length));
    return [{
      type: "bar", orientation: "h", width: 0.82, showlegend: false, base: all.map((p) => p.begin), x: all.map((p) => p.length), y: all.map((p) => plain(p.band)),
      marker: { color: all.map((p) => p.fill), line: { width: 1, color: color("--paper") } },
      text: all.map((p) => String(p.label)), textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { color: all.map((p) => p.ink) }, constraintext: "inside", cliponaxis: true,
      customdata: all.map((p) => p.text), hovertemplate: "<b>%{y}</b><br>%{customdata}<extra></extra>",
    }];
  }

  function drawBands() {
    if (!byId("band-plot")) return;
    const chosen = data.bands[Number(byId("band-run").value)], scale = chosenView();
    const run = data.runs.find((each) => each.name === chosen.run);
    const { axis, layout } = layoutBase();
    const names = chosen.bands.map((band) => plain(band.name));
    // Beside the bands their names would leave a narrow window no room: there they stand above.
    const narrow = byId("band-plot").clientWidth < 560;
    const margin = { l: narrow ? 10 : 70, r: 16, t: narrow ? 44 : 30, b: 56 };
    const above = names.map((name) => ({ text: name, showarrow: false, font: { size: 11 }, xref: "x domain", x: 0, xanchor: "left", y: name, yanchor: "bottom", yshift: 10 }));
    const traces = bandTraces(run, chosen.bands, scale).map((trace) => narrow ? { ...trace, width: 0.45 } : trace);
    Plotly.react(byId("band-plot"), traces, {
      ...layout, margin, annotations: narrow ? above : [], height: names.length * (narrow ? 44 : 28) + margin.t + margin.b, barmode: "overlay", hovermode: "closest", uniformtext: { minsize: 9, mode: "hide" },
      xaxis: { ...axis, ...stepAxis([run], scale) },
      yaxis: { ...axis, type: "category", categoryorder: "array", categoryarray: names, range: [names.length - 0.5, -0.5], showgrid: false, showticklabels: !narrow, ticks: "", fixedrange: true },
    }, config);
    byId("band-caption").textContent = `Run ${run.name}. In brackets: adjusted Rand index with the states of this run. Colours of states and of k-means mean the same; those of other pieces only tell neighbours apart.`;
  }

  // ---- births of heads

  function drawHeads() {
    if (!byId("heads-plot")) return;
    const chosen = data.heads[Number(byId("heads-map").value)], scale = chosenView();
    const r = data.runs.findIndex((run) => run.name === chosen.run), run = data.runs[r];
    const rows = chosen.rows.map((row) => ({ ...row, t: data.trajectories[row.trajectory] })).filter((row) => r >= 0 && row.t.values[r]);
    if (!rows.length) {
      Plotly.purge(byId("heads-plot"));
      byId("heads-caption").textContent = `This page holds no scores of the ${chosen.kind} heads of run ${chosen.run}.`;
      return;
    }
    const names = rows.map((row) => `${row.t.layer}.${row.t.head}`), born = rows.map((row, i) => ({ ...row, name: names[i] })).filter((row) => row.birth !== null);
    const { axis, layout } = layoutBase();
    const margin = { l: 70, r: 16, t: 30, b: 56 };
    // Up to the highest score of any run, so that runs compare and weak scores can be told apart.
    const highest = chosen.highest || 1;
    Plotly.react(byId("heads-plot"), [{
      type: "heatmap", colorscale: "Viridis", zmin: 0, zmax: highest, hoverongaps: false, z: rows.map((row) => row.t.values[r]),
      colorbar: { thickness: 12, outlinewidth: 0, title: { text: titled(rows[0].t.metric), side: "right", font: { size: 13 } } },
      x: cellEdges(run, scale), y: names,
      customdata: rows.map((row) => row.t.values[r].map((value, i) => value === null ? "" : `step ${spell(run.steps[i])}<br>score ${spell(value)}`)),
      hovertemplate: "<b>layer.head %{y}</b><br>%{customdata}<extra></extra>",
    }, {
      type: "scatter", mode: "markers", name: "birth", showlegend: false, x: born.map((row) => position(row.birth, scale, run)), y: born.map((row) => row.name),
      marker: { symbol: "diamond", size: 10, color: "#ffffff", line: { width: 2, color: "#d62728" } },
      customdata: born.map((row) => `born at step ${spell(row.birth)}`), hovertemplate: "<b>layer.head %{y}</b><br>%{customdata}<extra></extra>",
    }], {
      ...layout, margin, height: Math.max(240, Math.min(rows.length * 22, 720)) + margin.t + margin.b,
      xaxis: { ...axis, ...stepAxis([run], scale), showgrid: false },
      yaxis: { ...axis, type: "category", categoryorder: "array", categoryarray: names, autorange: "reversed", title: { text: "layer.head", standoff: 8, font: { size: 13 } }, showgrid: false },
    }, config);
    byId("heads-caption").textContent = `${caption({ ...rows[0].t, layer: null, head: null })} Run ${chosen.run}. Colours go from 0 to ${spell(Number(highest.toPrecision(2)))}, the highest score in any run; a head is born at ${chosen.threshold}. ${born.length} of the ${rows.length} heads shown were born.`;
  }

  // ---- downloads

  // A text that begins like a formula would be run by a spreadsheet.
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const safe = /^[=+\-@\t\r]/.test(value) && !Number.isFinite(Number(value)) ? `'${value}` : value;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };

  function save(name, rows) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([rows.map((row) => row.map(cell).join(",")).join("\n") + "\n"], { type: "text/csv" }));
    link.download = `${data.series}-${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // Name of the file and its rows, by plot: every plot has a button that saves what it shows.
  const behind = {};

  function trajectoryRows(trajectories, runIndexes) {
    const head = ["series", "run", "step", "tokens", "metric", "site", "layer", "head", "value", "state", "posterior"];
    const rows = trajectories.flatMap((t) => runIndexes.filter((r) => t.values[r]).flatMap((r) => {
      const run = data.runs[r];
      return run.steps.map((step, i) => [data.series, run.name, step, run.tokens[i], t.metric, t.site, t.over ?? t.layer, t.head, t.values[r][i], run.states[i], run.posteriors[i]]);
    }));
    return [head, ...rows];
  }

  const everyRun = data.runs.map((_, r) => r);
  const shownTrajectory = (chosen) => chosen.trajectory === null ? [] : [data.trajectories[chosen.trajectory]];

  function growthRows(chosen) {
    const rows = shownTrajectory(chosen).flatMap((t) => data.runs.flatMap((run, r) => !t.values[r] ? [] : run.steps.map((step, i) => {
      const fit = chosen.rows.find((row) => row.run === run.name);
      return [data.series, run.name, step, run.tokens[i], t.metric, t.site, t.layer, t.head, t.values[r][i], fit ? curveAt(fit.fitted, step) : null];
    })));
    return [["series", "run", "step", "tokens", "metric", "site", "layer", "head", "value", "fitted"], ...rows];
  }

  function bandRows(chosen) {
    const rows = chosen.bands.flatMap((band) => band.pieces.map(([label, step]) => [data.series, chosen.run, band.name, label, step]));
    return [["series", "run", "method", "label", "first_step"], ...rows];
  }

  behind["line-plot"] = () => ["trajectories", trajectoryRows(pickLine(), everyRun)];
  behind["heat-plot"] = () => ["layers", trajectoryRows(pickHeat(), [Number(byId("heat-run").value)])];
  behind["phase-plot"] = () => ["phases", trajectoryRows(shownTrajectory(data.phases[Number(byId("phase-place").value)]), everyRun)];
  behind["growth-plot"] = () => ["growth-curves", growthRows(data.growth[Number(byId("growth-place").value)])];
  behind["band-plot"] = () => ["pieces", bandRows(data.bands[Number(byId("band-run").value)])];
  behind["heads-plot"] = () => {
    const chosen = data.heads[Number(byId("heads-map").value)];
    return ["head-scores", trajectoryRows(chosen.rows.map((row) => data.trajectories[row.trajectory]), everyRun.filter((r) => data.runs[r].name === chosen.run))];
  };
  for (const button of document.querySelectorAll("button[data-plot]")) button.addEventListener("click", () => save(...behind[button.dataset.plot]()));

  // Thousands are separated for reading only, and a dash stands for nothing.
  const cellText = (c) => {
    if (c.dataset.csv) return c.dataset.csv;
    const text = c.textContent.trim();
    return text === "–" ? "" : c.classList.contains("num") ? text.replace(/,/g, "") : text;
  };

  for (const button of document.querySelectorAll("button.csv")) {
    button.addEventListener("click", () => {
      const rows = [...byId(button.dataset.table).rows].map((row) => [...row.cells].map(cellText));
      save(button.dataset.file, rows);
    });
  }

  // ---- start

  const plots = () => [...document.querySelectorAll("div.plot")];
  const shared = { amount, behind, byId, cellEdges, chosenView, color, config, layoutBase, measuredRuns: data.runs, plain, position, stepAxis };
  const drawCrosscoders = window.ontogenyCrosscoders ? window.ontogenyCrosscoders(shared) : () => {};
  const drawAll = () => {
    drawLines(); drawHeat(); drawPhases(); drawGrowth(); drawBands(); drawHeads(); drawCrosscoders();
    plots().forEach(link);
  };

  if (byId("step-axis")) {
    if (!tokensKnown) byId("step-unit").querySelector("[value=token]").disabled = true;
    for (const id of ["step-axis", "step-unit"]) byId(id).addEventListener("change", () => { zoom = null; drawAll(); });
    byId("link-axes").addEventListener("change", () => { zoom = null; drawAll(); });
  }
  if (byId("line-plot")) {
    pickLine = pickers("line", ["metric", "site", "layer", "head"], data.trajectories, drawLines);
    byId("value-axis").addEventListener("change", drawLines);
  }
  if (byId("heat-plot")) {
    byId("heat-run").append(...data.runs.map((run, r) => new Option(run.name, r)));
    byId("heat-run").disabled = data.runs.length < 2;
    pickHeat = pickers("heat", ["metric", "site", "head"], data.trajectories.filter((t) => t.layer !== null), drawHeat);
    for (const id of ["heat-run", "heat-colors"]) byId(id).addEventListener("change", drawHeat);
  }

  if (byId("phase-place")) {
    byId("phase-place").disabled = data.phases.length < 2;
    byId("phase-place").addEventListener("change", drawPhases);
  }
  if (byId("growth-place")) {
    byId("growth-place").disabled = data.growth.length < 2;
    byId("growth-place").addEventListener("change", drawGrowth);
  }
  if (byId("heads-map")) {
    byId("heads-map").disabled = data.heads.length < 2;
    byId("heads-map").addEventListener("change", drawHeads);
  }

  if (byId("band-run")) {
    byId("band-run").disabled = data.bands.length < 2;
    byId("band-run").addEventListener("change", drawBands);
  }

  const toggle = byId("theme");
  function themed() {
    toggle.textContent = isDark() ? "Light theme" : "Dark theme";
    drawAll();
  }
  toggle.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
  prefersDark.addEventListener("change", themed);
  themed();

  // Paper is white and has a width of its own.
  const paperWidth = 680;
  let chosenTheme, unfolded = [];
  window.addEventListener("beforeprint", () => {
    chosenTheme = root.dataset.theme;
    root.dataset.theme = "light";
    themed();
    for (const plot of plots()) if (plot.layout) Plotly.relayout(plot, { width: paperWidth });
    // Paper cannot be unfolded.
    unfolded = [...document.querySelectorAll("#summary details:not([open])")];
    for (const part of unfolded) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of unfolded) part.open = false;
    if (chosenTheme) root.dataset.theme = chosenTheme; else delete root.dataset.theme;
    for (const plot of plots()) if (plot.layout) Plotly.relayout(plot, { width: null, autosize: true });
    themed();
  });

  // `ontogeny report --format` waits for this, and reads the plots as pictures.
  const show = (i) => {
    const t = data.trajectories[i];
    if (pickLine) pickLine.choose(t);
    if (pickHeat && t.layer !== null) pickHeat.choose(t);
  };
  window.ontogenyReport = { show };
  root.dataset.ready = "yes";
})();
