// What all sections draw with: colours, elements, scales, the tooltip.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MODULES = DATA.rank_map.modules;
const PALETTE = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#55606c"]; // Tol's bright
const TAIL = { "~data": "#b8c4cf", "~grads": "#8794a1", "~optimizer": "#5d6975" };

// A colour and white: 0 leaves it, 1 is white.
function mix(hex, white) {
  const part = (at) => Math.round(parseInt(hex.slice(at, at + 2), 16) * (1 - white) + 255 * white);
  return `rgb(${part(1)},${part(3)},${part(5)})`;
}

function colourOf(module) {
  const found = MODULES.findIndex((each) => each.name === module);
  return found < 0 ? TAIL[module] || "#9aa5b1" : PALETTE[found % PALETTE.length];
}

// Later pipeline stages are lighter.
function shadeOf(module, stage) {
  const found = MODULES.find((each) => each.name === module);
  return mix(colourOf(module), found && found.stages > 1 ? (0.5 * stage) / (found.stages - 1) : 0);
}

function make(tag, values = {}, ...children) {
  const node = document.createElement(tag);
  return fill(node, values, children);
}

function draw(tag, values = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(node, values, children);
}

function fill(node, values, children) {
  for (const [key, value] of Object.entries(values)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function section(title, text, ...children) {
  const node = make("section", {}, make("h2", {}, title), make("p", {}, text), ...children);
  document.getElementById("main").append(node);
  return node;
}

// A canvas in CSS pixels, sharp on any screen.
function makeCanvas(width, height, label) {
  const ratio = window.devicePixelRatio || 1;
  const node = make("canvas", { width: width * ratio, height: height * ratio, role: "img", "aria-label": label });
  node.style.width = `${width}px`;
  node.style.height = `${height}px`;
  const context = node.getContext("2d");
  context.scale(ratio, ratio);
  return [node, context];
}

// Shows what `find` says of a place on the node (CSS pixels from its corner); nothing where it says nothing.
function addTip(node, find) {
  const tip = document.getElementById("tip");
  node.addEventListener("mousemove", (event) => {
    const box = node.getBoundingClientRect();
    const text = find(event.clientX - box.left, event.clientY - box.top);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
  });
  node.addEventListener("mouseleave", () => (tip.hidden = true));
}

function inUnits(value, steps, digits) {
  if (value === 0) return "0";
  for (const [size, name] of steps) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(digits))} ${name}`;
  }
  return `0 ${steps[steps.length - 1][1]}`;
}
const seconds = (value, digits = 3) => inUnits(value, [[60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "us"]], digits);
const bytes = (value, digits = 3) => inUnits(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]], digits);
const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
const percent = (value) => `${value >= 0 ? "+" : "−"}${Math.abs(100 * value).toFixed(0)} %`;

// Round values from low to high, about `count` of them.
function ticksOf(low, high, count) {
  const raw = (high - low) / count;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= raw);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high * (1 + 1e-9); at++) found.push(at * step);
  return found;
}

// Ink that can be read on a colour: "#rrggbb", or the "rgb(r,g,b)" that `mix` makes.
function inkOn(colour) {
  const [r, g, b] = colour.startsWith("#") ? [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)) : colour.match(/\d+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 150 ? "#1d2530" : "#fff";
}

function legend(entries) {
  return make("div", { class: "legend" }, ...entries.map(([colour, name]) => make("span", {}, make("i", { style: `background:${colour}` }), name)));
}

function table(head, rows, textColumns = [0]) {
  const cell = (tag, text, column) => make(tag, textColumns.includes(column) ? { class: "text" } : {}, text);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text, i) => cell("th", text, i)))),
    make("tbody", {}, ...rows.map((row) => make("tr", row.own ? { class: "own" } : {}, ...row.cells.map((text, i) => cell("td", text, i))))));
}
