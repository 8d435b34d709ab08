// Draws the sections that there is data for; an error is shown, for a page that lacks a section must not look whole.
function start() {
  const facts = Object.entries(DATA.facts).map(([name, value]) => make("div", {}, make("span", {}, name), make("b", {}, value)));
  document.getElementById("header").append(make("h1", {}, DATA.title), make("div", { class: "facts" }, ...facts));
  const sections = { rank_map: drawRankMap, gantt: drawGantt, run: drawRun, memory: drawMemory, search: drawSearch };
  const drawn = [];
  for (const [name, drawSection] of Object.entries(sections)) {
    if (!(name in DATA)) continue;
    drawSection(DATA[name]);
    drawn.push(name);
  }
  document.body.dataset.drawn = drawn.join(" ");
}

window.addEventListener("error", (event) => {
  document.body.prepend(make("div", { class: "error" }, `this page could not be drawn: ${event.message}`));
});
start();
