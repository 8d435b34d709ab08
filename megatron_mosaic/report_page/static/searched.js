// Plans as seconds over bytes: all that were simulated, the front, the search's way, the best plan of each baseline.
const PLOT = { width: 700, height: 430, left: 64, bottom: 34, top: 10, right: 14 };

function drawSearch(search) {
  if (search.none) {
    section("Searched plans", `The search found no plan that fits: ${search.none}.`);
    return;
  }
  const [own, points] = [search.points[search.plan], search.points];
  const scales = scalesOf(search);
  const picture = draw("svg", { width: PLOT.width, height: PLOT.height, role: "img", "aria-label": `${points.length} plans, seconds over bytes` });
  drawAxes(picture, scales);
  const dot = (number, shape, values, said) => picture.append(placeMark(points[number], scales, shape, values, said));
  points.forEach((_, number) => dot(number, "circle", { r: 2.6, fill: "#8794a1", "fill-opacity": 0.55 }, ""));
  const line = (numbers, values) => picture.append(draw("polyline", { fill: "none", points: numbers.map((n) => `${scales.x(points[n][0])},${scales.y(points[n][1])}`).join(" "), ...values }));
  line(search.front, { stroke: "#228833", "stroke-width": 1.6 });
  search.front.forEach((number) => dot(number, "circle", { r: 3.4, fill: "#228833" }, "on the Pareto front"));
  line(search.path.map((step) => step.point), { stroke: "#4477aa", "stroke-dasharray": "4 3" });
  search.path.forEach((step, i) => {
    dot(step.point, "circle", { r: 7, fill: "#fff", stroke: "#4477aa", "stroke-width": 1.5 }, `step ${i + 1} of the search: ${step.reason}`);
    const [x, y] = [scales.x(points[step.point][0]), scales.y(points[step.point][1])];
    picture.append(draw("text", { x, y: y + 3.5, "text-anchor": "middle", "pointer-events": "none" }, i + 1));
  });
  const found = Object.entries(search.baselines).filter(([, number]) => number !== null);
  const letter = Object.fromEntries(Object.keys(search.baselines).map((name, i) => [name, String.fromCharCode(65 + i)]));
  for (const [name, number] of found) {
    dot(number, "diamond", { fill: "#ee6677" }, `${name}: ${search.sources[name]}`);
  }
  for (const { x, y, letters } of labelsOf(found.map(([name, number]) => [scales.x(points[number][0]), scales.y(points[number][1]), letter[name]]))) {
    picture.append(draw("text", { x: x + 9, y: y + 4 }, letters));
  }
  dot(search.plan, "star", { fill: "#aa3377" }, "the plan of this page");
  const rows = Object.entries(search.baselines).map(([name, number]) => ({ cells: [`${letter[name]}  ${name}`, ...(number === null ? ["no plan fits", "", ""] : [seconds(points[number][1]), bytes(points[number][0]), `${(points[number][1] / own[1]).toFixed(2)}×`])] }));
  rows.unshift({ own: true, cells: ["★  this plan", seconds(own[1]), bytes(own[0]), "1.00×"] });
  const counts = Object.entries(search.counts).map(([verdict, count]) => `${count} ${verdict}`).join("; ");
  const text = `${points.length + search.left_out} plans laid out to the end, predicted seconds of a step over the fullest rank's bytes. Lower left is better. Of all plans met: ${counts}.`;
  section("Searched plans", text,
    legend([["#8794a1", "simulated"], ["#228833", "Pareto front of those that fit"], ["#4477aa", "the search's way"], ["#ee6677", "baselines"], ["#aa3377", "this plan"]]),
    make("div", { class: "sides" }, picture, make("div", {},
      table(["plan", "step", "peak of a rank", "time against this plan"], rows),
      make("ol", {}, ...search.path.map((step) => make("li", {}, `${seconds(points[step.point][1])}: ${step.reason}`))))));
}

// Letters of marks that lie on or beside each other stand in one label, for they would be printed over each other.
function labelsOf(marks) {
  const labels = [];
  for (const [x, y, letter] of marks) {
    const near = labels.find((label) => Math.abs(label.y - y) < 11 && Math.abs(label.x - x) < 16);
    if (near) near.letters += ` ${letter}`;
    else labels.push({ x, y, letters: letter });
  }
  return labels;
}

function scalesOf(search) {
  const bytesOf = [...search.points.map((point) => point[0])], times = search.points.map((point) => point[1]);
  if (search.limit < 2 * Math.max(...bytesOf)) bytesOf.push(search.limit);
  const widen = (values, by) => [Math.min(...values) * (1 - by), Math.max(...values) * (1 + by)];
  const [x0, x1] = widen(bytesOf, 0.04), [y0, y1] = widen(times, 0.04);
  const log = y1 / y0 > 6, to = log ? Math.log : (value) => value;
  return {
    log, range: [x0, x1, y0, y1], limit: search.limit,
    x: (value) => PLOT.left + ((value - x0) / (x1 - x0)) * (PLOT.width - PLOT.left - PLOT.right),
    y: (value) => PLOT.top + ((to(y1) - to(value)) / (to(y1) - to(y0))) * (PLOT.height - PLOT.top - PLOT.bottom),
  };
}

function drawAxes(picture, { log, range: [x0, x1, y0, y1], limit, x, y }) {
  const low = PLOT.height - PLOT.bottom;
  const upright = log ? [1, 2, 5].flatMap((n) => [-6, -5, -4, -3, -2, -1, 0, 1, 2, 3].map((e) => n * 10 ** e)).filter((at) => at >= y0 && at <= y1) : ticksOf(y0, y1, 6);
  for (const at of ticksOf(x0, x1, 7)) {
    picture.append(draw("line", { x1: x(at), x2: x(at), y1: PLOT.top, y2: low, stroke: "#eceff2" }));
    picture.append(draw("text", { x: x(at), y: low + 15, "text-anchor": "middle" }, bytes(at, 4)));
  }
  for (const at of upright) {
    picture.append(draw("line", { x1: PLOT.left, x2: PLOT.width - PLOT.right, y1: y(at), y2: y(at), stroke: "#eceff2" }));
    picture.append(draw("text", { x: PLOT.left - 6, y: y(at) + 4, "text-anchor": "end" }, seconds(at, 4)));
  }
  picture.append(draw("text", { x: PLOT.width - PLOT.right, y: PLOT.height - 4, "text-anchor": "end" }, "peak of the fullest rank"));
  if (limit < x1) {
    picture.append(draw("line", { x1: x(limit), x2: x(limit), y1: PLOT.top, y2: low, stroke: "#c0392b", "stroke-dasharray": "5 3" }));
    picture.append(draw("text", { x: x(limit) - 4, y: PLOT.top + 10, "text-anchor": "end" }, "may be filled"));
  }
}

function placeMark([held, time, plan], scales, shape, values, said) {
  const [x, y] = [scales.x(held), scales.y(time)];
  const corners = { diamond: [[0, -6], [6, 0], [0, 6], [-6, 0]], star: [[0, -9], [2.5, -3], [9, -3], [4, 1.5], [6, 8], [0, 4], [-6, 8], [-4, 1.5], [-9, -3], [-2.5, -3]] }[shape];
  const mark = corners
    ? draw("polygon", { points: corners.map(([dx, dy]) => `${x + dx},${y + dy}`).join(" "), stroke: "#fff", ...values })
    : draw("circle", { cx: x, cy: y, ...values });
  const lines = [said, `${seconds(time)}, ${bytes(held)}`, plan].filter(Boolean).join("\n");
  addTip(mark, () => lines);
  return mark;
}
