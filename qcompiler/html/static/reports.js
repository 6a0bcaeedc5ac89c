// The other views: decisions, errors, memory, kernels.

const KINDS = [["own", "own"], ["inherited", "inherited"], ["kernel", "kernel"]];
const OUTPUTS = ["outputs", "outputs"];
const LONGEST_BAR = 60;
/** SQNR in dB of a full bar: relative errors below a thousandth are negligible beside larger ones. */

function drawDecisions(view, select) {
  const columns = [
    { name: "operation", value: (row) => `%${row.name}`, kind: "code" },
    { name: "kind", value: (row) => row.op, kind: "code" },
    { name: "module", value: (row) => row.module, kind: "code" },
    { name: "weight", value: (row) => row.shape, kind: "code type" },
    { name: "size", value: (row) => row.bytes, cell: (row) => size(row.bytes), number: true },
    { name: "quantized", value: (row) => (row.quantized ? "yes" : "no"), cell: (row) => el("span", { class: `verdict ${row.quantized ? "yes" : "no"}` }, row.quantized ? "yes" : "no") },
    { name: "format", value: (row) => row.format, kind: "code" },
    { name: "why not", value: (row) => row.reason },
  ];
  if (data.decisions.some((row) => row.remark)) columns.push({ name: "remarks", value: (row) => row.remark });
  const filters = [
    { label: "matmuls only", test: (row) => row.isMatmul },
    { label: "skipped only", test: (row) => !row.quantized },
  ];
  const made = new Table(columns, data.decisions, { filters, act: (row) => select(row.name), empty: "no matching operation" });
  const lead = `${[...data.notes, data.summary].join(". ")}.`;
  show(view, el("h2", {}, "Decisions"), el("p", { class: "lead" }, lead), made.element);
}

/** A number of the error report; "inf" means no error. */
function decibel(number) {
  if (number === "inf") return "exact";
  return typeof number === "number" ? `${number.toFixed(1)} dB` : String(number);
}

/** The errors that a row has; the error of the model's outputs only if it was measured. */
function kindsOf(row) {
  return row.outputs == null ? KINDS : [...KINDS, OUTPUTS];
}

function drawErrors(view, select) {
  const lead = el("p", { class: "lead" },
    `Signal-to-quantization-noise ratio of each quantized operation, in dB: higher is better, 6 dB more halve the error, and bars are full at ${LONGEST_BAR} dB. `,
    el("b", {}, "Own"), ": its codes on the float model's input. ", el("b", {}, "Inherited"), ": the float operation on the quantized model's input. ",
    el("b", {}, "Kernel"), ": the kernel against the reference on equal input. ",
    el("b", {}, "Outputs"), ", if measured: the model's outputs if only this operation is quantized.");
  if (!data.errors) {
    const call = 'compiled.to_html("report.html", attribution=qcompiler.attribute_error(compiled, batch))';
    show(view, el("h2", {}, "Errors"), lead, el("p", { class: "empty" }, "This report does not contain them. Measure them on a real batch:"), el("pre", {}, call));
    return;
  }
  const columns = [
    { name: "operation", value: (row) => `%${row.name} ${row.part}`.trim(), kind: "code" },
    { name: "module", value: (row) => row.module, kind: "code" },
    ...(data.errors.some((row) => row.outputs != null) ? [...KINDS, OUTPUTS] : KINDS).map(([key, label]) => ({
      name: label, value: (row) => numberOf(row[key]), cell: (row) => bar(row[key], key), kind: "bar",
    })),
    { name: "largest error", value: mostOf },
  ];
  show(view, el("h2", {}, "Errors"), lead, new Table(columns, data.errors, { act: (row) => select(row.name) }).element);
}

function numberOf(number) {
  return number === "inf" ? Infinity : number === "-inf" ? -Infinity : number;
}

/** Which of the three errors is the largest; empty if there is none. */
function mostOf(row) {
  const [key, label] = KINDS.reduce((worst, each) => (numberOf(row[each[0]]) < numberOf(row[worst[0]]) ? each : worst));
  return row[key] === "inf" ? "" : label;
}

