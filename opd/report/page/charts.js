// Line charts and the stacked seconds of a step, drawn as SVG; the pointer's step is told in the caption.
"use strict";

const WIDTH = 460, HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;
const MOST_POINTS = 400; // beyond, neighbours are averaged: more cannot be seen
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]; // Okabe and Ito's

// lines: [{ name, points: [[step, value], ...], faint }]
function lineChart({ title, unit, lines, from = null, to = null, digits = 3 }) {
  lines = lines.filter((line) => line.points.length).map((line, k) => ({ colour: COLOURS[k % 6], ...line }));
  if (!lines.length) return null;
  lines.forEach((line) => (line.points = thinned(line.points)));
  const points = lines.flatMap((line) => line.points);
  const least = Math.min(...points.map((point) => point[1]));
  const y = axis(points.map((point) => point[1]), HEIGHT - BOTTOM, TOP, from ?? Math.min(0, least), to);
  const x = axis(points.map((point) => point[0]), LEFT, WIDTH - RIGHT);
  const svg = frame(x, y, `${title}, ${unit}`);
  for (const line of lines) {
    const path = line.points.map((point, k) => `${k ? "L" : "M"}${x.at(point[0]).toFixed(1)} ${y.at(point[1]).toFixed(1)}`);
    svg.append(make("svg:path", {
      d: path.join(""), fill: "none", stroke: line.colour, "stroke-width": line.faint ? 1.2 : 2.2,
      opacity: line.faint ? 0.4 : 1, "stroke-linejoin": "round",
    }));
    if (line.points.length < 30) {
      line.points.forEach((point) => svg.append(
        make("svg:circle", { cx: x.at(point[0]), cy: y.at(point[1]), r: line.faint ? 1.6 : 3, fill: line.colour })));
    }
  }
  const keys = lines.map((line) => make("span", { class: line.faint ? "key faded" : "key", key: line.colour }, line.name));
  const told = (step) => lines.forEach((line, k) => {
    const nearest = line.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    keys[k].textContent = `${line.name} ${number(nearest[1], digits)}`;
  });
  const point = (step) => (step === null ? lines.forEach((line, k) => (keys[k].textContent = line.name)) : told(step));
  return charted(title, unit, svg, keys, x, point);
}

// layers: [{ name, points }], all at the same steps
function stackedChart({ title, unit, layers }) {
  layers = layers.filter((layer) => layer.points.some((point) => point[1] > 0));
  if (!layers.length) return null;
  layers = layers.map((layer, k) => ({ ...layer, colour: COLOURS[k % 6], points: thinned(layer.points) }));
  const totals = layers[0].points.map((_, k) => layers.reduce((sum, layer) => sum + layer.points[k][1], 0));
  const y = axis(totals, HEIGHT - BOTTOM, TOP, 0);
  const steps = layers[0].points.map((point) => point[0]);
  const half = steps.length > 1 ? (steps[1] - steps[0]) / 2 : 0.5;
  const x = axis([steps[0] - half, steps[steps.length - 1] + half], LEFT, WIDTH - RIGHT);
  const svg = frame(x, y, `${title}, ${unit}`);
  let below = layers[0].points.map(() => 0);
  for (const layer of layers) {
    const above = layer.points.map((point, k) => below[k] + point[1]);
    const corner = (step, value) => `${x.at(step).toFixed(1)} ${y.at(value).toFixed(1)}`;
    const edge = (values) => values.flatMap((value, k) => [corner(steps[k] - half, value), corner(steps[k] + half, value)]);
    svg.append(make("svg:path", {
      d: `M${[...edge(above), ...edge(below).reverse()].join("L")}Z`, fill: layer.colour, opacity: 0.85,
    }));
    below = above;
  }
  const keys = layers.map((layer) => make("span", { class: "key", key: layer.colour }, layer.name));
  const point = (step) => layers.forEach((layer, k) => {
    const nearest = step === null ? null : layer.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
    keys[k].textContent = nearest ? `${layer.name} ${number(nearest[1], 2)}` : layer.name;
  });
  return charted(title, unit, svg, keys, x, point);
}

function charted(title, unit, svg, keys, x, point) {
  const told = make("span", { class: "faint" }, unit);
  const cursor = make("svg:line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = Math.min(Math.max(((event.clientX - box.left) / box.width) * WIDTH, LEFT), WIDTH - RIGHT);
    const step = x.value(place);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.setAttribute("visibility", "visible");
    told.textContent = `step ${Math.round(step)}`;
    point(step);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    told.textContent = unit;
    point(null);
  });
  return make("figure", {}, make("figcaption", {}, make("strong", {}, title), " ", told, make("span", { class: "keys-of" }, keys)), svg);
}

function axis(values, start, end, from = null, to = null) {
  let low = from ?? values.reduce((a, b) => Math.min(a, b));
  let high = to ?? values.reduce((a, b) => Math.max(a, b));
  if (high === low) high = low + 1;
  const at = (value) => start + ((value - low) / (high - low)) * (end - start);
  const value = (place) => low + ((place - start) / (end - start)) * (high - low);
  return { low, high, at, value, marks: marks(low, high) };
}

function marks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step / 1e6; mark += step) found.push(mark);
  return found.map((mark) => ({ mark, text: String(Number(mark.toPrecision(6))).replace(/^-/, "−") }));
}

function frame(x, y, label) {
  const svg = make("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const { mark, text } of y.marks) {
    svg.append(make("svg:line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(mark), y2: y.at(mark) }));
    svg.append(make("svg:text", { x: LEFT - 6, y: y.at(mark) + 4, "text-anchor": "end" }, text));
  }
  for (const { mark, text } of x.marks) {
    if (Number.isInteger(mark)) svg.append(make("svg:text", { x: x.at(mark), y: HEIGHT - 8, "text-anchor": "middle" }, text));
  }
  return svg;
}

function thinned(points) {
  const size = Math.ceil(points.length / MOST_POINTS);
  if (size <= 1) return points;
  const groups = [];
  for (let k = 0; k < points.length; k += size) groups.push(points.slice(k, k + size));
  return groups.map((group) => [mean(group.map((point) => point[0])), mean(group.map((point) => point[1]))]);
}

// Centred, over five points, as in curves.png: a one-sided average would lag behind the trend.
function smoothed(points) {
  if (points.length < 5) return [];
  return points.map((point, k) => [point[0], mean(points.slice(Math.max(0, k - 2), k + 3).map((near) => near[1]))]);
}
