// The state of the page, and the events that change it: clicks, keys, and the address.

const VIEWS = ["graph", "decisions", "errors", "memory", "kernels"];
const SIDES = [["before", "Before"], ["both", "Both"], ["after", "After"]];
const MOST_AT_FIRST = 110;
const MOST_OPEN = 500;

const state = { view: "graph", stage: stages.at(-1), side: "both", op: null, open: new Set(), weights: false, sizes: false, query: "" };
const canvas = new Canvas(byId("canvas"));
const search = new Search((query) => { state.query = query; searched(); drawing(); remember(); }, (op) => select(op));
let drawn = null;

const actions = { select, close: () => select(null) };

// Drawing

function drawAll() {
  drawStrip(byId("strip"), state.stage, go);
  showInStrip(byId("strip"));
  drawTabs();
  drawView();
}

function drawTabs() {
  show(byId("tabs"), VIEWS.map((name) => el("button", {
    role: "tab", id: `tab-${name}`, "aria-controls": name, "aria-selected": String(name === state.view), onclick: () => look(name),
  }, name[0].toUpperCase() + name.slice(1))));
  for (const name of VIEWS) byId(name).hidden = name !== state.view;
  byId("strip").hidden = !["graph", "memory"].includes(state.view);
}

function drawView() {
  if (state.view === "graph") {
    drawToolbar();
    layOut();
    if (!state.op) overview();
    panel();
  } else if (state.view === "decisions") drawDecisions(byId("decisions"), find);
  else if (state.view === "errors") drawErrors(byId("errors"), find);
  else if (state.view === "memory") drawMemory(byId("memory"), state.stage, find);
  else drawKernels(byId("kernels"), find);
}

function drawToolbar() {
  const toggle = (key, label) => el("label", { class: "toggle" },
    el("input", { type: "checkbox", checked: state[key], onchange: (event) => { state[key] = event.target.checked; layOut(); } }), ` ${label}`);
  const button = (label, text, act) => el("button", { "aria-label": label, title: label, onclick: act }, text);
  show(byId("toolbar"),
    el("div", { class: "segments", role: "group", "aria-label": "Which graph" }, SIDES.map(([side, label]) => el("button", {
      "data-side": side, "aria-pressed": String(side === state.side), disabled: !state.stage.index, onclick: () => turn(side) }, label))),
    search.element,
    toggle("weights", "weights"), toggle("sizes", "sizes"),
    el("div", { class: "buttons" },
      button("Open all modules", "Expand", () => openAll()), button("Close all modules", "Collapse", () => closeAll()),
      button("Zoom out", "−", () => canvas.zoomBy(1 / 1.25)), button("Zoom in", "+", () => canvas.zoomBy(1.25)), button("Show the whole graph", "Fit", () => canvas.fit())));
  search.input.value = state.query;
  searched();
}

/** Shows the whole graph, or the part around its first change. */
function overview() {
  const changed = drawn.nodes.find((node) => (node.op ? node.fate !== "same" : marksOf(node.counts).length));
  canvas.show(changed ?? drawn.nodes[0] ?? { x: 0, y: 0, width: 0 });
}

/** Lays out and draws the open part of the graph again; `hold` is a module whose corner must not move. */
function layOut(hold) {
  const corner = hold && cornerOf(hold);
  drawn = openPart(state.stage, state, state.open);
  canvas.extent = place(drawn);
  drawing();
  const after = hold && cornerOf(hold);
  if (corner && after) canvas.hold(corner, after);
  legend();
}

function cornerOf(path) {
  return [...(drawn?.boxes ?? []), ...(drawn?.nodes ?? [])].find((part) => part.module?.path === path);
}

function drawing() {
  if (!drawn) return;
  const words = state.query.trim();
  const selected = state.op && drawn.holder.get(state.op);
  const near = new Set(drawn.edges.filter((edge) => selected && (edge.v === selected.id || edge.w === selected.id)));
  const marks = { selected: state.op, near, found: words ? new Set(found(state.stage, words)) : null };
  canvas.svg.classList.toggle("searching", Boolean(words));
  draw(canvas.scene, drawn, marks, touched);
}

function legend() {
  const counts = state.stage.differences.counts;
  const keys = state.stage.index ? ["added", "removed", "changed"].filter((fate) => counts[fate]) : [];
  show(byId("legend"), keys.map((fate) => el("div", {}, el("dt", {}, el("i", { class: `key fate-${fate}` })), el("dd", {}, `${counts[fate]} ${FATES[fate]}`))));
  const nothing = state.stage.index && !keys.length ? `${state.stage.name} changed nothing.` : drawn.nodes.length ? "" : "There is nothing to draw.";
  byId("notice").textContent = nothing;
}

