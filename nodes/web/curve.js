// Draws on its node what a node reports while it runs. The events and their fields are those of nodes/wiring/reporting.py.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NAME = "reward curve";
const EVENT = "reward_guidance.step";
const COLOURS = {
  dark: ["#58a6f0", "#f0993e", "#3fbf95", "#e874ac", "#a68bf0"],
  light: ["#1d6fc2", "#b85f00", "#0c7a59", "#b0306e", "#6743c4"],
};
const FRAME = 90; // px, the legend and what is around it
const AXIS = 60; // px, the least height of one more axis
const LEFT = 36; // px, for the numbers beside an axis
const MOST_LINES = 64;

const STYLE = `
.reward-curve { box-sizing: border-box; display: flex; flex-direction: column; gap: 2px; padding: 4px 8px; overflow: hidden; border-radius: 6px;
  background: var(--comfy-input-bg); color: var(--input-text); font: 11px/16px Inter, Arial, sans-serif; }
.lg-node-widgets .reward-curve { background: var(--component-node-widget-background); }
.reward-curve > div:first-child { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0 10px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.reward-curve b { font-weight: 600; }
.reward-curve span { margin-right: auto; opacity: 0.75; }
.reward-curve > div:last-child { position: relative; flex: 1; min-height: 0; }
.reward-curve canvas { position: absolute; inset: 0; width: 100%; height: 100%; }`;

const axisOf = (name) => name.split("/")[0];
const numbers = (values) => (values ?? []).filter((value) => value !== null);
const mean = (values) => numbers(values).reduce((sum, value, _, all) => sum + value / all.length, 0);

function format(value) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
  return text.replaceAll("-", "−");
}

/** Round numbers between two, at least so many and at most a dozen or so. */
function ticks(low, high, fewest) {
  const power = 10 ** Math.floor(Math.log10(high - low));
  const within = (step) => Math.floor(high / step) - Math.ceil(low / step) + 1;
  const step = [5, 2, 1, 0.5, 0.2, 0.1].map((factor) => factor * power).find((step) => within(step) >= fewest);
  return Array.from({ length: within(step) }, (_, i) => (Math.ceil(low / step) + i) * step);
}

class Curve {
  run = null;
  steps = []; // by their index
  points = []; // one for each step: samplers of higher order report some steps twice
  names = [];
  axes = [];
  pointer = null; // px

  constructor(node) {
    this.node = node;
    this.element = document.createElement("div");
    this.element.className = "reward-curve";
    this.element.innerHTML = "<div></div><div><canvas></canvas></div>";
    this.legend = this.element.firstChild;
    this.canvas = this.element.querySelector("canvas");
    const least = () => this.least;
    const options = { serialize: false, hideOnZoom: false, getMinHeight: least, getMaxHeight: () => 2.5 * least(), getValue: () => "" };
    const widget = node.addDOMWidget(NAME, NAME, this.element, options);
    Object.assign(widget, { serialize: false, curve: this });
    this.listen();
  }

  get least() {
    return FRAME + AXIS * Math.max(1, this.axes.length);
  }

