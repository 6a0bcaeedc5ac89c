// Search in the operations of a stage, including those that the pass removed.

const MOST_RESULTS = 60;

/** The operations that contain every word of a query in their line, module or file, in order. */
function found(stage, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  return [...stage.ops, ...stage.differences.removed].filter((op) => words.every((word) => op.haystack.includes(word)));
}

/** The search field and the list under it. */
class Search {
  constructor(query, choose) {
    this.choose = choose;
    this.query = query;
    this.at = -1;
    this.results = [];
    this.input = el("input", {
      id: "search", type: "search", placeholder: "Search operations  ( / )", autocomplete: "off", spellcheck: "false",
      role: "combobox", "aria-expanded": "false", "aria-controls": "results", "aria-label": "Search operations, modules, types",
      oninput: () => this.query(this.input.value),
      onkeydown: (event) => this.key(event),
      onfocus: () => this.open(true),
      onblur: () => this.open(false),
    });
    this.list = el("ul", { id: "results", role: "listbox", "aria-label": "Found", hidden: true, onmousedown: (event) => event.preventDefault() });
    this.count = el("span", { id: "count", "aria-live": "polite" });
    this.element = el("div", { class: "search" }, this.input, this.count, this.list);
  }

  show(results, fates) {
    this.results = results;
    this.at = -1;
    this.count.textContent = this.input.value.trim() ? String(results.length) : "";
    const items = results.slice(0, MOST_RESULTS).map((op, index) =>
      el("li", { role: "option", id: `result-${index}`, class: `fate-${fates.get(op) ?? "same"}`, "aria-selected": "false", onclick: () => this.pick(index) },
        el("b", {}, op.title), ` ${op.name}`, el("small", {}, op.module || "outside all modules")));
    if (results.length > MOST_RESULTS) items.push(el("li", { class: "more" }, `and ${results.length - MOST_RESULTS} more: add a word`));
    show(this.list, items);
    this.open(document.activeElement === this.input);
  }

  open(want) {
    const visible = want && this.results.length > 0;
    this.list.hidden = !visible;
    this.input.setAttribute("aria-expanded", String(visible));
  }

  key(event) {
    const last = Math.min(this.results.length, MOST_RESULTS) - 1;
    if (event.key === "ArrowDown") this.move(Math.min(this.at + 1, last));
    else if (event.key === "ArrowUp") this.move(Math.max(this.at - 1, 0));
    else if (event.key === "Enter" && last >= 0) this.pick(Math.max(this.at, 0));
    else return;
    event.preventDefault();
  }

  move(to) {
    this.open(true);
    this.list.children[this.at]?.setAttribute("aria-selected", "false");
    this.at = to;
    const item = this.list.children[to];
    if (!item) return;
    item.setAttribute("aria-selected", "true");
    item.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", item.id);
  }

  pick(index) {
    this.move(index);
    this.choose(this.results[index]);
    this.open(false);
  }
}
