// A table that can be sorted by any column, and filtered by words and checkboxes.

class Table {
  /**
   * columns: [{ name, value(row), cell?(row), number? }]; filters: [{ label, test(row), on? }]; `act` is called with
   * the row that was clicked.
   */
  constructor(columns, rows, { filters = [], act = null, empty = "nothing to show" } = {}) {
    Object.assign(this, { columns, rows, filters, act, empty, sorted: null, up: true });
    this.input = el("input", { type: "search", placeholder: "Filter", "aria-label": "Filter the table", oninput: () => this.refresh() });
    this.boxes = filters.map((filter) => el("input", { type: "checkbox", checked: filter.on, onchange: () => this.refresh() }));
    this.count = el("span", { class: "count", role: "status" });
    this.body = el("tbody");
    this.heads = columns.map((column) => el("th", { scope: "col", class: column.number ? "number" : null },
      el("button", { onclick: () => this.sort(column) }, column.name)));
    const choices = filters.map((filter, index) => el("label", {}, this.boxes[index], ` ${filter.label}`));
    this.element = el("div", { class: "table" },
      el("div", { class: "filters" }, this.input, choices, this.count),
      el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, this.heads)), this.body)));
    this.refresh();
  }

  sort(column) {
    this.up = this.sorted === column ? !this.up : !column.number;
    this.sorted = column;
    this.columns.forEach((each, index) => this.heads[index].setAttribute("aria-sort", each !== column ? "none" : this.up ? "ascending" : "descending"));
    this.refresh();
  }

  refresh() {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => this.columns.map((column) => String(column.value(row))).join(" ").toLowerCase();
    let rows = this.rows.filter((row) => words.every((word) => text(row).includes(word)));
    const tests = this.filters.filter((_, index) => this.boxes[index].checked);
    rows = rows.filter((row) => tests.every((filter) => filter.test(row)));
    if (this.sorted) rows.sort((a, b) => compare(this.sorted.value(a), this.sorted.value(b)) * (this.up ? 1 : -1));
    this.count.textContent = rows.length === this.rows.length ? plural(rows.length, "row") : `${rows.length} of ${plural(this.rows.length, "row")}`;
    show(this.body, rows.length ? rows.map((row) => this.row(row))
      : el("tr", {}, el("td", { colspan: this.columns.length, class: "empty" }, this.empty)));
  }

  row(row) {
    return el("tr", {}, this.columns.map((column, index) => {
      const content = column.cell ? column.cell(row) : column.value(row);
      const cell = index === 0 && this.act ? el("button", { class: "link", onclick: () => this.act(row) }, content) : content;
      return el("td", { class: column.number ? "number" : column.kind }, cell);
    }));
  }
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}
