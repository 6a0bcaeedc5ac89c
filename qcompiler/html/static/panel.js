// The side panel on one operation.

function drawPanel(panel, stage, op, act) {
  const { fates, twins } = stage.differences;
  const fate = fates.get(op) ?? "same";
  const names = op.results.map(([name]) => name);
  show(panel,
    el("button", { class: "close", "aria-label": "Close", onclick: () => act.close() }, "×"),
    el("p", { class: "kind" }, op.name, fate === "same" ? null : el("span", { class: `badge fate-${fate}` }, FATES[fate])),
    el("h2", {}, op.title),
    section(fate === "changed" ? "Line, before and after" : "Line", fate === "changed" ? changedLine(twins.get(op), op) : el("pre", {}, op.text)),
    section("Decision", names.map(decisionOf)),
    section("Skipped", whyNot(names)),
    section("Error", errorOf(names)),
    section("Types", table(op.results.map(([name, type]) => [`%${name}`, type]))),
    section("Attributes", table(op.attrs)),
    section("Place", table(placeOf(op))),
    section("Reads", operandsOf(op, stage, act)),
    section("Users", readersOf(op, stage, act)));
}

function section(heading, content) {
  const children = [content].flat(Infinity).filter(Boolean);
  return children.length ? el("section", {}, el("h3", {}, heading), children) : null;
}

function table(rows) {
  return rows.length ? el("dl", {}, rows.map(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])) : null;
}

function placeOf(op) {
  const rows = [];
  if (op.module) rows.push(["module", op.module]);
  if (op.file) rows.push(["source", `${op.file}:${op.line}`]);
  if (op.madeBy) rows.push(["made by", op.madeBy]);
  return rows;
}

function operandsOf(op, stage, act) {
  const old = stage.differences.fates.get(op) === "removed" ? stage.before : stage;
  const rows = op.operands.map(([path, name]) => {
    const maker = old.makers.get(name);
    const type = maker?.results.find(([each]) => each === name)?.[1] ?? "";
    return [path, [jump(`%${name}`, maker, act), " ", el("small", {}, type)]];
  });
  return table(rows);
}

function jump(label, op, act) {
  return op ? el("button", { class: "link", onclick: () => act.select(op) }, label) : label;
}

function readersOf(op, stage, act) {
  const graph = stage.differences.fates.get(op) === "removed" ? stage.before : stage;
  const all = [...new Set(op.results.flatMap(([name]) => [...(graph.readers.get(name) ?? [])]))];
  const items = all.slice(0, 20).map((other) => el("li", {}, jump(other.title, other, act), " ", el("small", {}, other.name)));
  if (all.length > 20) items.push(el("li", {}, `and ${all.length - 20} more`));
  return items.length ? el("ul", {}, items) : null;
}

/** The reasons why passes skipped the operation, each with the pass. */
function whyNot(names) {
  const rows = stages.flatMap((stage) => names.map((name) => [stage.name, stage.why(name)]).filter(([, why]) => why));
  return table(rows);
}

function decisionOf(name) {
  const row = decisions.get(name);
  if (!row) return null;
  return [
    el("p", {}, el("span", { class: `verdict ${row.quantized ? "yes" : "no"}` }, row.quantized ? "quantized" : "not quantized"), row.reason ? ` ${row.reason}` : ""),
    row.remark ? el("p", {}, row.remark) : null,
  ];
}

function errorOf(names) {
  const rows = (data.errors ?? []).filter((row) => names.includes(row.name));
  return rows.map((row) => table(kindsOf(row).map(([key, label]) => [`${row.part} ${label}`.trim(), decibel(row[key])])));
}

function changedLine(before, after) {
  return [el("pre", { class: "fate-removed" }, before.text), el("pre", { class: "fate-added" }, after.text)];
}
