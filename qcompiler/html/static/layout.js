// Layout. dagre lays out each open module separately, top down; its box is then one node of the module around it. An
// edge that enters or leaves a box passes through a port in its border, which dagre places like any node. The drawn
// edge joins its parts from the layouts on its way.

const WIDE = { title: 6.7, detail: 6.1 };
/** Pixels per character in the two font sizes of the drawing. */

const BOX_HEAD = 24, MARGIN = 14;
const WIDEST_FAN = 4;
/** Number of users of one value in a box above which most edges to them are omitted. */

const TOP = "top", BOTTOM = "bottom";

function lines(node) {
  if (node.module) {
    const count = Object.values(node.counts).reduce((sum, each) => sum + each, 0);
    return [cut(node.module.name, 36), plural(count, "operation")];
  }
  const first = node.op.name.replace(/^aten\.|^core\./, "").replace(/\.(Tensor|default)$/, "");
  const second = node.op.results.length ? `${node.op.title} ${node.op.results[0][1]}` : "";
  return [cut(first, 40), cut(second, 44)];
}

function measure(node) {
  node.lines = lines(node);
  node.note = node.within && !node.module ? cut(node.within.split(".").at(-1), 24) : "";
  const marks = node.module ? marksOf(node.counts).map((mark) => `  ${mark}`).join("") : "";
  const title = (node.lines[0].length + (node.note ? node.note.length + 2 : 0)) * WIDE.title;
  const detail = (node.lines[1].length + marks.length) * WIDE.detail;
  node.width = Math.max(76, Math.ceil(Math.max(title, detail) + 24));
  node.height = node.lines[1] ? 42 : 26;
}

/** The numbers of changes in a closed module, as displayed. */
function marksOf(counts) {
  const signs = [["added", "+"], ["removed", "−"], ["changed", "~"]];
  return signs.filter(([fate]) => counts[fate]).map(([fate, sign]) => `${sign}${counts[fate]}`);
}

/** Places every node, box and edge of a view; returns the size of the drawing. */
function place(view) {
  const parts = new Map([...view.nodes, ...view.boxes].map((part) => [part.id, part]));
  const inside = new Map([[null, []]]);
  for (const box of view.boxes) inside.set(box.id, []);
  for (const part of parts.values()) inside.get(part.parent).push(part);
  view.nodes.forEach(measure);
  const plans = plan(view, parts);
  const layOutBox = (id) => {
    for (const part of inside.get(id)) if (part.module && inside.has(part.id)) layOutBox(part.id);
    const layout = layOutLevel(inside.get(id), plans.get(id));
    if (id !== null) Object.assign(parts.get(id), { layout, ...boxSize(parts.get(id), layout) });
    return layout;
  };
  const whole = layOutBox(null);
  settle(whole, inside, inside.get(null), 0, 0);
  for (const edge of view.edges) edge.points = edge.far ? straight(parts.get(edge.v), parts.get(edge.w)) : trace(edge, parts, whole);
  return { width: whole.width, height: whole.height };
}

/** The boxes around a part, innermost first; the last is null, the drawing. */
function around(part, parts) {
  const found = [];
  for (let id = part.parent; id !== null; id = parts.get(id).parent) found.push(id);
  return [...found, null];
}

/**
 * The route of an edge, one hop for each box that it crosses: out of the boxes around its start, across the innermost
 * box that contains both ends, and into those around its end. Edges from one start share their ports.
 */
function hops(edge, parts) {
  const [from, to] = [parts.get(edge.v), parts.get(edge.w)];
  const [out, into] = [around(from, parts), around(to, parts)];
  const shared = out.find((id) => into.includes(id));
  const [leaving, entering] = [out.slice(0, out.indexOf(shared)), into.slice(0, into.indexOf(shared)).reverse()];
  const found = [];
  let at = edge.v;
  for (const id of leaving) {
    found.push({ level: id, v: at, w: `out ${edge.v}` });
    at = id;
  }
  found.push({ level: shared, v: at, w: entering[0] ?? edge.w });
  entering.forEach((id, index) => found.push({ level: id, v: `in ${edge.v}`, w: entering[index + 1] ?? edge.w }));
  for (const hop of found) hop.name = edge.v;
  return found;
}

/**
 * Box -> its distinct hops. A value with many users in a box, such as the mask in each layer of a model, gets an edge
 * to the first user only: the others are long and alike, and are drawn on request.
 */