function panel() {
  const element = byId("panel");
  element.hidden = !state.op;
  if (state.op) drawPanel(element, state.stage, state.op, actions);
}

function searched() {
  search.show(found(state.stage, state.query), state.stage.differences.fates);
}

// Changing

function touched(part) {
  if (canvas.moving) return;
  if (part.op) return select(part.op, false);
  const { path } = part.module;
  if (state.open.has(path)) {
    for (const each of [...state.open]) if (each === path || each.startsWith(`${path}.`)) state.open.delete(each);
  } else {
    for (let module = part.module; module; module = module.only) state.open.add(module.path);
  }
  layOut(path);
  byId("canvas").querySelector(`[data-module="${CSS.escape(path)}"]`)?.focus({ preventScroll: true });
}

function go(stage) {
  state.stage = stage;
  if (state.op) state.op = stage.ops.find((op) => op.id === state.op.id) ?? null;
  drawAll();
  remember();
}

function step(by) {
  const next = stages[state.stage.index + by];
  if (next) go(next);
}

function turn(side) {
  state.side = side;
  drawToolbar();
  layOut();
  remember();
}

function look(view) {
  state.view = view;
  drawAll();
  remember();
}

/** Selects an operation, opens the modules around it and scrolls to it. */
function select(op, move = true) {
  state.op = op;
  if (op && move) reach(op);
  panel();
  drawing();
  if (op && move && drawn.holder.has(op)) canvas.reveal(drawn.holder.get(op));
  remember();
}

function reach(op) {
  if (op.isWeight) state.weights = true;
  if (op.isSize) state.sizes = true;
  if (state.stage.differences.fates.get(op) === "removed" && state.side === "after") state.side = "both";
  if (!stageHas(op)) return;
  for (const path of ancestors(state.stage.moduleOf(op))) state.open.add(path);
  drawToolbar();
  layOut();
}

function stageHas(op) {
  return state.stage.ops.includes(op) || state.stage.differences.removed.includes(op);
}

/** Opens the graph at the operation that computes a value: in this stage, or in the last stage that has it. */
function find(name) {
  const stage = [state.stage, ...[...stages].reverse()].find((each) => each.makers.has(name));
  if (!stage) return;
  Object.assign(state, { view: "graph", stage, op: stage.makers.get(name) });
  drawAll();
  select(state.op);
}

function openAll() {
  state.open = opened(state.stage, state, MOST_OPEN);
  layOut();
  overview();
}

function closeAll() {
  state.open = new Set();
  layOut();
  overview();
}

// The address

function remember() {
  const parts = new URLSearchParams({ stage: state.stage.name });
  if (state.view !== "graph") parts.set("view", state.view);
  if (state.side !== "both") parts.set("side", state.side);
  if (state.op) parts.set("op", state.op.id);
  if (state.query) parts.set("find", state.query);
  history.replaceState(null, "", `#${parts}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.stage = stages.find((stage) => stage.name === parts.get("stage")) ?? stages.find((stage) => stage.effect === "lossy") ?? stages.at(-1);
  state.view = VIEWS.includes(parts.get("view")) ? parts.get("view") : "graph";
  state.side = SIDES.some(([side]) => side === parts.get("side")) ? parts.get("side") : "both";
  state.query = parts.get("find") ?? "";
  const id = parts.get("op");
  state.op = [...state.stage.ops, ...state.stage.differences.removed].find((op) => op.id === id) ?? null;
}

function begin() {
  recall();
  state.open = opened(state.stage, state, MOST_AT_FIRST);
  drawAll();
  if (state.op && state.view === "graph") select(state.op);
}

function pressed(event) {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape") return typing ? event.target.blur() : select(null);
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const index = "12345".indexOf(event.key);
  if (event.key === "/" && state.view === "graph") search.input.focus();
  else if (event.key === "/") document.querySelector("section:not([hidden]) .filters input")?.focus();
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "ArrowLeft") step(-1);
  else if (index >= 0) look(VIEWS[index]);
  else return;
  event.preventDefault();
}

byId("name").textContent = data.name;
byId("summary").textContent = data.summary;
byId("summary").title = data.pipeline;
addEventListener("keydown", pressed);
addEventListener("hashchange", begin);
begin();
document.documentElement.dataset.ready = "";
