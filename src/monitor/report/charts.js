// One chart: axes, curves, marks of events, a tooltip. Draws SVG; knows nothing of runs but their number.
// What was drawn is told in data attributes: figure[data-points], path[data-series][data-points].

const svgNamespace = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes) {
  const node = document.createElementNS(svgNamespace, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// 12.35K: `digits` of them from ten thousand on, five below.
function shortNumber(value, digits = 4) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(3).replace(/\.?0+e/, "e");
  if (size < 1e4) return String(Number(value.toPrecision(5)));
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (size >= unit) return Number((value / unit).toPrecision(digits)) + name;
}

function shortTime(seconds) {
  if (seconds < 0) return "−" + shortTime(-seconds);
  const s = Math.round(seconds * 10) / 10;
  if (s < 60) return s + "s";
  const two = n => String(Math.floor(n)).padStart(2, "0");
  if (s < 3600) return Math.floor(s / 60) + "m" + (s % 60 >= 1 ? two(s % 60) + "s" : "");
  if (s < 86400) return Math.floor(s / 3600) + "h" + (s % 3600 >= 60 ? two(s % 3600 / 60) + "m" : "");
  return Math.floor(s / 86400) + "d" + (s % 86400 >= 3600 ? two(s % 86400 / 3600) + "h" : "");
}

// Index of the value nearest to x in rising values.
function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(values[high] - x) < Math.abs(values[low] - x) ? high : low;
}

// Round numbers in [low, high], about `count` of them; steps of time are those of a clock.
function ticks(low, high, count, time) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map(k => k * power).find(s => s >= rough * 0.999);
  if (time && rough > 1)
    step = [2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200].find(s => s >= rough)
      || Math.ceil(rough / 86400) * 86400;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; ++k) found.push(k * step);
  return found;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low);
  if (decades < 1) return ticks(low, high, 5, false);
  const found = [], digits = decades < 3 ? [1, 2, 5] : [1], every = Math.ceil(decades / 6);
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += every)
    for (const digit of digits) {
      const value = Number(digit + "e" + power);
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  return found;
}

// panel as in the page's data; each series has `x` (filled in by place()), `ink` (a CSS colour) and `hidden`.
class Chart {
  constructor(panel, page) {
    this.panel = panel;
    this.page = page;
    this.log = panel.startsLog;
    this.figure = element("figure", {"data-panel": panel.id});
    const head = element("header", {}, element("h3", {}, panel.title), element("span", {class: "quiet"}, panel.unit));
    if (panel.log) head.append(this.logButton());
    this.svg = shape("svg", {role: "img", "aria-label": panel.title});
    this.svg.addEventListener("pointermove", event => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.caption = element("figcaption");
    this.figure.append(head, this.legend(), this.svg, this.caption);
  }

  logButton() {
    const button = element("button", {"data-log": this.panel.id, "aria-pressed": String(this.log)}, "log");
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
    return button;
  }

  // A raw curve and its mean share one entry.
  legend() {
    const legend = element("div", {class: "legend"});
    for (const series of this.panel.series) {
      if (series.style === "raw") continue;
      const swatch = element("span", {class: series.style === "area" ? "swatch block" : series.second ? "swatch dashed" : "swatch"});
      swatch.style.setProperty("--ink", series.ink);
      const entry = element("button", {class: "toggle", "aria-pressed": "true"}, swatch, series.label);
      entry.addEventListener("click", () => {
        const shown = entry.getAttribute("aria-pressed") !== "true";
        entry.setAttribute("aria-pressed", String(shown));
        for (const other of this.panel.series)
          if (other.name === series.name && other.run === series.run) other.hidden = !shown;
        this.draw();
      });
      legend.append(entry);
    }
    return legend;
  }

  shown() {
    return this.panel.series.filter(series => !series.hidden);
  }

  drawable(value) {
    return value !== null && (!this.log || value > 0);
  }

  // The values that stand at each x: a stack's areas lie on each other.
  measure() {
    const stacked = this.panel.kind === "stack";
    let below = null;
    let [low, high, left, right] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const series of this.shown()) {
      series.base = stacked && below ? below : null;
      series.top = stacked ? series.value.map((v, i) => (v || 0) + (below ? below[i] : 0)) : series.value;
      if (stacked) below = series.top;
      for (let i = 0; i < series.x.length; ++i) {
        if (!this.drawable(series.top[i])) continue;
        low = Math.min(low, series.top[i]); high = Math.max(high, series.top[i]);
        left = Math.min(left, series.x[i]); right = Math.max(right, series.x[i]);
      }
    }
    if (stacked) low = 0;
    if (high === -Infinity) [low, high, left, right] = [this.log ? 0.1 : 0, 1, 0, 1];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    if (this.log) {
      const margin = (high / low) ** 0.04 || 1;
      [low, high] = low === high ? [low / 2, high * 2] : [low / margin, high * margin];
    } else {
      const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
      low = stacked || (low >= 0 && low < margin * 4) ? 0 : low - margin;
      high += margin;
    }
    return {low, high, left, right};
  }

