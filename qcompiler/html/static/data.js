// The data of the page, and how a pass changed each operation between two stages.

const data = JSON.parse(byId("data").textContent);

const FATES = { same: "unchanged", added: "added", removed: "removed", changed: "changed" };

/** An operation of the table, with the names of its results. */
class Operation {
  constructor(row) {
    this.text = row.text;
    this.name = row.name;
    this.results = row.results ?? [];
    this.operands = row.operands ?? [];
    this.attrs = row.attrs ?? [];
    this.bytes = row.bytes ?? 0;
    [this.file, this.line, this.module, this.madeBy] = data.places[row.place];
    this.value = this.results.length ? this.results[0][0] : "";
    this.id = this.value || (this.name === "core.return" ? this.name : this.text);
    this.isWeight = this.name === "core.param" || this.name === "core.buffer";
    this.isSize = this.results.length > 0 && this.results.every(([, type]) => /^(int|float|bool)\b/.test(type));
  }

  get title() {
    return this.value ? `%${this.value}` : this.name.replace(/^core\./, "");
  }

  get type() {
    return this.results.map(([, type]) => type).join(", ");
  }

  /** The text that a search scans; computed on first use. */
  get haystack() {
    this._haystack ??= `${this.text} ${this.module} ${this.file}`.toLowerCase();
    return this._haystack;
  }
}

const operations = data.ops.map((row) => new Operation(row));

/** A graph of the pipeline: its operations in order, and the operation that computes each value. */
class Stage {
  constructor(row, index) {
    Object.assign(this, row, { index, ops: row.ops.map((number) => operations[number]) });
    this._differences = null;
  }

  get before() {
    return this.index ? stages[this.index - 1] : null;
  }

  /** Name of a value -> the operation that computes it. */
  get makers() {
    if (!this._makers) {
      this._makers = new Map();
      for (const op of this.ops) for (const [name] of op.results) this._makers.set(name, op);
    }
    return this._makers;
  }

  /** Name of a value -> its users. */
  get readers() {
    if (!this._readers) {
      this._readers = new Map();
      for (const op of this.ops) {
        for (const [, name] of op.operands) {
          if (!this._readers.has(name)) this._readers.set(name, new Set());
          this._readers.get(name).add(op);
        }
      }
    }
    return this._readers;
  }

  /** The module that an operation is drawn in; for a weight, the innermost module around all its users. */
  moduleOf(op) {
    if (!op.isWeight || op.module) return op.module;
    if (!this.makers.has(op.value)) return this.before?.moduleOf(op) ?? "";
    const paths = [...(this.readers.get(op.value) ?? [])].map((reader) => reader.module.split("."));
    return paths.length ? paths.reduce(sharedStart).join(".") : "";
  }

  /** Why this pass skipped the operation that computes a value; undefined if it did not, or gave no reason. */
  why(name) {
    const number = this.leftAlone[name];
    return number === undefined ? undefined : data.sentences[number];
  }

  get size() {
    return this.ops.length;
  }

  get differences() {
    this._differences ??= differences(this.before, this);
    return this._differences;
  }
}

function sharedStart(one, other) {
  const differs = one.findIndex((part, index) => part !== other[index]);
  return differs < 0 ? one : one.slice(0, differs);
}

/**
 * What became of each operation between two graphs. As in the printed diff, lines are compared without locations; a
 * line that is not there before is a change where an operation with the same result was, and an addition otherwise.
 */
function differences(before, after) {
  const fates = new Map(), twins = new Map(), removed = [];
  const counts = { added: 0, removed: 0, changed: 0 };
  const old = new Map((before ?? after).ops.map((op) => [op.id, op]));
  const lines = new Set((before ?? after).ops.map((op) => op.text));
  const kept = new Set();
  for (const op of after.ops) {
    const twin = old.get(op.id);
    const fate = lines.has(op.text) ? "same" : twin ? "changed" : "added";
    fates.set(op, fate);
    if (twin) {
      twins.set(op, twin);
      kept.add(twin);
    }
    if (fate !== "same") counts[fate]++;
  }
  for (const op of before?.ops ?? []) {
    if (kept.has(op)) continue;
    fates.set(op, "removed");
    removed.push(op);
    counts.removed++;
  }
  return { fates, twins, removed, counts };
}

const stages = data.stages.map((row, index) => new Stage(row, index));

/** Value -> its row in the decision table. */
const decisions = new Map(data.decisions.map((row) => [row.name, row]));
