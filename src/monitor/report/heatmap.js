// The experts' loads: every layer at one step, and one layer over all steps. Draws on canvases and tells in
// canvas[data-cells] how many cells it drew.

// Distance from 1, the even load: blue below, red above, full at 0 and at 3 times the mean.
function loadColour(ratio, dark) {
  const neutral = dark ? [42, 46, 53] : [240, 240, 242];
  const end = ratio < 1 ? (dark ? [78, 160, 255] : [33, 102, 172]) : (dark ? [255, 92, 80] : [178, 24, 43]);
  const t = Math.min(1, ratio < 1 ? 1 - ratio : (ratio - 1) / 2);
  return neutral.map((n, i) => Math.round(n + (end[i] - n) * t));
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), c => c.charCodeAt(0));
}

class Heatmap {
  // value(row, column) is a byte of the loads; rowLabel, columnLabel and describe give texts.
  constructor(page, id, options) {
    Object.assign(this, {page}, options);
    this.canvas = element("canvas", {"data-heatmap": id, role: "img", "aria-label": options.title});
    this.canvas.addEventListener("pointermove", event => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => page.hideTooltip());
  }

  draw() {
    const width = this.canvas.clientWidth || 440;
    const height = Math.min(26 * this.rows, Math.max(300, 1.5 * this.rows));
    const box = {left: 66, top: 4, width: width - 74, height: Math.round(height)};
    const whole = box.top + box.height + 34, density = window.devicePixelRatio || 1;
    this.canvas.width = width * density;
    this.canvas.height = whole * density;
    this.canvas.style.height = whole + "px";
    this.box = box;
    const context = this.canvas.getContext("2d");
    context.scale(density, density);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.picture(), box.left, box.top, box.width, box.height);
    this.drawLabels(context, width);
  }

  // One pixel a cell.
  picture() {
    const small = element("canvas");
    small.width = this.columns;
    small.height = this.rows;
    const context = small.getContext("2d"), image = context.createImageData(this.columns, this.rows);
    let cells = 0;
    for (let row = 0; row < this.rows; ++row)
      for (let column = 0; column < this.columns; ++column, ++cells)
        image.data.set([...loadColour(this.value(row, column) / this.page.data.loads.scale, this.page.dark.matches), 255], cells * 4);
    context.putImageData(image, 0, 0);
    this.canvas.dataset.cells = cells;
    return small;
  }

  drawLabels(context, width) {
    const {box} = this;
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--quiet");
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(14 / (box.height / this.rows));
    for (let row = 0; row < this.rows; row += every)
      context.fillText(this.rowLabel(row), box.left - 6, box.top + (row + 0.5) * box.height / this.rows);
    context.textAlign = "center";
    const apart = Math.ceil(this.columns / Math.max(1, Math.floor(box.width / 48)));
    for (let column = 0; column < this.columns; column += apart)
      context.fillText(this.columnLabel(column), box.left + (column + 0.5) * box.width / this.columns, box.top + box.height + 10);
    context.fillText(this.columnTitle, box.left + box.width / 2, box.top + box.height + 26, width);
  }

  hover(event) {
    const bounds = this.canvas.getBoundingClientRect(), {box} = this;
    const column = Math.floor((event.clientX - bounds.left - box.left) / box.width * this.columns);
    const row = Math.floor((event.clientY - bounds.top - box.top) / box.height * this.rows);
    if (row < 0 || row >= this.rows || column < 0 || column >= this.columns) return this.page.hideTooltip();
    const value = this.value(row, column);
    const ratio = (value === 255 ? "at least " : "") + (value / this.page.data.loads.scale).toFixed(2);
    this.page.showTooltip(event, [element("b", {}, this.describe(row, column)), element("div", {}, `${ratio} × the mean load`)]);
  }
}

// Both heat maps with their controls, into `place`. Returns what redraws them.
function addHeatmaps(page, place) {
  const {layers, experts, frames, total} = page.data.loads;
  const cells = frames.map(frame => bytesOf(frame.cells));
  let time = frames.length - 1, layer = 0;
  const note = total > frames.length ? `, ${frames.length} of ${total} logged steps` : "";

  const title = element("h3"), slider = element("input", {type: "range", min: 0, max: frames.length - 1, value: time, "aria-label": "Step"});
  const all = new Heatmap(page, "layers", {
    title: "Load by layer and expert", rows: layers.length, columns: experts,
    value: (row, column) => cells[time][row * experts + column],
    rowLabel: row => `layer ${layers[row]}`, columnLabel: column => String(column), columnTitle: "expert",
    describe: (row, column) => `layer ${layers[row]}, expert ${column}, step ${frames[time].step}`});
  const showTime = () => { title.textContent = `All layers at step ${frames[time].step}`; all.draw(); };
  slider.addEventListener("input", () => { time = Number(slider.value); showTime(); });

  const choice = element("select", {"aria-label": "Layer"}, ...layers.map((id, row) => element("option", {value: row}, `layer ${id}`)));
  const one = new Heatmap(page, "time", {
    title: "Load of one layer over time", rows: experts, columns: frames.length,
    value: (row, column) => cells[column][layer * experts + row],
    rowLabel: row => `expert ${row}`, columnLabel: column => shortNumber(frames[column].step), columnTitle: "step",
    describe: (row, column) => `layer ${layers[layer]}, expert ${row}, step ${frames[column].step}`});
  choice.addEventListener("change", () => { layer = Number(choice.value); one.draw(); });

  const bar = element("i"), scale = element("div", {class: "scale"}, "0", bar, "3 × the mean and more");
  const paint = () => {
    const stops = [0, 0.5, 1, 2, 3].map(r => `rgb(${loadColour(r, page.dark.matches)}) ${r / 3 * 100}%`);
    bar.style.background = `linear-gradient(90deg, ${stops})`;
  };
  place.append(
    element("figure", {"data-frames": frames.length}, element("header", {}, title), slider, all.canvas, scale),
    element("figure", {}, element("header", {}, element("h3", {}, "One layer over time"), choice, element("span", {class: "quiet"}, note.slice(2))), one.canvas));
  return () => { paint(); showTime(); one.draw(); };
}
