// Nodes and their GPUs; a stripe for each module of a GPU, filled as far as its share of the SMs. Where stripes would be
// too thin to see, one colour for each combination of modules.
const CELLS = [64, 48, 36, 28, 22, 18, 14, 11, 9, 7, 6, 5, 4];
const STRIPES = 11; // pixels of a cell, at least, for stripes
const NUMBERED = 36; // and for its rank's number
const MAP_WIDTH = 1240;
const MAP_HEIGHT = 620;

function drawRankMap(map) {
  const owner = new Int32Array(map.num_ranks).fill(-1);
  map.classes.forEach((each, number) => each.ranks.forEach(([first, stop]) => owner.fill(number, first, stop)));
  const place = chooseGrid(map);
  const [node, context] = makeCanvas(MAP_WIDTH, place.height, `map of ${map.num_ranks} ranks`);
  for (let rank = 0; rank < map.num_ranks; rank++) drawRank(context, place, map, rank, owner[rank]);
  if (place.named) {
    context.fillStyle = "#66707c";
    context.font = "11px system-ui, sans-serif";
    for (let at = 0; at * map.per_node < map.num_ranks; at++) context.fillText(nameNode(map, place, at), ...corner(place, at, 0, -4));
  }
  addTip(node, (x, y) => describeRank(map, rankAt(place, map, x, y), owner));
  const striped = place.cell >= STRIPES;
  const colours = striped ? map.modules.map((module) => [colourOf(module.name), module.name]) : combinationsOf(map).map((names, i) => [combinationColour(map, names, i), names.join(" + ")]);
  const idle = owner.includes(-1) ? [["#e9ecef", "runs nothing"]] : [];
  const cells = striped ? "A stripe for each module, filled as far as the module's share of the SMs" : "A colour for each combination of modules";
  const text = `${map.num_ranks} ranks, ${map.per_node} a node. ${cells}; later pipeline stages are lighter${place.cell >= NUMBERED ? " (numbers: rank above, stage below)" : ""}. Point at a rank for its lanes.`;
  section("Rank map", text, legend([...colours, ...idle]), node, table(
    ["module", "ranks", "layout", "share", "unit", "track", "recompute"],
    map.modules.map((m) => ({ cells: [m.name, shorten(m.ranks, 40), m.layout, String(m.share), String(m.unit), String(m.track), m.recompute] })),
    [0, 1, 2]));
}

// The largest cells with which all nodes fit.
function chooseGrid(map) {
  const nodes = Math.ceil(map.num_ranks / map.per_node);
  for (const cell of CELLS) {
    const named = cell >= 18, top = named ? 18 : 0, gap = named ? 12 : 3;
    const wide = Math.min(map.per_node, Math.max(1, Math.floor(MAP_WIDTH / cell)));
    const deep = Math.ceil(map.per_node / wide);
    const columns = Math.max(1, Math.floor((MAP_WIDTH + gap) / (wide * cell + gap)));
    const height = Math.ceil(nodes / columns) * (deep * cell + top + gap);
    if (height <= MAP_HEIGHT || cell === CELLS[CELLS.length - 1]) return { cell, named, top, gap, wide, deep, columns, height };
  }
}

function corner(place, node, within, up = 0) {
  const left = (node % place.columns) * (place.wide * place.cell + place.gap);
  const above = Math.floor(node / place.columns) * (place.deep * place.cell + place.top + place.gap) + place.top;
  return [left + (within % place.wide) * place.cell, above + Math.floor(within / place.wide) * place.cell + up];
}

function nameNode(map, place, at) {
  const first = at * map.per_node, last = Math.min(map.num_ranks, first + map.per_node) - 1;
  return place.cell >= NUMBERED || last === first ? `node ${at}` : `node ${at}: ${first}-${last}`;
}

function namesOf(map, lanes) {
  return [...new Set(lanes.map(([module]) => map.modules[module].name))];
}

