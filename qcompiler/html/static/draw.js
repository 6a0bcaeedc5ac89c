// Draws a view after layout.

/** Draws a view into the scene; `act` is called with the node or box that was clicked. */
function draw(scene, view, marks, act) {
  const boxes = [...view.boxes].sort((a, b) => a.module.path.length - b.module.path.length);
  show(
    scene,
    boxes.map((box) => drawBox(box, marks, act)),
    view.edges.map((edge) => drawEdge(edge, marks)),
    view.nodes.map((node) => (node.module ? drawModule(node, marks, act) : drawOp(node, marks, act))),
  );
}

function acting(label, extra, act) {
  return {
    tabindex: 0,
    role: "button",
    "aria-label": label,
    ...extra,
    onclick: act,
    onkeydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      act();
    },
  };
}

function drawOp(node, marks, act) {
  const { op, fate, x, y, width, height } = node;
  const end = op.name === "core.input" || op.name === "core.return" || op.isWeight;
  const classes = ["node", "op", `fate-${fate}`, `of-${op.name.split(".")[0]}`];
  if (end) classes.push("end");
  if (marks.selected === op || (marks.selected && marks.selected.id === op.id)) classes.push("selected");
  if (marks.found?.has(op)) classes.push("found");
  const label = `${op.title}, ${op.name}${fate === "same" ? "" : `, ${FATES[fate]}`}`;
  return shape("g", acting(label, { class: classes.join(" "), transform: `translate(${x} ${y})`, "data-op": op.id }, () => act(node)),
    shape("rect", { width, height, rx: end ? 13 : 5 }),
    end ? null : shape("rect", { class: "dialect", x: 0, y: 6, width: 3, height: height - 12, rx: 1.5 }),
    shape("text", { x: 11, y: node.lines[1] ? 17 : height / 2 + 4, class: "title" }, node.lines[0],
      node.note && shape("tspan", { class: "note", dx: 10 }, node.note)),
    node.lines[1] ? text(node.lines[1], 11, 32, "detail") : null,
    more(node),
    shape("title", {}, op.text));
}

function drawModule(node, marks, act) {
  const { module, counts, x, y, width, height } = node;
  const changes = marksOf(counts);
  const hits = marks.found ? module.all.filter((op) => marks.found.has(op)).length : 0;
  const classes = ["node", "module"];
  if (changes.length) classes.push("touched");
  if (hits) classes.push("found");
  const said = ["added", "removed", "changed"].filter((fate) => counts[fate]).map((fate) => `, ${counts[fate]} ${fate}`).join("");
  const label = `Open module ${module.path}, ${node.lines[1]}${said}`;
  return shape("g", acting(label, { class: classes.join(" "), transform: `translate(${x} ${y})`, "aria-expanded": "false", "data-module": module.path }, () => act(node)),
    shape("rect", { class: "behind", x: 4, y: 4, width, height, rx: 7 }),
    shape("rect", { width, height, rx: 7 }),
    text(node.lines[0], 11, 17, "title"),
    shape("text", { x: 11, y: 32, class: "detail" },
      hits ? `${hits} found` : node.lines[1],
      ...["added", "removed", "changed"].filter((fate) => counts[fate])
        .map((fate, index) => shape("tspan", { class: `mark-${fate}`, dx: 9 }, changes[index]))),
    more(node),
    shape("title", {}, module.path));
}

/** The number of users whose edges are not drawn until the node is selected. */
function more(node) {
  return node.more ? shape("text", { x: node.width - 2, y: node.height + 11, class: "more" }, `→ ${node.more} more`) : null;
}

function drawBox(box, marks, act) {
  const { module, x, y, width, height } = box;
  const head = acting(`Close module ${module.path}`, { class: "head", "aria-expanded": "true", "data-module": module.path }, () => act(box));
  const name = cut(module.name, Math.max(4, Math.floor((width - 30) / WIDE.title)));
  return shape("g", { class: "box", transform: `translate(${x} ${y})` },
    shape("rect", { class: "frame", width, height, rx: 9 }),
    shape("g", head,
      shape("rect", { width, height: BOX_HEAD, rx: 9 }),
      text("−", 10, 16, "sign"),
      text(name, 23, 16, "title"),
      shape("title", {}, `${module.path}: ${plural(module.all.length, "operation")}`)));
}

function text(string, x, y, kind) {
  return shape("text", { x, y, class: kind }, string);
}

function drawEdge(edge, marks) {
  const points = edge.points;
  const classes = ["edge"];
  if (edge.old) classes.push("old");
  if (edge.far) classes.push("far");
  if (marks.near?.has(edge)) classes.push("near");
  const values = [...edge.values];
  const names = values.slice(0, 12).map((name) => `%${name}`).join("\n") + (values.length > 12 ? `\nand ${values.length - 12} more` : "");
  const path = smooth(points);
  return shape("g", { class: classes.join(" ") },
    shape("path", { d: path, "stroke-width": values.length > 1 ? 1.8 : 1.2 }),
    shape("path", { d: arrow(points), class: "tip" }),
    shape("path", { d: path, class: "wide" }, shape("title", {}, names)));
}

/** A curve through the points from dagre, vertical at both ends. */
function smooth(points) {
  const [first, ...rest] = points;
  let path = `M${round(first.x)} ${round(first.y)}`;
  let from = first;
  for (const to of rest) {
    const middle = (from.y + to.y) / 2;
    path += `C${round(from.x)} ${round(middle)} ${round(to.x)} ${round(middle)} ${round(to.x)} ${round(to.y)}`;
    from = to;
  }
  return path;
}

function arrow(points) {
  const { x, y } = points.at(-1);
  const up = points.at(-2).y > y ? -1 : 1;
  return `M${round(x - 3.5)} ${round(y - 6 * up)}L${round(x)} ${round(y)}L${round(x + 3.5)} ${round(y - 6 * up)}Z`;
}

function round(number) {
  return Math.round(number * 10) / 10;
}
