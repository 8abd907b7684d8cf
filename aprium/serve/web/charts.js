// Lines over the last two minutes, and bars.

import { el, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 120;

/** Lines over time; `series` are [name, class] pairs, `format` writes a value. */
export class LineChart {
  constructor(title, series, format, samples) {
    this.title = title;
    this.series = series;
    this.format = format;
    this.samples = samples;
    this.values = [];
    this.lines = series.map(([, kind]) => svg("path", { class: `line ${kind}` }));
    this.areas = series.map(([, kind]) => svg("path", { class: `area ${kind}` }));
    const grid = [0, 0.5, 1].map((at) =>
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: at * HEIGHT, y2: at * HEIGHT }));
    this.drawing = svg(
      "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" },
      ...grid, ...this.areas, ...this.lines,
    );
    this.now = series.map(() => el("b", {}, "–"));
    this.top = el("span", {});
    this.middle = el("span", {});
    const names = series.map(([name, kind], i) =>
      el("span", { class: `key ${kind}` }, el("i", {}), `${name} `, this.now[i]));
    this.element = el(
      "figure", { class: "chart" },
      el("figcaption", {}, el("h3", {}, title), el("span", { class: "legend" }, ...names)),
      el("div", { class: "plot" },
        el("div", { class: "axis", "aria-hidden": "true" }, this.top, this.middle, el("span", {}, "0")),
        this.drawing),
      el("div", { class: "times", "aria-hidden": "true" },
        el("span", {}, "2 minutes ago"), el("span", {}, "now")),
    );
  }

  /** Add a sample, one value a line; null is a gap. */
  push(values) {
    this.values = [...this.values.slice(1 - this.samples), values];
    const known = this.values.filter(Boolean);
    const top = roundUp(Math.max(1e-9, ...known.flat()));
    this.top.textContent = this.format(top);
    this.middle.textContent = this.format(top / 2);
    this.series.forEach((_, i) => {
      const line = this.path(i, top);
      this.lines[i].setAttribute("d", line.stroke);
      this.areas[i].setAttribute("d", line.area);
      if (values) this.now[i].textContent = this.format(values[i]);
    });
    const said = this.series.map(([name], i) => `${name} ${values ? this.format(values[i]) : "unknown"}`);
    this.drawing.setAttribute("aria-label", `${this.title}: now ${said.join(", ")}`);
  }

  path(i, top) {
    let [stroke, area, open] = ["", "", null];
    const close = (x) => {
      if (open !== null) area += `L${x} ${HEIGHT}L${open} ${HEIGHT}Z`;
      open = null;
    };
    let last = 0;
    this.values.forEach((values, at) => {
      const x = ((this.samples - this.values.length + at) * WIDTH) / (this.samples - 1);
      if (!values) return close(last);
      const y = HEIGHT - (values[i] / top) * HEIGHT;
      const to = `${open === null ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
      open ??= x.toFixed(1);
      stroke += to;
      area += to;
      last = x.toFixed(1);
    });
    close(last);
    return { stroke, area };
  }
}

/** Return the next of 2, 4, 6, 8, 10, 20, ... that is at least `value`: half of it is round too. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [2, 4, 6, 8, 10].map((n) => n * power).find((n) => n >= value * (1 - 1e-9));
}

/** Return a row with a bar that is `share` of the whole long. */
export function bar(name, share, text) {
  const inner = el("i", {});
  inner.style.width = `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(2)}%`;
  return el("li", { class: "bar" }, el("span", {}, name), el("span", { class: "track", "aria-hidden": "true" }, inner),
    el("span", { class: "figure" }, text));
}
