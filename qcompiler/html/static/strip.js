// The strip of passes: what each pass did, its run time, and its effect on the numbers.

const EFFECTS = {
  exact: "exact: equal bits",
  reorders: "reorders: the order of floating-point operations",
  lossy: "lossy: quantizes, within an error budget",
};

function drawStrip(strip, current, choose) {
  show(strip, el("ol", {}, stages.map((stage) => el("li", {}, passButton(stage, stage === current, choose)))));
}

function passButton(stage, current, choose) {
  const { counts } = stage.differences;
  const touched = counts.added + counts.removed + counts.changed > 0;
  const facts = [
    stage.spec ?? "the graph as captured",
    stage.effect && EFFECTS[stage.effect],
    touched ? `${counts.added} added, ${counts.removed} removed, ${counts.changed} changed` : stage.index ? "changed nothing" : null,
    plural(stage.size, "operation"),
    stage.seconds === undefined ? null : time(stage.seconds),
  ].filter(Boolean);
  return el("button", {
    class: `pass${touched || !stage.index ? "" : " idle"}`,
    "aria-current": current ? "step" : null,
    "data-stage": stage.name,
    title: facts.join("\n"),
    onclick: () => choose(stage),
  },
    el("span", { class: "pass-name" }, stage.effect && el("i", { class: `effect ${stage.effect}`, "aria-label": stage.effect }), stage.name),
    el("span", { class: "pass-counts" },
      stage.index === 0 ? plural(stage.size, "op") : touched ? changeMarks(counts) : "no change"),
    el("span", { class: "pass-facts" },
      stage.index === 0 ? "as captured" : `${plural(stage.size, "op")}${stage.seconds === undefined ? "" : ` · ${time(stage.seconds)}`}`));
}

function changeMarks(counts) {
  const signs = [["added", "+"], ["removed", "−"], ["changed", "~"]];
  return signs.filter(([fate]) => counts[fate]).map(([fate, sign]) => el("b", { class: `mark-${fate}` }, `${sign}${counts[fate]}`));
}

/** Scrolls the selected pass into view, horizontally only. */
function showInStrip(strip) {
  const button = strip.querySelector("[aria-current]");
  if (!button) return;
  const { left, width } = button.getBoundingClientRect();
  const frame = strip.getBoundingClientRect();
  if (left < frame.left + 24 || left + width > frame.right - 24) strip.scrollLeft += left - frame.left - (frame.width - width) / 2;
}