// Which modules share a GPU somewhere, each set once.
function combinationsOf(map) {
  const found = new Map(map.classes.map(({ lanes }) => namesOf(map, lanes)).map((names) => [names.join(), names]));
  return [...found.values()];
}

// That of the module where it is alone; where several are, one of the palette that no module has.
function combinationColour(map, names, number) {
  return names.length === 1 ? colourOf(names[0]) : PALETTE[(map.modules.length + number) % PALETTE.length];
}

// Lighter for later stages of the module with the most of them.
function solidOf(map, lanes) {
  const names = namesOf(map, lanes), number = combinationsOf(map).findIndex((each) => each.join() === names.join());
  const [module, stage] = lanes.reduce((most, lane) => (map.modules[lane[0]].stages > map.modules[most[0]].stages ? lane : most));
  const { stages } = map.modules[module];
  return mix(combinationColour(map, names, number), stages > 1 ? (0.6 * stage) / (stages - 1) : 0);
}

function drawRank(context, place, map, rank, number) {
  const [x, y] = corner(place, Math.floor(rank / map.per_node), rank % map.per_node);
  const size = place.cell - (place.cell > 6 ? 1 : 0.5);
  const lanes = number < 0 ? [] : map.classes[number].lanes;
  context.fillStyle = "#e9ecef";
  context.fillRect(x, y, size, size);
  if (place.cell < STRIPES) {
    if (lanes.length) context.fillStyle = map.classes[number].solid ??= solidOf(map, lanes);
    context.fillRect(x, y, size, size);
    return;
  }
  drawStripes(context, map, lanes, [x, y, size]);
  if (place.cell >= NUMBERED) {
    const top = lanes.length ? map.modules[lanes[0][0]] : null;
    context.fillStyle = top && top.share > 0.7 ? inkOn(shadeOf(top.name, lanes[0][1])) : "#1d2530";
    context.font = "11px system-ui, sans-serif";
    context.fillText(String(rank), x + 3, y + 11);
  }
}

function drawStripes(context, map, lanes, [x, y, size]) {
  lanes.forEach(([module, stage], i) => {
    const { name, share } = map.modules[module], width = size / lanes.length;
    context.fillStyle = mix(colourOf(name), 0.82);
    context.fillRect(x + i * width, y, width, size);
    context.fillStyle = shadeOf(name, stage);
    context.fillRect(x + i * width, y + size * (1 - share), width, size * share);
    if (width >= 14 && size >= 34 && map.modules[module].stages > 1) {
      context.fillStyle = inkOn(shadeOf(name, stage));
      context.font = "10px system-ui, sans-serif";
      context.fillText(String(stage), x + i * width + width / 2 - 3, y + size - 4);
    }
  });
}

function rankAt(place, map, x, y) {
  const width = place.wide * place.cell + place.gap, height = place.deep * place.cell + place.top + place.gap;
  const node = Math.floor(y / height) * place.columns + Math.floor(x / width);
  const inX = Math.floor((x % width) / place.cell), inY = Math.floor(((y % height) - place.top) / place.cell);
  if (inX >= place.wide || inY < 0 || inY >= place.deep || Math.floor(x / width) >= place.columns) return -1;
  const within = inY * place.wide + inX;
  return within < map.per_node ? node * map.per_node + within : -1;
}

function describeRank(map, rank, owner) {
  if (rank < 0 || rank >= map.num_ranks) return "";
  const name = `rank ${rank}, node ${Math.floor(rank / map.per_node)}`;
  if (owner[rank] < 0) return `${name}: runs nothing`;
  const { lanes, peak, ranks } = map.classes[owner[rank]];
  const said = lanes.map(([module, stage]) => {
    const { name: of, stages, layout, share } = map.modules[module];
    return `${of}${stages > 1 ? ` stage ${stage} of ${stages}` : ""} (${layout}${share < 1 ? `, share ${share}` : ""})`;
  });
  const alike = ranks.reduce((sum, [first, stop]) => sum + stop - first, 0);
  return `${name}, one of ${alike} alike\n${said.join("\n")}\npeak ${peak}`;
}