function plan(view, parts) {
  const fans = new Map();
  const fan = ({ level, v, name }, w) => {
    const key = `${level}\n${v}\n${name}`;
    if (!fans.has(key)) fans.set(key, new Set());
    return w === undefined ? fans.get(key) : fans.get(key).add(w);
  };
  for (const edge of view.edges) {
    edge.hops = hops(edge, parts);
    for (const hop of edge.hops) fan(hop, hop.w);
  }
  const plans = new Map([null, ...view.boxes.map((box) => box.id)].map((id) => [id, new Map()]));
  for (const node of view.nodes) node.more = 0;
  for (const edge of view.edges) {
    edge.far = edge.hops.some((hop) => fan(hop).size > WIDEST_FAN && [...fan(hop)][0] !== hop.w);
    if (edge.far) parts.get(edge.v).more++;
    else for (const hop of edge.hops) plans.get(hop.level).set(`${hop.v}\n${hop.w}\n${hop.name}`, hop);
  }
  return plans;
}

/** One box, or the whole drawing: the places of its parts and ports, and the routes of its hops. */
function layOutLevel(children, hopsHere) {
  const graph = new dagre.graphlib.Graph({ multigraph: true });
  // Network simplex gives shorter edges, but is slow for many nodes.
  const ranker = children.length > 150 ? "longest-path" : "network-simplex";
  graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 28, edgesep: 10, marginx: MARGIN, marginy: MARGIN, ranker });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const part of children) graph.setNode(part.id, { width: part.width, height: part.height });
  const ports = { in: new Set(), out: new Set() };
  for (const { v, w } of hopsHere.values()) {
    if (v.startsWith("in ")) ports.in.add(v);
    if (w.startsWith("out ")) ports.out.add(w);
  }
  for (const port of [...ports.in, ...ports.out]) graph.setNode(port, { width: 1, height: 1 });
  for (const { v, w, name } of hopsHere.values()) graph.setEdge(v, w, { weight: 2 }, name);
  if (ports.in.size) fasten(graph, children, ports.in, TOP);
  if (ports.out.size) fasten(graph, children, ports.out, BOTTOM);
  dagre.layout(graph);
  for (const part of children) Object.assign(part, corner(graph.node(part.id)));
  return cropped(graph, children, ports.in.size > 0, ports.out.size > 0);
}

/** Removes the ranks of ports from a level: ports are in the border and need no space. */
function cropped(graph, children, above, below) {
  const { width, height } = children.length ? graph.graph() : { width: 0, height: 0 };
  const top = above ? Math.min(...children.map((part) => part.y)) - MARGIN : 0;
  const bottom = below ? Math.max(...children.map((part) => part.y + part.height)) + MARGIN : height;
  for (const part of children) part.y -= top;
  for (const edge of graph.edges()) {
    for (const point of graph.edge(edge).points) point.y = Math.min(Math.max(point.y, top), bottom) - top;
  }
  return { graph, width, height: bottom - top, x: 0, y: 0 };
}

/** Keeps all ports of one kind in the first or last rank, apart from everything else. */
function fasten(graph, children, ports, end) {
  graph.setNode(end, { width: 0, height: 0 });
  const free = (id) => (end === TOP ? graph.predecessors(id) : graph.successors(id)).length === 0;
  const loose = children.filter((part) => free(part.id)).map((part) => part.id);
  const tie = (id, label) => (end === TOP ? graph.setEdge(end, id, label, end) : graph.setEdge(id, end, label, end));
  for (const port of ports) tie(port, { weight: 100, minlen: 1 });
  for (const id of loose) tie(id, { weight: 0, minlen: 2 });
}

function corner({ x, y, width, height }) {
  return { x: x - width / 2, y: y - height / 2, width, height };
}

function boxSize(box, layout) {
  box.pad = Math.max(0, Math.ceil(box.module.name.length * WIDE.title + 44 - layout.width));
  return { width: layout.width + box.pad, height: layout.height + BOX_HEAD };
}

/** Converts places inside each box to places in the drawing. */
function settle(layout, inside, children, x, y) {
  Object.assign(layout, { x, y });
  for (const part of children) {
    part.x += x;
    part.y += y;
    if (part.layout) settle(part.layout, inside, inside.get(part.id), part.x + part.pad / 2, part.y + BOX_HEAD);
  }
}

function straight(from, to) {
  return [{ x: from.x + from.width / 2, y: from.y + from.height }, { x: to.x + to.width / 2, y: to.y }];
}

/** The points of an edge in the drawing, along all of its hops. */
function trace(edge, parts, whole) {
  const points = [];
  for (const { level, v, w, name } of edge.hops) {
    const { graph, x, y } = level === null ? whole : parts.get(level).layout;
    const run = graph.edge(v, w, name).points.map((point) => ({ x: point.x + x, y: point.y + y }));
    if (level !== null && v.startsWith("in ")) run[0] = { x: run[0].x, y: parts.get(level).y };
    if (level !== null && w.startsWith("out ")) run[run.length - 1] = { x: run.at(-1).x, y: parts.get(level).y + parts.get(level).height };
    // A port lies between two hops; the layout around its box only knows that the edge meets the border somewhere.
    if (v.startsWith("in ")) points.pop();
    points.push(...(points.length && !v.startsWith("in ") ? run.slice(1) : run));
  }
  return points;
}