  draw() {
    const width = Math.max(260, this.svg.clientWidth || 460), height = this.svg.clientHeight || 240;
    const box = {left: 52, right: width - 12, top: 14, bottom: height - 22};
    const range = this.measure();
    const size = value => this.log ? Math.log(value) : value;
    const x = value => box.left + (value - range.left) / (range.right - range.left) * (box.right - box.left);
    const y = value => box.bottom - (size(value) - size(range.low)) / (size(range.high) - size(range.low)) * (box.bottom - box.top);
    this.view = {box, range, x, y, width, height};
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    this.drawAxes();
    let points = 0, total = 0, drawn = 0;
    for (const series of this.shown()) {
      const count = series.style === "area" ? this.drawArea(series) : this.drawCurve(series);
      points += count;
      if (series.x.length < series.total && series.style !== "area") { total = Math.max(total, series.total); drawn = Math.max(drawn, series.x.length); }
    }
    this.drawMarks();
    this.figure.dataset.points = points;
    const windows = this.shown().filter(series => series.window > 1).map(series => series.window);
    const means = [...new Set([Math.min(...windows), Math.max(...windows)])].join(" to ");
    const thin = this.shown().some(series => series.style === "raw");
    const notes = [this.panel.note, windows.length ? `${thin ? "thick: means" : "means"} of ${means} steps` : "", drawn ? `${drawn} of ${total} points drawn, the extremes of each bucket` : ""];
    this.caption.textContent = notes.filter(Boolean).join("; ");
  }

  text(content, attributes) {
    const node = shape("text", attributes);
    node.textContent = content;
    this.svg.append(node);
  }

