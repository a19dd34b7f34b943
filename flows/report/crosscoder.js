// Draws the section on crosscoders from its own data, on the step axis that all plots share.
"use strict";
window.ontogenyCrosscoders = ({ amount, behind, byId, cellEdges, chosenView, color, config, layoutBase, measuredRuns, plain, position, stepAxis }) => {
  const runs = JSON.parse(byId("crosscoder-data").textContent);
  const spell = (value) => value === null ? "–" : value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
  const margin = { l: 70, r: 70, t: 50, b: 56 };
  // Snapshots are some of the run's checkpoints: their tokens are those of the measurements where there are any.
  for (const run of runs) {
    const measured = measuredRuns.find((each) => each.name === run.run);
    run.measured = measured || run;
    if (measured) run.tokens = run.steps.map((step) => amount(measured, step, { unit: "token" }));
  }

  const chosen = () => runs[Number(byId("crosscoder-run").value)];
  const chosenFeature = () => chosen().features[byId("crosscoder-feature").selectedIndex];
  const line = (name, grid, steps, values, i, more) => ({
    type: "scatter", mode: "lines+markers", name, connectgaps: false, x: steps.map((step) => position(step, chosenView(), grid)), y: values, line: { width: 2, color: color(`--run-${i}`) }, marker: { size: 6 },
    customdata: steps.map((step, s) => `step ${spell(step)}<br>${name} ${spell(values[s])}`), hovertemplate: "%{customdata}<extra></extra>", ...more,
  });
  const some = (values) => values.some((value) => value !== null);
  const titled = (text) => ({ title: { text, standoff: 8, font: { size: 13 } } });

  function draw(id, traces, height, run, more) {
    const { axis, layout } = layoutBase();
    Plotly.react(byId(id), traces, {
      ...layout, margin, height, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
      xaxis: { ...axis, ...stepAxis([run], chosenView()), showgrid: false }, ...more(axis),
    }, config);
  }

  function drawHeat(run) {
    const names = run.features.map((feature) => `#${feature.id}`);
    draw("crosscoder-heat", [{
      type: "heatmap", colorscale: "Viridis", zmin: 0, zmax: 1, hoverongaps: false, x: cellEdges(run, chosenView()), y: names, z: run.features.map((feature) => feature.strength),
      colorbar: { thickness: 12, outlinewidth: 0, title: { text: "strength", side: "right", font: { size: 13 } } },
      customdata: run.features.map((feature) => feature.strength.map((value, s) => `step ${spell(run.steps[s])}<br>strength ${spell(value)}<br>${feature.class}, born ${spell(feature.birth)}`)),
      hovertemplate: "<b>feature %{y}</b><br>%{customdata}<extra></extra>",
    }], 560, run, (axis) => ({ yaxis: { ...axis, type: "category", categoryorder: "array", categoryarray: names, autorange: "reversed", showticklabels: names.length <= 40, ticks: "", ...titled("features by birth"), showgrid: false } }));
  }

  function drawWhole(run) {
    const cells = cellEdges(run, chosenView());
    draw("crosscoder-births", [{
      type: "bar", x: run.steps.map((_, s) => (cells[s] + cells[s + 1]) / 2), width: run.steps.map((_, s) => 0.9 * (cells[s + 1] - cells[s])), y: run.births, marker: { color: color("--run-0") },
      customdata: run.steps.map((step, s) => `step ${spell(step)}<br>${spell(run.births[s])} births`), hovertemplate: "%{customdata}<extra></extra>",
    }], 260, run, (axis) => ({ yaxis: { ...axis, ...titled("features born"), rangemode: "tozero" } }));
    const quality = [line("explained variance", run, run.steps, run.explained, 0)];
    if (some(run.heldOut)) quality.push(line("explained variance, held-out text", run, run.steps, run.heldOut, 1));
    if (some(run.increase)) quality.push(line("loss increase", run, run.steps, run.increase, 2, { yaxis: "y2" }));
    draw("crosscoder-quality", quality, 300, run, (axis) => ({
      showlegend: true, yaxis: { ...axis, ...titled("explained variance") },
      yaxis2: { ...axis, overlaying: "y", side: "right", showgrid: false, visible: some(run.increase), tickmode: "auto", ...titled("loss increase (nats per token)") },
    }));
    const kl = Object.entries(run.kl).filter(([, values]) => values);
    const phases = [line("dimensionality", run, run.steps, run.dimensions, 0), ...kl.map(([name, values], i) => line(plain(name), run.measured, run.klSteps, values, i + 1, { yaxis: "y2" }))];
    draw("crosscoder-phases", phases, 300, run, (axis) => ({
      showlegend: true, yaxis: { ...axis, ...titled("dimensionality / width"), rangemode: "tozero" },
      yaxis2: { ...axis, overlaying: "y", side: "right", showgrid: false, visible: kl.length > 0, tickmode: "auto", ...titled("KL (nats)") },
    }));
  }

  // A line break would tear a context apart, and could not be seen where it is the token itself.
  const seen = (text) => text.replace(/\r?\n|\r/g, "\u21b5");

  function drawFeature(run) {
    const feature = chosenFeature();
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
    const traces = [line("strength", run, run.steps, feature.strength, 0), line("beta", run, run.steps, feature.beta, 1), line("cosine to the last snapshot", run, run.steps, feature.cosine, 2)];
    draw("crosscoder-curve", traces, 300, run, (axis) => ({ showlegend: true, yaxis: { ...axis, ...titled("strength, beta, cosine (no unit)") } }));
  }

  function drawAll() {
    const run = chosen();
    drawHeat(run);
    drawWhole(run);
    drawFeature(run);
  }

  // ---- the data behind the plots

  const featureRows = (run, features) => [
    ["run", "feature", "class", "birth", "peak", "death", "step", "strength", "beta", "cosine"],
    ...features.flatMap((f) => run.steps.map((step, s) => [run.run, f.id, f.class, f.birth, f.peak, f.death, step, f.strength[s], f.beta[s], f.cosine[s]])),
  ];
  const bySnapshot = (run, columns) => [["run", "step", ...Object.keys(columns)], ...run.steps.map((step, s) => [run.run, step, ...Object.values(columns).map((values) => values[s])])];

  function phaseRows(run) {
    const points = [["dimensionality", run.steps, run.dimensions], ...Object.entries(run.kl).filter(([, values]) => values).map(([name, values]) => [name, run.klSteps, values])];
    return [["run", "step", "quantity", "value"], ...points.flatMap(([name, steps, values]) => steps.map((step, s) => [run.run, step, name, values[s]]))];
  }

  behind["crosscoder-heat"] = () => [`features ${chosen().run}`, featureRows(chosen(), chosen().features)];
  behind["crosscoder-curve"] = () => [`feature ${chosenFeature().id} ${chosen().run}`, featureRows(chosen(), [chosenFeature()])];
  behind["crosscoder-births"] = () => [`births ${chosen().run}`, bySnapshot(chosen(), { births: chosen().births })];
  behind["crosscoder-quality"] = () => [`quality ${chosen().run}`, bySnapshot(chosen(), { explained_variance: chosen().explained, explained_held_out: chosen().heldOut, loss_increase: chosen().increase })];
  behind["crosscoder-phases"] = () => [`dimensionality ${chosen().run}`, phaseRows(chosen())];

  // ---- start

  function offer() {
    byId("crosscoder-feature").replaceChildren(...chosen().features.map((feature) => new Option(`#${feature.id}${feature.label.label ? ` ${feature.label.label}` : ""}`)));
  }

  offer();
  byId("crosscoder-run").disabled = runs.length < 2;
  byId("crosscoder-run").addEventListener("change", () => { offer(); drawAll(); });
  byId("crosscoder-feature").addEventListener("change", () => drawFeature(chosen()));
  drawHeat(chosen());
  byId("crosscoder-heat").on("plotly_click", (event) => {
    byId("crosscoder-feature").selectedIndex = chosen().features.findIndex((feature) => `#${feature.id}` === event.points[0].y);
    drawFeature(chosen());
  });
  return drawAll;
};
