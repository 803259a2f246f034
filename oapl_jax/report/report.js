"use strict";
// Draws the page from the JSON in #data. Charts are plain SVG: a plotting library would be one to four megabytes in each
// report, would need a build step or a network, and would draw no more than these few hundred lines do.
// Every text of a run becomes a text node (`el`), never HTML.

let page = JSON.parse(document.getElementById("data").textContent);
const view = { run: 0, tab: "Overview", domain: null, smooth: true, file: null };
const COLOURS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const HEIGHT = 190, LEFT = 48, RIGHT = 18, TOP = 8, BOTTOM = 22;
let drawn = [], linked = [];  // the charts on the page, and those over learner steps, which share the cursor and the zoom

// ---------------------------------------------------------------- elements and numbers

function make(namespace, tag, attributes, children) {
  const element = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "colour") element.style.setProperty("--c", value);
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes = {}, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes = {}, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "-";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours} h ${minutes % 60} min` : minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${number(seconds, 3)} s`;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
  return found;
}

// ---------------------------------------------------------------- charts

// series: {label, x, y, low, high, colour, isOther, isStacked}; xs of a series ascend. log: x on a scale of powers of two.
function chart({ title, unit, series, missing, log = false, isLinked = false, xLabel = "step", yRange = null }) {
  const caption = el("figcaption", {}, el("b", {}, title), " ", el("span", {}, unit));
  if (!series.length) return el("figure", {}, caption, el("p", { class: "soft" }, `Not recorded: ${missing}`));
  const surface = svg("svg", { tabindex: 0, height: HEIGHT, role: "img" });
  const tip = el("div", { class: "tip", hidden: true }), legend = el("p", { class: "legend" });
  const figure = el("figure", {}, caption, legend, el("div", { class: "plot" }, surface, tip));
  const toScale = log ? Math.log2 : (x) => x;
  const extent = [Math.min(...series.map((s) => s.x[0])), Math.max(...series.map((s) => s.x.at(-1)))];
  const state = { cursor: null, drag: null };
  let place, width;

  function draw() {
    width = Math.max(240, surface.parentNode.clientWidth);
    const [from, to] = ((isLinked && view.domain) || extent).map(toScale), spanX = to - from || 1;
    const shown = series.map((s) => cut(s, isLinked && view.domain)).filter((s) => s.x.length);
    const values = shown.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter((v) => v !== null);
    let [low, high] = yRange || [Math.min(...values), Math.max(...values)];
    if (unit === "seconds") high = Math.min(high, 2 * values.sort((a, b) => a - b)[Math.floor(0.95 * values.length)]);  // the first step compiles
    if (!values.length) [low, high] = [0, 1];
    if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
    const pad = yRange ? 0.02 * (high - low) : 0.05 * (high - low);
    low -= pad; high += pad;
    const bottom = HEIGHT - BOTTOM;
    place = {
      x: (value) => LEFT + ((toScale(value) - from) / spanX) * (width - LEFT - RIGHT),
      y: (value) => bottom - ((value - low) / (high - low)) * (bottom - TOP),
      step: (pixel) => { const v = from + ((pixel - LEFT) / (width - LEFT - RIGHT)) * spanX; return log ? 2 ** v : v; },
    };
    surface.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    surface.setAttribute("aria-label", `${title}, ${unit}: ` + series.map((s) => `${s.label} ends at ${number(s.y.at(-1), 3)}`).join(", "));
    surface.replaceChildren(...(isLinked ? windows(place, from, to, bottom) : []));
    for (const y of ticks(low, high, 4)) {
      surface.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: place.y(y), y2: place.y(y) }),
        svg("text", { x: LEFT - 5, y: place.y(y) + 4, "text-anchor": "end" }, number(y, 3)));
    }
    const marks = log ? [...new Set(series.flatMap((s) => s.x))] : ticks(from, to, width / 90);
    for (const x of marks) surface.append(svg("text", { x: place.x(x), y: HEIGHT - 6, "text-anchor": "middle" }, number(x)));
    for (const s of shown) surface.append(...lines(s, place));
    drawCursor();
  }

  function drawCursor() {
    surface.querySelectorAll(".cursor, .brush, .at").forEach((element) => element.remove());
    const found = state.cursor === null ? [] : series.map((s) => [s, nearest(s.x, state.cursor)]);
    legend.replaceChildren(...series.map((s, i) => el("span", { colour: s.colour }, el("i"), s.label,
      found[i] ? ` ${number(s.y[found[i][1]], 3)}` : "")));
    if (state.cursor === null || !place) return;
    const x = place.x(state.cursor);
    if (x >= LEFT - 1 && x <= width) surface.append(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    if (state.drag !== null) {
      const other = place.x(state.drag);
      surface.append(svg("rect", { class: "brush", x: Math.min(x, other), width: Math.abs(x - other), y: TOP, height: HEIGHT - BOTTOM - TOP }));
    }
  }

  function setCursor(step, isHere) {
    state.cursor = step;
    tip.hidden = !isHere || step === null;
    drawCursor();
    if (tip.hidden) return;
    const lines = series.map((s) => { const i = nearest(s.x, step); return el("div", { colour: s.colour }, `${s.label} ${number(s.y[i])}`,
      s.low?.length && !s.isStacked ? ` [${number(s.low[i])}, ${number(s.high[i])}]` : ""); });
    tip.replaceChildren(el("b", {}, `${xLabel} ${number(log ? step : Math.round(step))}`), ...lines);
    const isRight = place.x(step) > width / 2;
    tip.style.left = isRight ? "auto" : `${place.x(step) + 10}px`;
    tip.style.right = isRight ? `${width - place.x(step) + 10}px` : "auto";
  }

  const pointed = (event) => {
    const step = place.step(event.clientX - surface.getBoundingClientRect().left), x = series[0].x;
    return x.length ? Math.max(extent[0], Math.min(extent[1], isLinked ? step : x[nearest(x, step)])) : null;
  };
  const move = (step) => (isLinked ? linked : [own]).forEach((item) => item.setCursor(step, item === own));
  surface.addEventListener("pointermove", (event) => move(pointed(event)));
  surface.addEventListener("pointerleave", () => { state.drag = null; move(null); });
  surface.addEventListener("pointerdown", (event) => { if (isLinked) state.drag = pointed(event); });
  surface.addEventListener("pointerup", (event) => {
    const [start, end] = [state.drag, pointed(event)];
    state.drag = null;
    if (start !== null && Math.abs(place.x(start) - place.x(end)) > 8) zoom([Math.min(start, end), Math.max(start, end)]);
  });
  surface.addEventListener("dblclick", () => zoom(null));
  surface.addEventListener("blur", () => move(null));
  surface.addEventListener("keydown", (event) => {
    const x = series[0].x, at = state.cursor === null ? x.length - 1 : nearest(x, state.cursor);
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key] * (event.shiftKey ? 10 : 1);
    const [from, to] = view.domain || extent, centre = x[at];
    if (by) move(x[Math.max(0, Math.min(x.length - 1, at + by))]);
    else if (isLinked && event.key === "+") zoom([centre - (centre - from) / 2, centre + (to - centre) / 2]);
    else if (isLinked && (event.key === "-" || event.key === "0")) zoom(null);
    else return;
    event.preventDefault();
  });
  const own = { draw, setCursor, isLinked };
  figure.chart = own;
  return figure;
}

