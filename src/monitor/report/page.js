// Puts the page together from the data that the report wrote. All text goes in as text nodes.

const axes = {step: "step", tokens: "tokens", seconds: "time"};
const eventLabels = {checkpoint: "checkpoint", resume: "resume", stopped: "stopped", skipped_step: "skipped step",
  loss_spike: "loss spike", save_failed: "save failed"};
const eventInks = {checkpoint: "checkpoint", resume: "resume", stopped: "checkpoint", skipped_step: "skipped",
  loss_spike: "spike", save_failed: "skipped"};

// Later ones are drawn over earlier ones.
const eventOrder = ["stopped", "checkpoint", "loss_spike", "save_failed", "resume", "skipped_step"];

const page = {
  data: JSON.parse(document.getElementById("data").textContent),
  axis: "step",
  dark: window.matchMedia("(prefers-color-scheme: dark)"),
  hiddenMarks: new Set(),
  charts: [],
  tooltip: document.getElementById("tooltip"),

  // A step on the chosen x axis: between two knots in proportion, beyond the last one at its value.
  place(run, step) {
    if (this.axis === "step") return step;
    const knots = this.data.runs[run].axis[this.axis];
    if (!knots) return null;
    const last = knots.step.length - 1;
    if (step <= knots.step[0]) return knots.value[0];
    if (step >= knots.step[last]) return knots.value[last];
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (knots.step[middle] <= step) low = middle; else high = middle;
    }
    const part = (step - knots.step[low]) / (knots.step[high] - knots.step[low]);
    return knots.value[low] + part * (knots.value[high] - knots.value[low]);
  },

  formatX(value) {
    return this.axis === "seconds" ? shortTime(value) : shortNumber(Math.round(value * 1000) / 1000, 8);
  },

  describeStep(run, step) {
    const {axis} = this.data.runs[run];
    const kept = this.axis, parts = [`step ${step}`];
    for (const [name, format] of [["tokens", v => shortNumber(v) + " tokens"], ["seconds", shortTime]]) {
      this.axis = name;
      if (axis[name]) parts.push(format(this.place(run, step)));
    }
    this.axis = kept;
    return parts.join(" · ");
  },

  visibleMarks() {
    return this.marks.filter(mark => !this.hiddenMarks.has(mark.name) && mark.x !== null);
  },

  showTooltip(event, rows) {
    this.tooltip.replaceChildren(...rows);
    this.tooltip.hidden = false;
    const {width, height} = this.tooltip.getBoundingClientRect();
    const left = event.clientX + 16 + width > window.innerWidth ? event.clientX - width - 16 : event.clientX + 16;
    const top = Math.min(event.clientY + 14, window.innerHeight - height - 6);
    this.tooltip.style.left = Math.max(4, left) + "px";
    this.tooltip.style.top = Math.max(4, top) + "px";
  },

  hideTooltip() {
    this.tooltip.hidden = true;
  },

  // Every x anew, for the chosen axis, and everything drawn.
  redraw() {
    for (const chart of this.charts)
      for (const series of chart.panel.series) series.x = series.step.map(step => this.place(series.run, step));
    for (const mark of this.marks) mark.x = this.place(mark.run, mark.step);
    document.body.dataset.axis = this.axis;
    for (const chart of this.charts) chart.draw();
    this.drawHeatmaps?.();
  },
};

function byId(id) {
  return document.getElementById(id);
}

function table(head, rows) {
  return element("table", {}, element("thead", {}, element("tr", {}, ...head.map(text => element("th", {}, text)))),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map(text => element("td", {}, text))))));
}

function showHead() {
  const {runs} = page.data;
  byId("title").textContent = runs.map(run => run.label).join(" · ");
  byId("path").textContent = runs.filter(run => run.path !== run.label).map(run => run.path).join(", ");
  for (const run of runs)
    for (const warning of run.warnings)
      byId("warnings").append(element("li", {}, runs.length > 1 ? `${run.label}: ${warning}` : warning));
  if (runs.length === 1) {
    const cards = runs[0].headline.filter(([, value]) => value !== "–").map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    byId("headline").append(element("dl", {class: "cards"}, ...cards));
  } else {
    const rows = runs[0].headline.map(([name], i) => [name, ...runs.map(run => run.headline[i][1])])
      .filter(([, ...values]) => values.some(value => value !== "–"));
    byId("headline").append(element("div", {class: "wide"}, table(["", ...runs.map(run => run.label)], rows)));
  }
}

