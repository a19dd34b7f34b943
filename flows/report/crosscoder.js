// Draws the section on crosscoders from its own data; stands apart from the script of the other sections.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const runs = JSON.parse(byId("crosscoder-data").textContent);
  const root = document.documentElement;
  const config = { displaylogo: false, displayModeBar: true, responsive: true, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  // Plotly reads a little HTML in its texts; names from tables must stay plain.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const spell = (value) => value === null ? "–" : value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const position = (step) => Math.log10(1 + step);
  const short = (step) => step >= 1e6 ? `${step / 1e6}M` : step >= 1e3 ? `${step / 1e3}k` : String(step);
  const margin = { l: 70, r: 70, t: 50, b: 56 };

  function base() {
    const axis = { gridcolor: color("--grid"), linecolor: color("--rule"), zerolinecolor: color("--rule"), automargin: true, ticks: "outside", tickcolor: color("--rule"), ticklen: 4 };
    return {
      axis,
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin, font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--ink") },
        hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--rule"), font: { color: color("--ink") }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--quiet"), activecolor: color("--ink"), orientation: "h" },
        legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
      },
    };
  }

  // Edges of cells around snapshots: halfway to the neighbours on the axis as drawn.
  function edges(steps) {
    const at = steps.map(position);
    if (at.length === 1) return [at[0] - 0.5, at[0] + 0.5];
    const middle = at.slice(1).map((x, i) => (x + at[i]) / 2), n = at.length;
    return [2 * at[0] - middle[0], ...middle, 2 * at[n - 1] - middle[n - 2]];
  }

  function stepAxis(axis, steps) {
    const ends = edges(steps), ticks = [];
    for (const step of steps) if (!ticks.length || position(step) - position(ticks[ticks.length - 1]) > (ends[ends.length - 1] - ends[0]) / 14) ticks.push(step);
    return { ...axis, title: { text: "training step (symlog)", font: { size: 13 }, standoff: 8 }, zeroline: false, showgrid: false, range: [ends[0], ends[ends.length - 1]], tickmode: "array", tickvals: ticks.map(position), ticktext: ticks.map(short) };
  }

  const chosen = () => runs[Number(byId("crosscoder-run").value)];
  const line = (name, steps, values, i, more) => ({
    type: "scatter", mode: "lines+markers", name, connectgaps: false, x: steps.map(position), y: values, line: { width: 2, color: color(`--run-${i}`) }, marker: { size: 6 },
    customdata: steps.map((step, s) => `step ${spell(step)}<br>${name} ${spell(values[s])}`), hovertemplate: "%{customdata}<extra></extra>", ...more,
  });
  const some = (values) => values.some((value) => value !== null);

  function draw(id, traces, height, x, more) {
    const { axis, layout } = base();
    Plotly.react(byId(id), traces, { ...layout, height, xaxis: stepAxis(axis, x), ...more(axis) }, config);
  }

  function drawHeat(run) {
    const names = run.features.map((feature) => `#${feature.id}`);
    draw("crosscoder-heat", [{
      type: "heatmap", colorscale: "Viridis", zmin: 0, zmax: 1, hoverongaps: false, x: edges(run.steps), y: names, z: run.features.map((feature) => feature.strength),
      colorbar: { thickness: 12, outlinewidth: 0, title: { text: "strength", side: "right", font: { size: 13 } } },
      customdata: run.features.map((feature) => feature.strength.map((value, s) => `step ${spell(run.steps[s])}<br>strength ${spell(value)}<br>${feature.class}, born ${spell(feature.birth)}`)),
      hovertemplate: "<b>feature %{y}</b><br>%{customdata}<extra></extra>",
    }], 560, run.steps, (axis) => ({ yaxis: { ...axis, type: "category", categoryorder: "array", categoryarray: names, autorange: "reversed", showticklabels: names.length <= 40, ticks: "", title: { text: "features by birth", standoff: 8, font: { size: 13 } }, showgrid: false } }));
  }

  function drawWhole(run) {
    const cells = edges(run.steps);
    draw("crosscoder-births", [{
      type: "bar", x: run.steps.map((_, s) => (cells[s] + cells[s + 1]) / 2), width: run.steps.map((_, s) => 0.9 * (cells[s + 1] - cells[s])), y: run.births, marker: { color: color("--run-0") },
      customdata: run.steps.map((step, s) => `step ${spell(step)}<br>${spell(run.births[s])} births`), hovertemplate: "%{customdata}<extra></extra>",
    }], 260, run.steps, (axis) => ({ yaxis: { ...axis, title: { text: "births", standoff: 8, font: { size: 13 } }, rangemode: "tozero" } }));
    const quality = [line("explained variance", run.steps, run.explained, 0)];
    if (some(run.heldOut)) quality.push(line("explained, held out", run.steps, run.heldOut, 1));
    if (some(run.increase)) quality.push(line("loss increase", run.steps, run.increase, 2, { yaxis: "y2" }));
    draw("crosscoder-quality", quality, 300, run.steps, (axis) => ({
      showlegend: true, yaxis: { ...axis, title: { text: "explained variance", standoff: 8, font: { size: 13 } } },
      yaxis2: { ...axis, overlaying: "y", side: "right", showgrid: false, visible: some(run.increase), tickmode: "auto", title: { text: "nats per token", standoff: 8, font: { size: 13 } } },
    }));
    const kl = Object.entries(run.kl).filter(([, values]) => values);
    const phases = [line("dimensionality", run.steps, run.dimensions, 0), ...kl.map(([name, values], i) => line(plain(name), run.klSteps, values, i + 1, { yaxis: "y2" }))];
    draw("crosscoder-phases", phases, 300, run.steps, (axis) => ({
      showlegend: true, yaxis: { ...axis, title: { text: "dimensionality / width", standoff: 8, font: { size: 13 } }, rangemode: "tozero" },
      yaxis2: { ...axis, overlaying: "y", side: "right", showgrid: false, visible: kl.length > 0, tickmode: "auto", title: { text: "KL (nats)", standoff: 8, font: { size: 13 } } },
    }));
  }

  // A line break would tear a context apart, and could not be seen where it is the token itself.
  const seen = (text) => text.replace(/\r?\n|\r/g, "\u21b5");

  function drawFeature(run) {
    const feature = run.features[byId("crosscoder-feature").selectedIndex];
    if (!feature) return;
    byId("crosscoder-title").textContent = `Feature #${feature.id} of ${run.run}`;
    const label = feature.label, death = feature.death === null ? "alive at the last snapshot" : `last alive at step ${spell(feature.death)}`;
    const turn = feature.turning_step === null ? "" : `, turns before step ${spell(feature.turning_step)}`;
    const named = label.label ? `Label: ${label.label}${label.argument === null ? "" : ` "${label.argument}"`} (AUC ${spell(label.auc)}, purity ${spell(label.purity)}).` : `No label${label.note ? `: ${label.note}` : ""}.`;
    const again = feature.stability === null ? "" : ` Cosine to its partners in other seeds: ${spell(feature.stability)}.`;
    byId("crosscoder-about").textContent = `${feature.class}; born at step ${spell(feature.birth)}, peak at ${spell(feature.peak)}, ${death}${turn}. Active at ${spell(100 * feature.density)} % of the rows. ${named}${again}`;
    byId("crosscoder-contexts").replaceChildren(...feature.contexts.map(([before, token, after, value]) => {
      const item = document.createElement("li"), mark = document.createElement("mark");
      mark.textContent = seen(token);
      mark.title = `activation ${spell(value)}`;
      item.append(seen(before), mark, seen(after));
      return item;
    }));
    const traces = [line("strength", run.steps, feature.strength, 0), line("beta", run.steps, feature.beta, 1), line("cosine to the last snapshot", run.steps, feature.cosine, 2)];
    draw("crosscoder-curve", traces, 300, run.steps, (axis) => ({ showlegend: true, yaxis: { ...axis, title: { text: "strength, beta, cosine", standoff: 8, font: { size: 13 } } } }));
  }

  function drawAll() {
    const run = chosen();
    drawHeat(run);
    drawWhole(run);
    drawFeature(run);
  }

  function save() {
    const run = chosen();
    const rows = run.features.flatMap((f) => run.steps.map((step, s) => [run.run, f.id, f.class, f.birth, f.peak, f.death, step, f.strength[s], f.beta[s], f.cosine[s]]));
    window.ontogenyReport.save(`features ${run.run}`, [["run", "feature", "class", "birth", "peak", "death", "step", "strength", "beta", "cosine"], ...rows]);
  }

  function offer() {
    byId("crosscoder-feature").replaceChildren(...chosen().features.map((feature) => new Option(`#${feature.id}${feature.label.label ? ` ${feature.label.label}` : ""}`)));
  }

  function start() {
    offer();
    byId("crosscoder-run").disabled = runs.length < 2;
    byId("crosscoder-run").addEventListener("change", () => { offer(); drawAll(); });
    byId("crosscoder-feature").addEventListener("change", () => drawFeature(chosen()));
    byId("crosscoder-csv").addEventListener("click", save);
    drawAll();
    byId("crosscoder-heat").on("plotly_click", (event) => {
      byId("crosscoder-feature").selectedIndex = chosen().features.findIndex((feature) => `#${feature.id}` === event.points[0].y);
      drawFeature(chosen());
    });
    new MutationObserver(drawAll).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  }

  // The library may be unpacked by the other script first.
  let tries = 0;
  const wait = () => { if (window.Plotly) start(); else if (tries++ < 600) setTimeout(wait, 50); };
  wait();
})();
