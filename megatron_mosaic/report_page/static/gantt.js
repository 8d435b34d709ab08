// Predicted over measured, a band for each group of ranks with the same lanes, a row for each track. Ranks of a group may
// wait at other times: a click opens its classes, and all of their measured ranks. Drawn for the part in view.
const NAMES = 230; // pixels for names
const ROW = 15;
const OPEN_BANDS = 24; // that fit on a screen: so many are all open to begin with
const GANTT_WIDTH = 1260;

function drawGantt(gantt) {
  const view = new GanttView(gantt);
  const tools = make("div", { class: "tools" },
    make("button", { onclick: () => view.zoom(0.5) }, "zoom in"),
    make("button", { onclick: () => view.zoom(2) }, "zoom out"),
    make("button", { onclick: () => view.show(0, view.ticks) }, "whole step"),
    `or drag to move, Ctrl and wheel to zoom${view.opens ? `; click a band to open or close it: ${view.opens}` : ""}`);
  const steps = Object.entries(gantt.steps).map(([name, value]) => `${name} step ${seconds(value)}, bubbles ${(100 * gantt.bubbles[name]).toFixed(0)} %`);
  const shown = gantt.left_out ? ` ${gantt.left_out} more classes of ranks are left out to keep the page small.` : "";
  const measured = gantt.steps.measured ? " Of measured ranks a closed band has the busiest." : "";
  const text = `${steps.join("; ")}. Forwards are dark, backwards lighter; on a red ground nothing runs.${measured}${shown}`;
  const tails = Object.keys(TAIL).filter((lane) => gantt.classes.some((each) => each.predicted.some((row) => row.lane === lane)));
  const entries = [...MODULES.map((m) => [colourOf(m.name), m.name]), ...tails.map((lane) => [TAIL[lane], lane]), ["#f7e4e0", "bubble"]];
  section(gantt.steps.measured ? "Timeline, predicted over measured" : "Timeline, predicted", text, legend(entries), tools, view.axis, make("div", { class: "scroll" }, view.node));
  view.layOut();
}

class GanttView {
  constructor(gantt) {
    this.gantt = gantt;
    this.ticks = Math.round(gantt.end_s / gantt.tick_s);
    const asked = /^#step=([\d.]+)-([\d.]+)$/.exec(window.location.hash); // parts of the step, 0 to 1
    [this.from, this.to] = asked ? [asked[1] * this.ticks, asked[2] * this.ticks] : [0, this.ticks];
    this.members = new Map(); // group -> numbers of its classes
    gantt.classes.forEach((each, number) => this.members.set(each.group, [...(this.members.get(each.group) || []), number]));
    this.opens = this.describeOpening();
    const bands = gantt.classes.reduce((sum, each) => sum + 1 + each.measured.length, 0);
    this.open = new Set(bands <= OPEN_BANDS ? this.members.keys() : []); // numbers of groups
    this.held = null;
    window.addEventListener("mouseup", () => { this.held = null; });
    [this.axis, this.axisContext] = makeCanvas(GANTT_WIDTH, 18, "seconds of the step");
    this.node = make("div", {});
  }

  // What a click shows that is not drawn now; "" where it would show nothing.
  describeOpening() {
    const said = [];
    if ([...this.members.values()].some((numbers) => numbers.length > 1)) said.push("classes that wait at other times");
    if (this.gantt.classes.some((each) => each.measured.length > 1)) said.push("all measured ranks");
    return said.join(" and ");
  }

  // Bands with the rows of what is open, and a canvas of their height.
  layOut() {
    this.rows = [];
    for (const [group, numbers] of [...this.members].sort(([a], [b]) => a - b)) {
      const open = this.open.has(group);
      for (const number of open ? numbers : [this.standsFor(numbers)]) {
        const each = this.gantt.classes[number];
        const title = numbers.length > 1 && !open ? this.nameGroup(group, numbers) : `${each.name}${each.ranks > 1 && !each.name.includes("(") ? ` (${each.ranks})` : ""}`;
        this.addRows(number, title, "predicted", each.predicted);
        const ranks = open ? each.measured : each.measured.slice(0, 1);
        ranks.forEach((one, i) => this.addRows(number, i || !each.predicted.length ? "" : null, `measured, rank ${one.rank}`, one.rows));
        if (this.rows.length) this.rows[this.rows.length - 1].last = true;
      }
    }
    let top = 4;
    for (const row of this.rows) {
      row.top = top;
      top += ROW + (row.last ? 6 : 0);
    }
    const label = `timeline of ${this.gantt.classes.length} classes of ranks in ${this.members.size} groups`;
    const [node, context] = makeCanvas(GANTT_WIDTH, top + 2, label);
    this.context = context;
    this.height = top + 2;
    this.listen(node);
    this.node.replaceChildren(node);
    this.paint();
  }

  // The class of a closed group that is drawn: one with measured ranks, else the first.
  standsFor(numbers) {
    return numbers.find((number) => this.gantt.classes[number].measured.length) ?? numbers[0];
  }

  nameGroup(group, numbers) {
    return `ranks ${shorten(this.gantt.groups[group], 14)}: ${numbers.length} classes`;
  }

  // One row for each track: lanes of one track take turns.
  addRows(number, title, kind, lanes) {
    const tracks = [...new Set(lanes.map((lane) => lane.track))].sort((a, b) => a - b);
    tracks.forEach((track, i) => this.rows.push({
      number, kind, title: i ? "" : title, track: tracks.length > 1 ? track : 0,
      lanes: lanes.filter((lane) => lane.track === track),
    }));
  }

  show(from, to) {
    const length = Math.min(this.ticks, Math.max(20, to - from));
    this.from = Math.min(Math.max(0, from), this.ticks - length);
    this.to = this.from + length;
    this.paint();
  }

