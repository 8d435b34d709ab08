// A run beside its prediction: lanes by how far they are apart, and the losses.
function drawRun(run) {
  const widest = Math.max(...run.lanes.map(([, predicted, measured]) => Math.max(predicted, measured)));
  const bar = (predicted, measured) => {
    const picture = draw("svg", { width: 200, height: 14 });
    const part = (value) => (200 * value) / widest;
    picture.append(draw("rect", { x: 0, y: 1, width: part(predicted), height: 5, fill: "#4477aa" }));
    picture.append(draw("rect", { x: 0, y: 7, width: part(measured), height: 5, fill: "#ee6677" }));
    return picture;
  };
  const rows = run.lanes.map(([lane, predicted, measured]) => ({
    cells: [lane, seconds(predicted), seconds(measured), `${measured >= predicted ? "+" : "−"}${seconds(Math.abs(measured - predicted))}`,
      predicted ? percent(measured / predicted - 1) : "", bar(predicted, measured)],
  }));
  const sorted = [...run.steps_s].sort((a, b) => a - b);
  const spread = `Steps took ${seconds(sorted[0])} to ${seconds(sorted[sorted.length - 1])}, median ${seconds(sorted[Math.floor(sorted.length / 2)])} (${sorted.length} steps).`;
  section("Lanes, the worst prediction first", `Seconds of a lane in a step, mean over its ranks. ${spread}`,
    legend([["#4477aa", "predicted"], ["#ee6677", "measured"]]),
    table(["lane", "predicted", "measured", "difference", "", ""], rows, [0, 5]));
  drawLosses(run);
}

function drawLosses(run) {
  const names = Object.keys(run.losses);
  if (!names.length) return;
  const values = names.flatMap((name) => run.losses[name]).filter((value) => value !== null);
  const steps = run.losses[names[0]].length, high = Math.max(...values) * 1.05, low = Math.min(0, ...values);
  const [width, height, left, bottom] = [700, 220, 46, 22];
  const x = (step) => left + (steps > 1 ? step / (steps - 1) : 0) * (width - left - 8);
  const y = (value) => 6 + ((high - value) / (high - low)) * (height - bottom - 6);
  const picture = draw("svg", { width, height, role: "img", "aria-label": `losses of ${steps * run.stride} steps` });
  for (const tick of ticksOf(low, high, 5)) {
    picture.append(draw("line", { x1: left, x2: width, y1: y(tick), y2: y(tick), stroke: "#eceff2" }));
    picture.append(draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, Number(tick.toPrecision(3))));
  }
  for (const tick of ticksOf(1, steps, 8)) {
    if (Number.isInteger(tick)) picture.append(draw("text", { x: x(tick - 1), y: height - 6, "text-anchor": "middle" }, (tick - 1) * run.stride + 1));
  }
  names.forEach((name, i) => {
    const points = run.losses[name].flatMap((value, step) => (value === null ? [] : [`${x(step).toFixed(1)},${y(value).toFixed(1)}`]));
    picture.append(draw("polyline", { points: points.join(" "), fill: "none", stroke: PALETTE[i % PALETTE.length], "stroke-width": name === "loss" ? 2.2 : 1.3 }));
  });
  section("Losses", `${steps * run.stride} steps.`, legend(names.map((name, i) => [PALETTE[i % PALETTE.length], name])), picture);
}