// The part of a series in a domain, with a point on each side.
function cut(s, domain) {
  if (!domain) return s;
  const from = Math.max(0, s.x.findIndex((x) => x >= domain[0]) - 1);
  const after = s.x.findIndex((x) => x > domain[1]), to = after < 0 ? s.x.length : after + 1;
  const part = (values) => (values?.length ? values.slice(from, to) : values);
  return { ...s, x: part(s.x), y: part(s.y), low: part(s.low), high: part(s.high) };
}

function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (x[middle] < value) low = middle; else high = middle; }
  return Math.abs(x[low] - value) <= Math.abs(x[high] - value) ? low : high;
}

const path = (x, y, place) => x.map((value, i) => (y[i] === null ? "" : `${i && y[i - 1] !== null ? "L" : "M"}${place.x(value).toFixed(1)} ${place.y(y[i]).toFixed(1)}`)).join("");

function lines(s, place) {
  const found = [], kind = s.isOther ? " other" : "";
  if (s.low?.length) {
    const back = path([...s.x].reverse(), [...s.low].reverse(), place).replace("M", "L");
    found.push(svg("path", { class: s.isStacked ? "band stacked" : "band", colour: s.colour, d: `${path(s.x, s.high, place)}${back}Z` }));
  }
  if (s.isStacked) return found;
  const isSmooth = view.smooth && s.canSmooth && s.x.length >= 40;
  found.push(svg("path", { class: `line${isSmooth ? " pale" : ""}${kind}`, colour: s.colour, d: path(s.x, s.y, place) }));
  if (isSmooth) found.push(svg("path", { class: `line${kind}`, colour: s.colour, d: path(s.x, runningMean(s.y), place) }));
  if (s.x.length < 30) s.x.forEach((x, i) => s.y[i] !== null && found.push(svg("circle", { class: "dot", colour: s.colour, cx: place.x(x), cy: place.y(s.y[i]), r: 2.6 })));
  return found;
}

