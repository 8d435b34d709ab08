// What a rank holds over the step, stacked by holder, under the line of what it may fill: a picture for each class.
function drawMemory(memory) {
  const top = Math.max(...memory.curves.map((curve) => curve.peak));
  const far = memory.limit > 4 * top; // the line would press the curves flat
  const high = far ? 1.1 * top : 1.08 * Math.max(top, memory.limit);
  const others = memory.others ? ` ${memory.others} more classes hold no more than the last one here.` : "";
  const line = far ? `A rank may fill ${bytes(memory.limit)}, far above these pictures.` : `Red: what a rank may fill, ${bytes(memory.limit)} of ${bytes(memory.device)}.`;
  const names = [...new Set(memory.curves.flatMap((curve) => curve.holders))];
  const modules = MODULES.map((m) => m.name).filter((name) => names.some((holder) => holder.startsWith(`${name}.`)));
  const entries = [[holderColour("static"), "parameters and their states"], [holderColour("workspace"), "workspace"], ...modules.map((name) => [colourOf(name), `activations of ${name}`])];
  section("Memory of a rank, predicted", `${line} One picture for each class of alike ranks, the fullest first.${others}`, legend(entries),
    make("div", { class: "curves" }, ...memory.curves.map((curve) => drawCurve(memory, curve, high, far))));
}

function holderColour(holder) {
  if (holder === "static") return "#7d8895";
  if (holder === "workspace") return "#b9c2cb";
  return shadeOf(holder.slice(0, holder.lastIndexOf(".")), Number(holder.slice(holder.lastIndexOf(".") + 1)));
}

function drawCurve(memory, curve, high, far) {
  const [width, height, left, bottom] = [400, 140, 52, 18];
  const x = (at) => left + (at / memory.step_s) * (width - left - 4);
  const y = (value) => 4 + (1 - value / high) * (height - bottom - 4);
  const picture = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `memory of ranks ${curve.ranks}` });
  let below = curve.at.map(() => 0);
  curve.holders.forEach((holder, i) => {
    const above = below.map((value, at) => value + curve.bytes[i][at]);
    const shape = draw("path", { d: stepPath(curve.at, above, memory.step_s, x, y) + stepPath(curve.at, below, memory.step_s, x, y, true) + "Z", fill: holderColour(holder) });
    shape.append(draw("title", {}, `${holder}: up to ${bytes(Math.max(...curve.bytes[i]))}`));
    picture.append(shape);
    below = above;
  });
  for (const tick of ticksOf(0, high, 4)) picture.append(draw("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, bytes(tick)));
  for (const tick of ticksOf(0, memory.step_s, 4)) picture.append(draw("text", { x: Math.min(x(tick), width - 42), y: height - 4 }, seconds(tick)));
  if (!far) picture.append(draw("line", { x1: left, x2: width, y1: y(memory.limit), y2: y(memory.limit), stroke: "#c0392b", "stroke-dasharray": "5 3" }));
  const over = curve.peak > memory.limit ? ", does not fit" : "";
  const title = `ranks ${curve.ranks}: ${bytes(curve.peak, 4)}${over}`;
  return make("div", {}, make("h3", { title }, `ranks ${shorten(curve.ranks, 30)}: ${bytes(curve.peak, 4)}${over}`), picture);
}

// A line that keeps its height until the next sample; backwards, so that it closes an area.
function stepPath(at, values, end, x, y, back = false) {
  const points = at.flatMap((time, i) => [[time, values[i]], [i + 1 < at.length ? at[i + 1] : end, values[i]]]);
  if (back) points.reverse();
  return points.map(([time, value], i) => `${i || back ? "L" : "M"}${x(time).toFixed(1)},${y(value).toFixed(1)}`).join("");
}