  drawAxes() {
    const {box, range, x, y} = this.view;
    const rows = this.log ? logTicks(range.low, range.high) : ticks(range.low, range.high, 5, false);
    for (const value of rows) {
      this.svg.append(shape("line", {class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value)}));
      this.text(shortNumber(Number(value.toPrecision(8))), {x: box.left - 6, y: y(value) + 4, "text-anchor": "end"});
    }
    this.svg.append(shape("line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}));
    const count = Math.max(2, Math.floor((box.right - box.left) / 64));
    for (const value of ticks(range.left, range.right, count, this.page.axis === "seconds")) {
      const edge = x(value) > box.right - 18 ? "end" : "middle";
      this.text(this.page.formatX(value), {x: edge === "end" ? box.right + 8 : x(value), y: box.bottom + 15, "text-anchor": edge});
    }
  }

  drawCurve(series) {
    const {x, y} = this.view;
    let path = "", points = 0, segments = 0, length = 0;
    const lonely = [];
    const close = last => { if (length === 1) lonely.push(last); length = 0; };
    for (let i = 0; i < series.x.length; ++i) {
      if (!this.drawable(series.value[i])) { close(i - 1); continue; }
      path += `${length ? "L" : "M"}${x(series.x[i]).toFixed(1)},${y(series.value[i]).toFixed(1)}`;
      if (!length) ++segments;
      ++length;
      ++points;
    }
    close(series.x.length - 1);
    const curve = shape("path", {class: `curve ${series.style}${series.second ? " second" : ""}`, d: path || "M0,0",
      "data-series": series.label, "data-style": series.style, "data-points": points, "data-segments": segments});
    curve.style.setProperty("--ink", series.ink);
    this.svg.append(curve);
    const dots = series.style === "dots" && points < 200 ? series.x.map((_, i) => i).filter(i => this.drawable(series.value[i])) : lonely;
    for (const i of dots) {
      const dot = shape("circle", {class: "dot", cx: x(series.x[i]), cy: y(series.value[i]), r: series.style === "dots" ? 3 : 1.5});
      dot.style.setProperty("--ink", series.ink);
      this.svg.append(dot);
    }
    return points;
  }

  drawArea(series) {
    const {x, y} = this.view;
    const at = (i, value) => `${x(series.x[i]).toFixed(1)},${y(value).toFixed(1)}`;
    const over = series.x.map((_, i) => at(i, series.top[i]));
    const under = series.x.map((_, i) => at(i, series.base ? series.base[i] : 0)).reverse();
    const area = shape("path", {class: "area", d: `M${over.join("L")}L${under.join("L")}Z`,
      "data-series": series.label, "data-style": "area", "data-points": series.x.length, "data-segments": 1});
    area.style.setProperty("--ink", series.ink);
    this.svg.append(area);
    return series.x.length;
  }

  // Checkpoints that would touch each other are thinned.
  drawMarks() {
    const {box, range, x} = this.view;
    let drawn = 0, last = -Infinity;
    for (const mark of this.page.visibleMarks()) {
      if (mark.x < range.left || mark.x > range.right) continue;
      const at = x(mark.x), full = mark.name !== "checkpoint";
      if (!full && Math.abs(at - last) < 5) continue;
      if (!full) last = at;
      const node = shape("line", {class: full ? "mark full" : "mark", "data-mark": mark.name, x1: at, x2: at,
        y1: full ? box.top : box.bottom - 8, y2: box.bottom});
      const head = full ? `M${at - 4},${box.top - 8}h8l-4,7Z` : `M${at - 4},${box.bottom}h8l-4,-7Z`;
      const cap = shape("path", {class: "mark-head", d: head});
      for (const part of [node, cap]) part.style.setProperty("--ink", mark.ink);
      this.svg.append(node, cap);
      ++drawn;
    }
    this.figure.dataset.marks = drawn;
  }

  // What stands near the pointer: the nearest point of each curve, those nearest in height first.
  near(px, py) {
    const {box, range, y} = this.view;
    const wanted = range.left + (px - box.left) / (box.right - box.left) * (range.right - range.left);
    const found = [];
    for (const series of this.shown()) {
      const at = series.x.length ? nearest(series.x, wanted) : -1;
      if (at < 0 || series.value[at] === null) continue;
      found.push({series, at, away: this.drawable(series.top[at]) ? Math.abs(y(series.top[at]) - py) : Infinity});
    }
    return found;
  }

  hover(event) {
    const bounds = this.svg.getBoundingClientRect();
    const px = (event.clientX - bounds.left) * this.view.width / bounds.width;
    const py = (event.clientY - bounds.top) * this.view.height / bounds.height;
    const found = this.near(px, py);
    if (!found.length) return this.leave();
    const {box, x} = this.view;
    const lead = found.reduce((a, b) => Math.abs(x(b.series.x[b.at]) - px) < Math.abs(x(a.series.x[a.at]) - px) ? b : a);
    const step = lead.series.step[lead.at], at = x(lead.series.x[lead.at]);
    this.hair ||= shape("line", {class: "hair"});
    for (const [key, value] of Object.entries({x1: at, x2: at, y1: box.top, y2: box.bottom})) this.hair.setAttribute(key, value);
    this.svg.append(this.hair);
    const kept = new Set([...found].sort((a, b) => a.away - b.away).slice(0, 10));
    const rows = [element("b", {}, this.page.describeStep(lead.series.run, step))];
    for (const entry of found.filter(entry => kept.has(entry))) {
      const swatch = element("span", {class: "swatch block"});
      swatch.style.setProperty("--ink", entry.series.ink);
      const own = entry.series.step[entry.at];
      const label = entry.series.label + (entry.series.window > 1 ? `, mean of ${entry.series.window}` : "");
      rows.push(element("div", {}, swatch, `${label}: `, element("b", {}, shortNumber(entry.series.value[entry.at])),
        own === step ? "" : ` (step ${own})`));
    }
    for (const mark of this.page.visibleMarks())
      if (Math.abs(x(mark.x) - px) < 6) rows.push(element("div", {}, `${mark.label}, step ${mark.step}${mark.text ? ": " + mark.text : ""}`));
    this.page.showTooltip(event, rows);
  }

  leave() {
    this.hair?.remove();
    this.page.hideTooltip();
  }
}
