// The operations in their module tree, and its open part as nodes and edges.

/** One module: its submodules and its direct operations. */
class Module {
  constructor(path, name, parent) {
    Object.assign(this, { path, name, parent, modules: new Map(), ops: [], all: [] });
  }

  inside(name) {
    const path = this.path ? `${this.path}.${name}` : name;
    if (!this.modules.has(name)) this.modules.set(name, new Module(path, name, this));
    return this.modules.get(name);
  }

  /** The path from here to the next operation or branch: what opens in one step. */
  get only() {
    return !this.ops.length && this.modules.size === 1 ? [...this.modules.values()][0] : null;
  }
}

function moduleTree(stage, ops) {
  const root = new Module("", "", null);
  for (const op of ops) {
    let module = root;
    root.all.push(op);
    const path = stage.moduleOf(op);
    for (const part of path ? path.split(".") : []) {
      module = module.inside(part);
      module.all.push(op);
    }
    module.ops.push(op);
  }
  return root;
}

/** The paths of the modules around a path, including itself, outermost first. */
function ancestors(path) {
  const parts = path ? path.split(".") : [];
  return parts.map((_, index) => parts.slice(0, index + 1).join("."));
}

/**
 * The visible operations of a stage: "after" the pass, "before" it, or "both". Weights and sizes are omitted unless
 * they are requested, or changed.
 */
function visibleOps(stage, options) {
  const { fates, removed, twins } = stage.differences;
  const seen = new Map([...twins].map(([now, then]) => [then, now]));
  let ops = stage.ops;
  const fate = new Map(fates);
  if (options.side === "before" && stage.before) {
    ops = stage.before.ops;
    for (const op of ops) if (!fate.has(op)) fate.set(op, fates.get(seen.get(op)) ?? "removed");
  } else if (options.side === "both") {
    ops = interleaved(stage, removed);
  }
  const wanted = (op) => (op.isWeight ? options.weights : op.isSize ? options.sizes : true) || fate.get(op) !== "same";
  return { ops: ops.filter(wanted), fate };
}

/** The operations after a pass; removed operations are inserted at their former positions. */
function interleaved(stage, removed) {
  if (!removed.length) return stage.ops;
  const gone = new Set(removed), waiting = new Map();
  let run = [];
  for (const op of stage.before.ops) {
    if (gone.has(op)) run.push(op);
    else if (run.length) {
      waiting.set(op.id, run);
      run = [];
    }
  }
  return [...stage.ops.flatMap((op) => [...(waiting.get(op.id) ?? []), op]), ...run];
}

/**
 * The edges between operations that a view draws: [from, to, value, whether it was removed]. In "both", also the edges
 * into removed operations, and from them to operations that still exist.
 */
function readings(stage, ops, side) {
  const drawn = new Set(ops), found = [];
  const { removed, twins } = stage.differences;
  const gone = new Set(removed);
  const walk = (op, { operands }, makers, old, counts = () => true) => {
    for (const [, name] of operands) {
      const maker = resolve(makers.get(name), drawn, stage, old);
      if (maker && counts(maker)) found.push([maker, op, name, old]);
    }
  };
  for (const op of ops) {
    if (side === "before" && stage.before) walk(op, op, stage.before.makers, false);
    else if (gone.has(op)) walk(op, op, stage.before.makers, true);
    else {
      walk(op, op, stage.makers, false);
      if (side === "both" && twins.has(op)) walk(op, twins.get(op), stage.before?.makers ?? stage.makers, true, (maker) => gone.has(maker));
    }
  }
  return found;
}

/** What a view shows for the operation that computes a value; for an old operation, its successor with the same result. */
function resolve(maker, drawn, stage, old) {
  if (!maker || drawn.has(maker)) return maker;
  const twin = old ? stage.makers.get(maker.value) : undefined;
  return twin && drawn.has(twin) ? twin : null;
}

/**
 * The nodes, boxes and edges to draw: a closed module is one node, and edges between the same two nodes are one edge.
 * A module with a single operation is shown as that operation.
 */
function openPart(stage, options, open) {
  const { ops, fate } = visibleOps(stage, options);
  const tree = moduleTree(stage, ops);
  const nodes = [], boxes = [], holder = new Map();
  const add = (module, box) => {
    for (const op of module.ops) place(op, box);
    for (const inner of module.modules.values()) {
      if (inner.all.length === 1) place(inner.all[0], box, inner);
      else if (open.has(inner.path)) {
        boxes.push({ id: `m:${inner.path}`, module: inner, parent: box });
        add(inner, `m:${inner.path}`);
      } else {
        const node = { id: `m:${inner.path}`, module: inner, parent: box, counts: tally(inner.all, fate) };
        nodes.push(node);
        for (const op of inner.all) holder.set(op, node);
      }
    }
  };
  const place = (op, box, module) => {
    const node = { id: `o${nodes.length}`, op, fate: fate.get(op), parent: box, within: module?.path };
    nodes.push(node);
    holder.set(op, node);
  };
  add(tree, null);
  const edges = new Map();
  for (const [from, to, value, old] of readings(stage, ops, options.side)) {
    const [v, w] = [holder.get(from), holder.get(to)];
    if (v === w) continue;
    const key = `${v.id} ${w.id}`;
    const edge = edges.get(key) ?? { v: v.id, w: w.id, values: new Set(), old: true };
    edge.values.add(value);
    edge.old &&= old;
    edges.set(key, edge);
  }
  return { nodes, boxes, edges: [...edges.values()], holder, tree };
}

function tally(ops, fate) {
  const counts = { same: 0, added: 0, removed: 0, changed: 0 };
  for (const op of ops) counts[fate.get(op)]++;
  return counts;
}

/** The modules to open so that at most so many nodes are drawn: level by level from the outside, whole levels only. */
function opened(stage, options, most) {
  const tree = moduleTree(stage, visibleOps(stage, options).ops);
  const open = new Set();
  const shown = (module) => module.ops.length + module.modules.size;
  let room = most - shown(tree);
  for (let level = [tree]; level.length && room >= 0; ) {
    level = level.flatMap((module) => [...module.modules.values()]).filter((module) => module.all.length > 1);
    room -= level.reduce((sum, module) => sum + shown(module) - 1, 0);
    if (room >= 0) for (const module of level) open.add(module.path);
  }
  return open;
}