// Centred, over about a thirtieth of the points; shorter at the ends.
function runningMean(values) {
  const half = Math.max(1, Math.floor(values.length / 60)), sums = [0];
  values.forEach((value) => sums.push(sums.at(-1) + value));
  return values.map((_, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

// Syncs as dotted lines; between them a shade that darkens with the lag. Neither where they would be too close.
function windows(place, from, to, bottom) {
  const syncs = page.runs[view.run].syncs.filter((step) => step >= from && step <= to);
  if (!syncs.length || (place.x(to) - place.x(from)) / syncs.length < 6) return [];
  const edges = [from, ...syncs, to], longest = Math.max(...edges.slice(1).map((step, i) => step - edges[i]));
  const shades = edges.slice(1).map((step, i) => svg("rect", { class: "lag", x: place.x(edges[i]), y: TOP, height: bottom - TOP,
    width: Math.max(0, place.x(step) - place.x(edges[i])), opacity: (step - edges[i]) / longest || 0 }));
  return [...shades, ...syncs.map((step) => svg("line", { class: "sync", x1: place.x(step), x2: place.x(step), y1: TOP, y2: bottom }))];
}

function zoom(domain) {
  view.domain = domain;
  linked.forEach((item) => item.draw());
  document.querySelectorAll(".unzoom").forEach((button) => { button.disabled = !domain; });
}

function metricChart(panel) {
  const series = [];
  page.runs.forEach((run, r) => Object.entries(panel.metrics).forEach(([label, name], i) => {
    const curve = run.curves[name];
    if (!curve) return;
    series.push({ ...curve, label: page.runs.length > 1 ? `${label}, ${run.name}` : label, canSmooth: !/^(window|evaluation)\/|log_ratio/.test(name),  // it would hide the drop at a sync
     
      colour: COLOURS[(page.runs.length > 1 ? i + r * Object.keys(panel.metrics).length : i) % COLOURS.length], isOther: r !== view.run });
  }));
  for (const s of [...series]) {  // a reward of 1 for what is correct is the pass rate
    const same = series.slice(0, series.indexOf(s)).find((other) => other.isOther === s.isOther && String(other.y) === String(s.y));
    if (same) { same.label += ` = ${s.label}`; series.splice(series.indexOf(s), 1); }
  }
  series.sort((a, b) => a.isOther - b.isOther);
  return chart({ ...panel, series, missing: Object.values(panel.metrics).join(", "), isLinked: true });
}

const charts = (figures) => el("div", { class: "charts" }, figures);
const panel = (title) => metricChart(page.panels.find((item) => item.title.startsWith(title)));

// ---------------------------------------------------------------- the parts of the page

function overview(run) {
  const facts = { ...run.facts };
  const tile = (name, value) => el("div", { class: "tile" }, el("span", { class: "soft" }, name), el("b", {}, value));
  const tiles = [];
  const ends = [run.scores[0], run.scores.at(-1)].map((score) => score && score.value[score.k.indexOf(1)]);
  if (run.scores.length > 1) tiles.push(tile("held-out pass@1", `${number(ends[0], 3)} → ${number(ends[1], 3)}`));
  if ("steps" in facts) tiles.push(tile("learner steps", number(facts.steps)));
  if ("rollouts" in facts) tiles.push(tile("rollouts learned from", number(facts.rollouts)));
  if ("seconds" in facts) tiles.push(tile("time", duration(facts.seconds)));
  return [
    el("p", { class: "verdict" }, run.verdict),
    run.warnings.length ? run.warnings.map((text) => el("p", { class: "warning", role: "note" }, text)) : el("p", { class: "soft" }, "No warning: the checks for reward hacking, non-termination, collapse and failing graders found nothing in what is recorded."),
    el("div", { class: "tiles" }, tiles),
    charts([panel("Reward"), hasManyK(run) ? passChart(run) : panel("Held-out"), panel("Entropy")]),
  ];
}

function curvesPart(run) {
  const shown = new Set(page.panels.flatMap((item) => Object.values(item.metrics)));
  const others = [...new Set(page.runs.flatMap((item) => Object.keys(item.curves)))].filter((name) => !shown.has(name)).sort();
  const further = el("details", {}, el("summary", {}, `${others.length} further metrics`));
  further.addEventListener("toggle", () => {
    if (!further.open || further.children.length > 1) return;
    further.append(charts(others.map((name) => metricChart({ title: name, unit: "", metrics: { [name]: name } }))));
    collect();
  });
  return [
    el("div", { class: "bar" },
      el("button", { class: "unzoom", type: "button", disabled: !view.domain, onclick: () => zoom(null) }, "whole run"),
      el("label", {}, el("input", { type: "checkbox", checked: view.smooth, onchange: (event) => { view.smooth = event.target.checked; linked.forEach((item) => item.draw()); } }), " running mean"),
      el("span", { class: "soft" }, "Drag over a chart to zoom all; with the keyboard: arrows, +, 0.")),
    el("p", { class: "soft" }, `${page.rules.curves} Dotted lines are ${run.syncs.length} weight syncs, and the shade grows with the lag; both are left out where they are too close. docs/metrics.md describes each metric.`),
    charts([...page.panels.map(metricChart), ...countCharts(run)]),
    others.length ? further : null,
  ];
}

// By policy version, from all rollouts of the log.
function countCharts(run) {
  const x = run.counts.map((item) => (item.versions[0] + item.versions[1]) / 2), of = (f) => run.counts.map(f);
  const missing = "there is no Parquet file under rollouts/ that can be read";
  const parts = [["all correct", (c) => c.all_correct], ["some correct", (c) => c.groups - c.all_correct - c.none_correct], ["none correct", (c) => c.none_correct]];
  let below = of(() => 0);
  const stack = parts.map(([label, f], i) => {
    const low = below, share = of((c) => f(c) / c.groups);
    below = low.map((value, j) => value + share[j]);
    return { label, x, y: share, low, high: below, colour: COLOURS[[2, 0, 1][i]], isStacked: true };
  });
  const values = [["reward", (c) => c.reward / Math.max(1, c.rollouts - c.invalid)], ["V*", (c) => (c.num_values ? c.value / c.num_values : null)]];
  const common = { missing, xLabel: "policy version" };
  return [
    chart({ ...common, title: "Composition of the groups", unit: "share, by policy version", series: x.length ? stack : [], yRange: [0, 1] }),
    chart({ ...common, title: "V* and reward", unit: "mean, by policy version", series: x.length ? values.map(([label, f], i) => ({ label, x, y: of(f), colour: COLOURS[i] })) : [] }),
  ];
}

// With one sample of a prompt the curve over k is a point.
const hasManyK = (run) => run.scores.some((score) => score.k.length > 1);

function passChart(run) {
  const rows = page.runs.flatMap((item) => (item === run ? item.scores : item.scores.slice(-1).map((score) => ({ ...score, label: `${score.label}, ${item.name}`, isOther: true }))));
  return chart({ title: "Held-out pass@k over k", unit: "share of prompts; bands: 95 % over prompts", log: true, xLabel: "k =", yRange: [0, 1],
    series: rows.map((score, i) => ({ ...score, x: score.k, y: score.value, colour: COLOURS[i % COLOURS.length] })) });
}

function heldOut(run) {
  const ks = [...new Set(run.scores.flatMap((score) => score.k))].sort((a, b) => a - b);
  const cell = (score, k) => { const i = score.k.indexOf(k); return i < 0 ? "-" : score.value[i].toFixed(3) + (score.low.length ? ` [${score.low[i].toFixed(3)}, ${score.high[i].toFixed(3)}]` : ""); };
  return [
    charts([hasManyK(run) ? passChart(run) : null, panel("Held-out")]),
    ks.length ? el("div", { class: "scroll" }, el("table", {}, el("tr", {}, el("th"), ks.map((k) => el("th", { class: "n" }, `pass@${k}`))),
      run.scores.map((score) => el("tr", {}, el("th", {}, score.label), ks.map((k) => el("td", { class: "n" }, cell(score, k))))))) : null,
    el("h2", {}, "Solved prompts"), matrix(run.solved),
  ];
}

// Rows are held-out prompts, columns evaluations; the darker a cell, the more of the samples were correct.
function matrix(solved) {
  if (!solved.steps.length) return el("p", { class: "soft" }, "Not recorded: evaluations.jsonl is missing, or there was no evaluation.");
  const isSolved = (share) => share !== null && share >= 0.5, ends = solved.shares.map((row) => [isSolved(row[0]), isSolved(row.at(-1))]);
  const count = (before, after) => ends.filter((end) => end[0] === before && end[1] === after).length;
  const wide = Math.max(6, Math.min(56, Math.min(main.clientWidth, 680) / solved.steps.length)), tall = Math.max(3, Math.min(9, 900 / solved.prompts.length)), top = 18;
  const cells = solved.shares.flatMap((row, y) => row.map((share, x) => svg("rect", { x: x * wide, y: top + y * tall, width: wide - 1, height: tall - (tall > 4 ? 1 : 0.3), fill: "var(--c2)", "fill-opacity": share === null ? 0 : 0.06 + 0.94 * share },
    svg("title", {}, `${solved.prompts[y]}, step ${solved.steps[x]}: ${share === null ? "not asked" : number(share, 2)}`))));
  const labels = solved.steps.map((step, x) => (x % Math.ceil((12 + 7 * String(solved.steps.at(-1)).length) / wide) ? null : svg("text", { x: x * wide + wide / 2, y: 12, "text-anchor": "middle" }, String(step))));
  const size = [solved.steps.length * wide, top + solved.prompts.length * tall];
  return el("div", {},
    el("p", {}, `Of ${solved.prompts.length} prompts ${count(true, true)} are solved at both ends, ${count(false, true)} were gained, ${count(true, false)} lost, ${count(false, false)} are solved at neither. Solved: at least half of the samples are correct.`),
    el("p", { class: "soft" }, `Rows are prompts, by the evaluation that first solved them${solved.num_prompts > solved.prompts.length ? ` (evenly chosen from ${solved.num_prompts})` : ""}; columns are the steps of evaluations.`),
    el("div", { class: "scroll" }, svg("svg", { class: "matrix", viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img", "aria-label": "Share of correct samples by prompt and step", width: size[0], height: size[1] }, labels, cells)));
}

// ---------------------------------------------------------------- rollouts

const SORTS = { "policy version": (r) => r.group.version, reward: (r) => r.reward, advantage: (r) => r.advantage, "log-probability": (r) => r.logprob, tokens: (r) => r.tokens, "log-ratio": (r) => logRatio(r) };
const filters = { text: "", version: "", verdict: "", finish: "", sort: "policy version", isDescending: true, limit: 60 };

function rolloutsPart(run) {
  const groups = view.file ? view.file.groups : run.groups;
  const rows = groups.flatMap((group) => group.rollouts.map((rollout, index) => ({ ...rollout, index, group })));
  const list = el("ol", { class: "rows" }), status = el("p", { class: "soft", "aria-live": "polite" }), more = el("button", { type: "button", onclick: () => { filters.limit += 200; fill(); } }, "show more");
  const choose = (label, key, values) => el("label", {}, `${label} `, el("select", { onchange: (event) => { filters[key] = event.target.value; filters.limit = 60; fill(); } },
    values.map((value) => el("option", { value, selected: String(value) === filters[key] }, value === "" ? "any" : String(value)))));

  function fill() {
    const wanted = filters.text.toLowerCase(), key = SORTS[filters.sort], sign = filters.isDescending ? -1 : 1;
    const found = rows.filter((r) => (!filters.version || String(r.group.version) === filters.version) && (!filters.verdict || r.verdict === filters.verdict) && (!filters.finish || r.finish === filters.finish)
      && (!wanted || [r.text, r.detail, r.group.prompt, r.group.answer, r.group.id, r.group.name].some((text) => text.toLowerCase().includes(wanted))));
    found.sort((a, b) => sign * ((key(a) ?? -Infinity) - (key(b) ?? -Infinity)) || (a.group.id < b.group.id ? -1 : a.group.id > b.group.id ? 1 : a.index - b.index));
    status.textContent = `${number(found.length)} of ${number(rows.length)} rollouts`;
    list.replaceChildren(...found.slice(0, filters.limit).map((r) => el("li", {}, el("button", { type: "button", onclick: () => openGroup(r.group, r.index) },
      el("span", { class: "meta" }, el("span", { class: r.verdict }, r.verdict), ` · reward ${number(r.reward, 3)} · advantage ${number(r.advantage, 3)} · ${number(r.logprob, 4)} nats · ${r.tokens} tokens · version ${r.group.version} · ${r.group.name}${r.heat ? " · with log-ratios of its tokens" : ""}`),
      el("span", { class: "text" }, r.text || "(empty)")))));
    more.hidden = found.length <= filters.limit;
  }

  fill();
  const versions = ["", ...new Set(groups.map((group) => group.version))];
  const turn = async (by) => {
    const wanted = view.file ? view.file.number + by : 0;
    view.file = await (await fetch(`rollouts?run=${view.run}&number=${wanted}`)).json();
    show();
  };
  const paging = page.served ? el("div", { class: "bar" }, view.file
    ? [el("button", { type: "button", disabled: view.file.number === 0, onclick: () => turn(-1) }, "previous file"), el("button", { type: "button", disabled: view.file.number + 1 >= view.file.pages, onclick: () => turn(1) }, "next file"),
      el("span", {}, `file ${view.file.number + 1} of ${view.file.pages} of the rollout log`), el("button", { type: "button", onclick: () => { view.file = null; show(); } }, "back to the sample")]
    : el("button", { type: "button", onclick: () => turn(0) }, "page through all rollouts")) : null;
  const reasons = run.reasons.map(([verdict, reason, count]) => el("tr", {}, el("td", { class: "n" }, number(count)), el("td", { class: verdict }, verdict), el("td", {}, reason || "no reason given")));
  return [
    paging,
    el("div", { class: "bar" },
      el("input", { type: "search", placeholder: "search prompts, responses, evidence", "aria-label": "search", value: filters.text, oninput: (event) => { filters.text = event.target.value; filters.limit = 60; fill(); } }),
      choose("version", "version", versions), choose("verdict", "verdict", ["", "correct", "wrong", "invalid"]), choose("finish", "finish", ["", "stop", "length"]), choose("sort by", "sort", Object.keys(SORTS)),
      el("label", {}, el("input", { type: "checkbox", checked: filters.isDescending, onchange: (event) => { filters.isDescending = event.target.checked; fill(); } }), " descending")),
    status, rows.length ? null : el("p", { class: "soft" }, "Not recorded: there is no Parquet file under rollouts/ that can be read."),
    list, more,
    view.file ? null : el("p", { class: "soft" }, page.rules.rollouts),
    el("h2", {}, "Verdicts with their most frequent reasons"),
    el("p", { class: "soft" }, "Of all rollouts in the log; # stands for a number."),
    el("div", { class: "scroll" }, el("table", {}, reasons)),
  ];
}

function openGroup(group, chosen) {
  const dialog = document.querySelector("dialog");
  const learned = group.steps === null || group.steps === undefined ? "" : group.steps.length ? ` · trained on in step ${group.steps.join(", ")}` : " · not trained on";
  dialog.replaceChildren(...[
    el("div", { class: "bar" }, el("b", {}, `Group ${group.id}`), el("span", { class: "soft" }, `${group.name} · policy version ${group.version} · V* ${number(group.value, 3)}${learned}`),
      el("button", { class: "close", type: "button", autofocus: true, onclick: () => dialog.close() }, "close")),
    el("pre", {}, group.prompt || "(no text)"), group.answer ? el("p", {}, "gold answer: ", el("code", {}, group.answer)) : null,
    group.rollouts.some((r) => r.heat) ? el("p", { class: "soft" }, explanation(group.heat_step)) : null,
    el("div", { class: "group" }, group.rollouts.map((r, i) => el("section", { class: i === chosen ? "chosen" : null },
      el("p", { class: "meta" }, el("span", { class: r.verdict }, r.verdict), ` · reward ${number(r.reward, 3)} · advantage ${number(r.advantage, 3)}`),
      r.heat ? heatMap(r) : el("pre", {}, r.text || "(empty)"),
      el("p", { class: "meta" }, `${number(r.logprob, 4)} nats · ${r.tokens} tokens · ${r.finish === "length" ? "cut at the limit" : "ended by itself"}`),
      r.detail ? el("p", { class: "meta" }, `grader: ${r.detail}`) : null, r.extra ? el("pre", {}, r.extra) : null)))].filter(Boolean));
  dialog.showModal();
}

// The tokens of a response, coloured by how much likelier the learner makes them than the sampler did.
const FULL_COLOUR = 1;  // nats
const explanation = (step) => `Colours: log-ratio of each token before the update of step ${step}. Blue: the learner makes it likelier than the sampler did; orange: less likely; full from ${FULL_COLOUR} nat on. Arrow keys move from token to token.`;
const logRatio = (rollout) => rollout.heat && rollout.heat.reduce((sum, [, learner, sampler]) => sum + learner - sampler, 0);
function heatMap(rollout) {
  const status = el("p", { class: "meta", "aria-live": "polite" }, `log-ratio ${number(logRatio(rollout), 3)} nats`);
  const cells = rollout.heat.map(([text, learner, sampler], i) => {
    const ratio = learner - sampler, words = `log-ratio ${ratio > 0 ? "+" : ""}${ratio.toFixed(3)}: learner ${learner.toFixed(3)}, sampler ${sampler.toFixed(3)} nats`;
    const say = () => { status.textContent = `Token ${i + 1}, ${JSON.stringify(text)}: ${words}`; };
    const cell = el("span", { class: "token", colour: ratio > 0 ? "var(--c0)" : "var(--c1)", title: words, tabindex: i ? -1 : 0, onfocus: say, onpointerenter: say }, text.replaceAll("\n", "↵\n") || "·");
    cell.style.setProperty("--share", Math.min(1, Math.abs(ratio) / FULL_COLOUR));
    return cell;
  });
  const map = el("pre", { class: "heat", role: "group", "aria-label": "log-ratio of each token" }, cells, rollout.tokens > cells.length ? ` … ${number(rollout.tokens - cells.length)} further tokens` : null);
  map.addEventListener("keydown", (event) => {
    const at = cells.indexOf(document.activeElement), to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: cells.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    cells[at].tabIndex = -1;
    const next = cells[Math.max(0, Math.min(cells.length - 1, to))];
    next.tabIndex = 0;
    next.focus();
  });
  return el("div", {}, map, status);
}

// ---------------------------------------------------------------- the run

function runPart(run) {
  const [whole, wait, train, sync, publish, save] = ["learner/seconds", "learner/wait_seconds", "learner/train_seconds", "sync/seconds", "sync/publish_seconds", "checkpoint/seconds"].map((name) => run.seconds[name] || 0);
  const total = Math.max(whole + save, run.facts.seconds || 0);
  const split = [["training", train], ["waiting for rollouts", wait], ["syncs", sync + publish], ["saving", save], ["the rest of the steps", Math.max(0, whole - train - wait - sync - publish)], ["outside of steps: start, first and last evaluation", total - whole - save]];
  const beside = [["sampling", "sampler/seconds"], ["grading", "grader/seconds"], ["evaluations", "evaluation/seconds"]].filter(([, name]) => run.seconds[name]);
  const sampled = run.counts.reduce((sum, item) => sum + item.groups, 0);
  const dropped = run.curves["window/dropped_groups"]?.y.at(-1);
  const notes = [
    run.starts.length ? `Restarts: ${run.starts.length - 1}${run.starts.length > 1 ? `, from step ${run.starts.slice(1, 40).join(", ")}` : ""}.` : "Restarts are not recorded: starts.jsonl is missing.",
    dropped === undefined ? "Dropped groups are not recorded." : `${number(dropped)} groups of old versions were dropped at syncs.`,
    run.num_trained === null ? "Batches are not recorded: batches.jsonl is missing." : `${number(sampled)} groups are in the log; ${number(run.num_trained)} were trained on.`,
    ...run.damaged.slice(0, 20).map((text) => `Left out: ${text}`), run.damaged.length > 20 ? `And ${run.damaged.length - 20} more.` : null];
  const differ = page.differences.map(([key, values]) => el("tr", {}, el("th", {}, key), values.map((value) => el("td", {}, value))));
  return [
    el("h2", {}, "Time"),
    whole ? [el("div", { class: "split", role: "img", "aria-label": "shares of the time" }, split.map(([, seconds], i) => { const part = el("div", { colour: COLOURS[i] }); part.style.flexGrow = seconds; return part; })),
      el("p", { class: "legend" }, split.map(([name, seconds], i) => el("span", { colour: COLOURS[i] }, el("i"), `${name} ${duration(seconds)}, ${(100 * seconds / total).toFixed(1)} %`))),
      beside.length ? el("p", { class: "soft" }, `Beside these steps: ${beside.map(([name, key]) => `${name} ${duration(run.seconds[key])}`).join(", ")}. Evaluations of several processes or of offline epochs are a part of the steps.`) : null] : el("p", { class: "soft" }, "Not recorded: learner/seconds"),
    el("h2", {}, "Restarts and drops"), notes.map((text) => text && el("p", {}, text)),
    page.runs.length > 1 ? [el("h2", {}, "Differences between the configs"), el("div", { class: "scroll" }, el("table", {}, el("tr", {}, el("th"), page.runs.map((item) => el("th", {}, item.name))), differ))] : null,
    el("h2", {}, "Launch again"), run.command ? [el("pre", {}, run.command), el("p", { class: "soft" }, "The same run.dir goes on with the run; another one begins it again.")] : el("p", { class: "soft" }, "Not recorded: config.yaml is missing, or of no training."),
    el("h2", {}, "Configuration"), run.config ? el("pre", {}, run.config) : el("p", { class: "soft" }, "Not recorded: config.yaml is missing."),
  ];
}

// ---------------------------------------------------------------- tabs, theme, and following a run

const PARTS = { Overview: overview, Curves: curvesPart, "Held-out": heldOut, Rollouts: rolloutsPart, Run: runPart };
const main = document.querySelector("main"), nav = document.querySelector("nav");

function collect() {
  drawn = [...main.querySelectorAll("figure")].map((figure) => figure.chart).filter(Boolean);
  linked = drawn.filter((item) => item.isLinked);
  drawn.forEach((item) => item.draw());
}

function show() {
  nav.querySelectorAll("button").forEach((button) => { const isShown = button.textContent === view.tab; button.setAttribute("aria-selected", isShown); button.tabIndex = isShown ? 0 : -1; });
  main.replaceChildren(...[PARTS[view.tab](page.runs[view.run])].flat(3).filter(Boolean));
  collect();
}

for (const name of Object.keys(PARTS)) nav.append(el("button", { type: "button", role: "tab", onclick: () => { view.tab = name; location.hash = name; show(); } }, name));
nav.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], buttons = [...nav.children];
  if (by) { const next = buttons[(buttons.indexOf(document.activeElement) + by + buttons.length) % buttons.length]; next.click(); next.focus(); }
});

const runs = document.getElementById("runs");
runs.hidden = page.runs.length < 2;
runs.querySelector("select").append(...page.runs.map((run, i) => el("option", { value: i }, run.name)));
runs.addEventListener("change", (event) => { view.run = Number(event.target.value); view.domain = null; view.file = null; document.querySelector("h1").textContent = page.runs[view.run].name; show(); });

const prefersDark = matchMedia("(prefers-color-scheme: dark)"), themes = ["system", "light", "dark"];
let theme = "system";
function paint() {
  document.documentElement.dataset.theme = theme === "system" ? (prefersDark.matches ? "dark" : "light") : theme;
  document.getElementById("theme").textContent = `theme: ${theme}`;
}
document.getElementById("theme").addEventListener("click", () => { theme = themes[(themes.indexOf(theme) + 1) % 3]; paint(); });
prefersDark.addEventListener("change", paint);
document.body.append(svg("svg", { width: 0, height: 0, "aria-hidden": true }, svg("defs", {}, svg("linearGradient", { id: "lag" },
  svg("stop", { offset: 0, "stop-color": "var(--soft)", "stop-opacity": 0 }), svg("stop", { offset: 1, "stop-color": "var(--soft)", "stop-opacity": 0.16 })))));
addEventListener("resize", () => drawn.forEach((item) => item.draw()));
if (decodeURIComponent(location.hash.slice(1)) in PARTS) view.tab = decodeURIComponent(location.hash.slice(1));
paint();
show();
document.documentElement.dataset.drawn = Math.round(performance.now());  // milliseconds since the page was opened

if (page.served) {
  let last = "";
  const timer = setInterval(async () => {
    const text = await fetch("data").then((answer) => (answer.ok ? answer.text() : ""), () => null);
    if (text === null) { clearInterval(timer); document.querySelector("h1").append(" (the server has ended)"); return; }
    if (!text || text === last) return;
    page = JSON.parse(text);
    if (last && view.tab !== "Rollouts" && !document.activeElement?.closest("svg")) show();
    last = text;
  }, 5000);
}