  zoom(factor, around = (this.from + this.to) / 2) {
    this.show(around - (around - this.from) * factor, around + (this.to - around) * factor);
  }

  tickAt(x) {
    return this.from + ((x - NAMES) / (GANTT_WIDTH - NAMES - 4)) * (this.to - this.from);
  }

  listen(node) {
    let moved = false;
    node.addEventListener("mousedown", (event) => { this.held = { x: event.clientX, from: this.from, to: this.to }; moved = false; });
    node.addEventListener("mousemove", (event) => {
      const { held } = this;
      if (!held) return;
      const by = ((held.x - event.clientX) / (GANTT_WIDTH - NAMES)) * (held.to - held.from);
      moved = moved || Math.abs(event.clientX - held.x) > 3;
      if (moved) this.show(held.from + by, held.to + by);
    });
    node.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.tickAt(event.clientX - node.getBoundingClientRect().left));
    }, { passive: false });
    node.addEventListener("click", (event) => {
      const row = this.rowAt(event.clientY - node.getBoundingClientRect().top);
      if (moved || !row) return;
      const { group } = this.gantt.classes[row.number];
      if (!this.open.delete(group)) this.open.add(group);
      this.layOut();
    });
    addTip(node, (x, y) => this.describe(x, y));
  }

  rowAt(y) {
    return this.rows.find((row) => y >= row.top && y < row.top + ROW);
  }

  describe(x, y) {
    const row = this.rowAt(y);
    if (!row) return "";
    const at = this.tickAt(x);
    const name = `${this.gantt.classes[row.number].name}, ${row.kind}`;
    if (x < NAMES) return name;
    for (const lane of row.lanes) {
      for (const [start, end, label] of spansOf(lane)) {
        if (at >= start && at <= end) {
          const [from, to] = [start, end].map((tick) => seconds(tick * this.gantt.tick_s, 4));
          return `${lane.lane}${this.gantt.labels[label]}\n${from} to ${to}, ${seconds((end - start) * this.gantt.tick_s)}\n${name}`;
        }
      }
    }
    return "";
  }

  paint() {
    const { context } = this, scale = (GANTT_WIDTH - NAMES - 4) / (this.to - this.from);
    context.clearRect(0, 0, GANTT_WIDTH, this.height);
    let drawn = 0;
    for (const row of this.rows) {
      context.fillStyle = "#f7e4e0";
      const [left, right] = this.endOf(row).map((tick) => Math.min(GANTT_WIDTH - 4, Math.max(NAMES, NAMES + (tick - this.from) * scale)));
      context.fillRect(left, row.top, right - left, ROW - 1);
      for (const lane of row.lanes) drawn += this.paintLane(row, lane, scale);
      this.paintName(row);
    }
    this.paintAxis(scale);
    document.body.dataset.spans = drawn; // in view
    document.body.dataset.bands = new Set(this.rows.map((row) => row.number)).size;
  }

  endOf(row) {
    return [0, this.gantt.steps[row.kind === "predicted" ? "predicted" : "measured"] / this.gantt.tick_s];
  }

  paintLane(row, lane, scale) {
    const { context } = this;
    const module = lane.lane.startsWith("~") ? lane.lane : lane.lane.slice(0, lane.lane.lastIndexOf("."));
    let drawn = 0;
    context.font = "10px system-ui, sans-serif";
    for (const [start, end, number] of spansOf(lane)) {
      if (end < this.from || start > this.to) continue;
      drawn++;
      const label = this.gantt.labels[number], kind = /[FBIW](?=\d+$)/.exec(label);
      const left = Math.max(NAMES, NAMES + (start - this.from) * scale);
      const right = Math.min(GANTT_WIDTH - 4, NAMES + (end - this.from) * scale);
      const lighter = { F: 0, B: 0.42, I: 0.42, W: 0.65 }[kind ? kind[0] : "F"];
      context.fillStyle = mix(colourOf(module), lighter);
      context.fillRect(left, row.top, Math.max(0.6, right - left - (right - left > 3 ? 0.6 : 0)), ROW - 1);
      if (right - left > 7 * label.length && right - left > 18) {
        context.fillStyle = lighter ? "#1d2530" : "#fff";
        context.fillText(label, left + 3, row.top + 11);
      }
    }
    return drawn;
  }

  paintName(row) {
    const { context } = this;
    context.font = row.title ? "600 11px system-ui, sans-serif" : "11px system-ui, sans-serif";
    context.fillStyle = row.title ? "#1d2530" : "#66707c";
    const track = row.track ? `, track ${row.track}` : "";
    context.fillText(shorten(row.title ? `${row.title}${track}` : `${row.kind}${track}`, 36), row.title ? 4 : 14, row.top + 11);
  }

  paintAxis(scale) {
    const context = this.axisContext;
    context.clearRect(0, 0, GANTT_WIDTH, 18);
    context.fillStyle = "#66707c";
    context.font = "11px system-ui, sans-serif";
    const { tick_s } = this.gantt;
    for (const at of ticksOf(this.from * tick_s, this.to * tick_s, 10)) {
      const x = NAMES + (at / tick_s - this.from) * scale;
      context.fillRect(x, 13, 1, 5);
      context.fillText(seconds(at, 5), Math.min(x + 3, GANTT_WIDTH - 46), 11);
    }
  }
}

// [start, end, number of the label] of a row, in ticks.
function* spansOf(lane) {
  let at = 0;
  for (let i = 0; i < lane.spans.length; i += 3) {
    const start = at + lane.spans[i];
    at = start + lane.spans[i + 1];
    yield [start, at, lane.spans[i + 2]];
  }
}