  listen() {
    const observer = new ResizeObserver(() => this.schedule());
    observer.observe(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    // Zoom, pan and menu as on the rest of the node; Nodes 2.0 sees to that itself.
    this.element.addEventListener("wheel", (event) => app.canvas.processMouseWheel(event));
    this.element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 && !LiteGraph.vueNodesMode) app.canvas.processMouseDown(event);
    });
    const { onRemoved } = this.node;
    this.node.onRemoved = function (...args) {
      observer.disconnect();
      return onRemoved?.apply(this, args);
    };
  }

  add(step) {
    if (step.run !== this.run) Object.assign(this, { run: step.run, steps: [] });
    this.steps[step.index] = step;
    this.schedule();
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.sort();
      this.draw();
    });
  }

  sort() {
    this.points = [...new Map(this.steps.filter(Boolean).map((step) => [step.step, step])).values()];
    this.names = [...new Set(this.points.flatMap((point) => Object.keys(point.series)))];
    const before = this.axes.length;
    this.axes = [...new Set(this.names.map(axisOf))];
    if (this.axes.length !== before) this.makeRoom();
  }

  makeRoom() {
    this.element.style.minHeight = `${this.least - 20}px`;
    const [width, height] = this.node.size;
    this.node.setSize([width, Math.max(height, this.node.computeSize()[1])]);
    this.node.setDirtyCanvas(true, true);
  }

  point(x) {
    this.pointer = x;
    this.schedule();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = Math.max(2, devicePixelRatio); // the graph may be zoomed in
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.lineJoin = context.lineCap = "round";
    const { color, fontFamily } = getComputedStyle(this.element);
    const [red, green, blue] = color.match(/[\d.]+/g);
    this.text = { color, font: `10px ${fontFamily}` };
    this.colours = COLOURS[+red + +green + +blue > 384 ? "dark" : "light"];
    const { steps } = this.points.at(-1);
    const x = (point) => LEFT + ((width - LEFT - 4) * (point.step - 1)) / Math.max(1, steps - 1);
    const distance = (point) => Math.abs(x(point) - this.pointer);
    const shown = this.pointer === null ? null : this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    const each = height / this.axes.length;
    this.axes.forEach((axis, i) => this.drawAxis(context, axis, i * each + 6, (i + 1) * each - 6, x, shown));
    this.drawLegend(shown ?? this.points.at(-1));
  }

  drawAxis(context, axis, top, bottom, x, shown) {
    const own = this.names.filter((name) => axisOf(name) === axis);
    const all = this.points.flatMap((point) => own.flatMap((name) => numbers(point.series[name])));
    if (!all.length) return;
    const [least, most] = [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))];
    const margin = (most - least) * 0.05 || Math.abs(most) * 0.1 || 0.1;
    const y = (value) => bottom - ((bottom - top) * (value - least + margin)) / (most - least + 2 * margin);
    this.drawGrid(context, ticks(least - margin, most + margin, Math.min(8, Math.max(2, (bottom - top) / 45))), y);
    if (shown) line(context, [[x(shown), top], [x(shown), bottom]]);
    for (const name of own) {
      context.fillStyle = context.strokeStyle = this.colour(name);
      drawSeries(context, name, this.points, x, y);
      if (shown && numbers(shown.series[name]).length) dot(context, x(shown), y(mean(shown.series[name])), 3);
    }
  }

  drawGrid(context, values, y) {
    Object.assign(context, { fillStyle: this.text.color, strokeStyle: this.text.color, font: this.text.font, lineWidth: 1 });
    Object.assign(context, { textAlign: "right", textBaseline: "middle" });
    for (const value of values) {
      context.globalAlpha = 0.15;
      line(context, [[LEFT, y(value)], [this.canvas.clientWidth, y(value)]]);
      context.globalAlpha = 0.7;
      context.fillText(format(value), LEFT - 6, y(value));
    }
    context.globalAlpha = 0.4;
  }

  /** The step and the mean of each series there. */
  drawLegend(point) {
    const title = document.createElement("span");
    title.textContent = `step ${point.step}/${point.steps}` + (point.sigma === undefined ? "" : ` · σ ${format(point.sigma)}`)
      + (point.effective === undefined ? "" : ` · ESS ${Math.round(100 * point.effective)}%`);
    const entries = this.names.filter((name) => numbers(point.series[name]).length).map((name) => {
      const entry = document.createElement("b");
      entry.style.color = this.colour(name);
      entry.textContent = `${name.split("/").at(-1)} ${format(mean(point.series[name]))}`;
      return entry;
    });
    this.legend.replaceChildren(title, ...entries);
  }

  colour(name) {
    return this.colours[this.names.indexOf(name) % this.colours.length];
  }
}

/** Thin lines for samples, or dots where they differ from step to step, and a bold one for their mean. */
function drawSeries(context, name, points, x, y) {
  const many = Math.max(...points.map((point) => point.series[name]?.length ?? 0));
  const scattered = points.at(-1).scattered.includes(name);
  for (let i = 0; i < Math.min(many, MOST_LINES); i++) {
    const places = points.filter((point) => Number.isFinite(point.series[name]?.[i])).map((point) => [x(point), y(point.series[name][i])]);
    Object.assign(context, { globalAlpha: scattered ? 0.6 : 0.45, lineWidth: 1 });
    if (scattered) places.forEach((place) => dot(context, ...place, 2));
    else if (many > 1) line(context, places);
  }
  Object.assign(context, { globalAlpha: 1, lineWidth: 2 });
  const means = points.filter((point) => numbers(point.series[name]).length).map((point) => [x(point), y(mean(point.series[name]))]);
  if (!scattered || many > 1) line(context, means);
  if (means.length === 1) dot(context, ...means[0], 2);
}

function line(context, places) {
  context.beginPath();
  for (const place of places) context.lineTo(...place);
  context.stroke();
}

function dot(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

/** The node of an execution id: "5:3" is node 3 within subgraph 5. */
function nodeAt(path) {
  return path.split(":").reduce((node, id) => (node?.subgraph ?? node)?.getNodeById?.(id), app.rootGraph);
}

function curveOf(node) {
  return node.widgets?.find((widget) => widget.name === NAME)?.curve ?? new Curve(node);
}

function drawAll() {
  const graphs = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
  for (const node of graphs.flatMap((graph) => graph.nodes)) for (const widget of node.widgets ?? []) widget.curve?.schedule();
}

/** Steps of the workflow on screen; those of others are fetched when their turn comes. */
function receive(steps, isWelcome = () => true) {
  for (const step of steps) {
    const node = step.workflow === app.rootGraph.id && nodeAt(step.node);
    if (node && isWelcome(curveOf(node), step)) curveOf(node).add(step);
  }
}

app.registerExtension({
  name: "reward_guidance.curve",
  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    new MutationObserver(drawAll).observe(document.documentElement, { attributeFilter: ["class", "style"] }); // the theme
    api.addEventListener(EVENT, ({ detail }) => receive([detail]));
    // A result that comes from the cache brings the curve of the run that made it.
    api.addEventListener("executed", ({ detail }) => receive(detail.output?.reward_guidance ?? []));
  },
  async afterConfigureGraph() {
    const answer = await api.fetchApi(`/reward_guidance/steps?workflow=${encodeURIComponent(app.rootGraph.id)}`);
    const runs = answer.ok ? await answer.json() : {}; // not where the server has yet to be restarted after an update
    for (const steps of Object.values(runs)) receive(steps, (curve, step) => !(curve.run > step.run));
  },
});
