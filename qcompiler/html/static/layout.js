// Where everything goes: dagre places nodes in ranks from the top down, boxes around what they hold, and edges.

const TEXT = { op: 6.7, small: 6.1 };
/** Pixels of a character in the two sizes of the drawing's fixed-width type. */

const BOX_HEAD = 26;

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
  const marks = node.module ? marksOf(node.counts) : [];
  const wide = Math.max(node.lines[0].length * TEXT.op + 22, node.lines[1].length * TEXT.small + marks.join("  ").length * TEXT.small + 22);
  node.width = Math.max(84, Math.ceil(wide));
  node.height = node.lines[1] ? 42 : 26;
}

/** The numbers of changes in a closed module, as the drawing shows them. */
function marksOf(counts) {
  const signs = [["added", "+"], ["removed", "−"], ["changed", "~"]];
  return signs.filter(([fate]) => counts[fate]).map(([fate, sign]) => `${sign}${counts[fate]}`);
}

/** Gives every node, box and edge of a view its place; the extent of the whole. */
function place(view) {
  const many = view.nodes.length > 150;
  const graph = new dagre.graphlib.Graph({ compound: true });
  // Network simplex makes the shorter edges, and takes long for many nodes.
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, edgesep: 8, marginx: 24, marginy: 24, ranker: many ? "longest-path" : "network-simplex" });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const box of view.boxes) graph.setNode(box.id, {});
  for (const node of view.nodes) {
    measure(node);
    graph.setNode(node.id, { width: node.width, height: node.height });
  }
  for (const part of [...view.boxes, ...view.nodes]) if (part.parent) graph.setParent(part.id, part.parent);
  for (const edge of view.edges) graph.setEdge(edge.v, edge.w, { weight: Math.min(edge.values.size, 4) });
  dagre.layout(graph);
  for (const node of view.nodes) Object.assign(node, corner(graph.node(node.id)));
  for (const box of view.boxes) Object.assign(box, corner(graph.node(box.id)));
  for (const edge of view.edges) edge.points = graph.edge(edge.v, edge.w).points;
  const { width, height } = graph.graph();
  return { width, height };
}

function corner({ x, y, width, height }) {
  return { x: x - width / 2, y: y - height / 2, width, height };
}