function bar(number, kind) {
  const exact = number === "inf";
  const share = exact ? 1 : typeof number === "number" ? Math.min(1, Math.max(0, number / LONGEST_BAR)) : 0;
  const picture = shape("svg", { class: `bar ${kind}${exact ? " exact" : ""}`, viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    shape("rect", { class: "track", width: 100, height: 8 }), shape("rect", { width: 100 * share, height: 8 }));
  return [picture, el("span", { class: "amount" }, decibel(number))];
}

/** Bytes of a stage's weights by element type, largest first. */
function bytesByType(stage) {
  const sums = new Map();
  for (const op of stage.ops) {
    if (!op.bytes) continue;
    const type = op.type.split("[")[0];
    sums.set(type, (sums.get(type) ?? 0) + op.bytes);
  }
  return [...sums].sort((a, b) => b[1] - a[1]);
}

function drawMemory(view, stage, select) {
  const rows = stages.map((each) => ({ stage: each, types: bytesByType(each) }));
  const total = ({ types }) => types.reduce((sum, [, bytes]) => sum + bytes, 0);
  const most = Math.max(1, ...rows.map(total));
  const order = [...new Set(rows.flatMap(({ types }) => types.map(([type]) => type)))];
  const chart = el("div", { class: "chart" }, rows.map((row) => el("div", { class: `level${row.stage === stage ? " current" : ""}` },
    el("span", { class: "code" }, row.stage.name), stack(row.types, most, order), el("span", { class: "amount" }, size(total(row))))));
  const legend = el("p", { class: "keys" }, order.map((type, index) => el("span", {}, el("i", { class: `key type-${index % 6}` }), type)));
  const columns = [
    { name: "weight", value: (row) => `%${row.value}`, kind: "code" },
    { name: "type", value: (row) => row.type, kind: "code type" },
    { name: "size", value: (row) => row.bytes, cell: (row) => size(row.bytes), number: true },
    { name: "made by", value: (row) => row.madeBy || "the model", kind: "code" },
  ];
  const weights = stage.ops.filter((op) => op.isWeight).sort((a, b) => b.bytes - a.bytes);
  show(view, el("h2", {}, "Memory"), el("p", { class: "lead" }, "Parameters and buffers that the graph holds after each pass."), chart, legend,
    el("h3", {}, `After ${stage.name}`), new Table(columns, weights, { act: (row) => select(row.value), empty: "the graph holds no weights" }).element);
}

function stack(types, most, order) {
  let from = 0;
  const parts = types.map(([type, bytes]) => {
    const part = shape("rect", { class: `type-${order.indexOf(type) % 6}`, x: from, width: (1000 * bytes) / most, height: 10 }, shape("title", {}, `${type}: ${size(bytes)}`));
    from += (1000 * bytes) / most;
    return part;
  });
  return shape("svg", { class: "stack", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": types.map(([type, bytes]) => `${type} ${size(bytes)}`).join(", ") },
    shape("rect", { class: "track", width: 1000, height: 10 }), parts);
}

function drawKernels(view, select) {
  const { rows, gpu, kinds } = data.kernels;
  if (!kinds.length) {
    show(view, el("h2", {}, "Kernels"), el("p", { class: "empty" }, "The last graph does not call any qcompiler kernel."));
    return;
  }
  const columns = [
    { name: "first", value: (row) => `%${row.values[0]}`, kind: "code" },
    { name: "calls", value: (row) => row.values.length, number: true },
    { name: "kernel", value: (row) => row.op.replace(/^kernel\./, ""), kind: "code" },
    { name: "result", value: (row) => row.result, kind: "code type" },
    { name: "operands", value: (row) => row.operands.join(" "), cell: (row) => row.operands.map((type) => el("div", {}, type)), kind: "code type" },
    { name: "attributes", value: (row) => row.attrs.map((pair) => pair.join(" ")).join(" "), cell: (row) => row.attrs.map((pair) => el("div", {}, pair.join(" = "))), kind: "code wide" },
    ...rows.map((count, index) => ({ name: plural(count, "row"), value: (row) => row.choices[index] ?? "", kind: "code choice" })),
  ];
  show(view, el("h2", {}, "Kernels"),
    el("p", { class: "lead" }, `Equal calls are grouped, as compiled for the target ${data.target}.${gpu ? ` The row columns show the configuration selected for that many rows on a ${gpu}.` : ""}`),
    new Table(columns, kinds, { act: (row) => select(row.values[0]) }).element);
}