// One run: a colour a metric. Several: a colour a run, the panel's second metric dashed.
function giveInks(panel) {
  const names = [...new Set(panel.series.map(series => series.name))];
  const several = page.data.runs.length > 1;
  panel.series.forEach(series => {
    const index = names.indexOf(series.name);
    series.ink = `var(--c${(several ? series.run : index) % 8})`;
    if (panel.kind === "layers" && names.length > 1)
      series.ink = `hsl(${Math.round(250 - 230 * index / (names.length - 1))} 65% 52%)`;
    if (!several) return;
    series.second = index > 0 && series.style !== "dots";
    series.label = `${page.data.runs[series.run].label}: ${series.label}`;
  });
}

function collectMarks() {
  page.marks = [];
  page.data.runs.forEach((run, index) => {
    for (const kind of run.marks)
      kind.step.forEach((step, i) => page.marks.push({run: index, name: kind.name, step, text: kind.text[i],
        label: (page.data.runs.length > 1 ? run.label + ": " : "") + (eventLabels[kind.name] || kind.name),
        ink: page.data.runs.length > 1 ? `var(--c${index})` : `var(--${eventInks[kind.name] || "other"})`}));
  });
  page.marks.sort((a, b) => eventOrder.indexOf(a.name) - eventOrder.indexOf(b.name));
}

function addControls() {
  byId("axis").append(element("span", {class: "quiet"}, "x axis"));
  const known = Object.keys(axes).filter(name => name === "step" || page.data.runs.every(run => run.axis[name]));
  for (const name of known) {
    const button = element("button", {"data-axis": name, "aria-pressed": String(name === page.axis)}, axes[name]);
    button.addEventListener("click", () => {
      page.axis = name;
      for (const other of byId("axis").querySelectorAll("button"))
        other.setAttribute("aria-pressed", String(other === button));
      page.redraw();
    });
    byId("axis").append(button);
  }
  const totals = new Map();
  for (const run of page.data.runs)
    for (const kind of run.marks) totals.set(kind.name, (totals.get(kind.name) || 0) + kind.total);
  for (const [name, total] of totals) {
    const swatch = element("span", {class: "swatch block"});
    swatch.style.setProperty("--ink", `var(--${eventInks[name] || "other"})`);
    const button = element("button", {class: "toggle", "data-toggle": name, "aria-pressed": "true"},
      ...(page.data.runs.length > 1 ? [] : [swatch]), `${eventLabels[name] || name} (${total})`);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      if (shown) page.hiddenMarks.delete(name); else page.hiddenMarks.add(name);
      page.redraw();
    });
    byId("marks").append(button);
  }
}

function addCharts() {
  for (const panel of page.data.panels) {
    giveInks(panel);
    const chart = new Chart(panel, page);
    page.charts.push(chart);
    byId("charts").append(chart.figure);
  }
  if (!page.charts.length) byId("charts").append(element("p", {}, "The run has no numbers to draw yet."));
  if (!page.data.loads) return;
  byId("loads").hidden = false;
  page.drawHeatmaps = addHeatmaps(page, byId("heatmaps"));
}

function addDifferences() {
  const {differences, runs} = page.data;
  if (!differences) return;
  byId("differences").hidden = false;
  const place = byId("difference-table");
  for (const text of differences.unreadable) place.append(element("p", {class: "quiet"}, text));
  if (differences.rows.length)
    place.append(table(["key", ...runs.map(run => run.label)], differences.rows.map(row => [row.key, ...row.values])));
  else if (!differences.unreadable.length) place.append(element("p", {}, "None."));
}

function addEvents() {
  for (const run of page.data.runs) {
    if (!run.events.length) continue;
    byId("events").hidden = false;
    const count = run.events.length < run.numEvents ? `the newest ${run.events.length} of ${run.numEvents}` : run.numEvents;
    const rows = run.events.map(event => [String(event.step), event.after, eventLabels[event.name] || event.name, event.text]);
    byId("events").append(element("details", {}, element("summary", {}, `Events${page.data.runs.length > 1 ? " of " + run.label : ""} (${count})`),
      element("div", {class: "wide"}, table(["step", "after", "event", "details"], rows))));
  }
}

function addConfigs() {
  for (const run of page.data.runs) {
    const name = page.data.runs.length > 1 ? " of " + run.label : "";
    const parts = [element("summary", {}, `Config${name}, and how to go on`)];
    if (run.resume) parts.push(element("p", {class: "quiet"}, "Go on with the run:"), element("pre", {}, run.resume));
    parts.push(run.config ? element("pre", {class: "config"}, run.config) : element("p", {class: "quiet"}, "The run has no config.yaml."));
    byId("configs").append(element("details", {}, ...parts));
  }
}

showHead();
collectMarks();
addControls();
addCharts();
addDifferences();
addEvents();
addConfigs();
page.redraw();
page.dark.addEventListener("change", () => page.redraw());
let waiting = 0;
window.addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => page.redraw());
});
document.body.dataset.ready = "true";
