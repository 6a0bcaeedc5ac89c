"""The figures of the granularity study, drawn from its CSV files.

    draw(("minilm", "lm", "sweep"), Path("docs/granularity"))

Lines differ in gray level and marker, and each is labeled, so the figures remain readable in grayscale print.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

THROUGHPUT = "throughput.csv"
"""Written by benchmarks/k_blocks.py: columns k_block, size and tflops. The last figure plots it if it exists."""

BLUE, RED, GREY, DARK = "#1f5fa8", "#c23b22", "#8a8a8a", "#222222"
MARKERS = "osD^vP*X<>"

INT8 = (
    "int8_tensor_static", "int8_tensor", "int8_row", "int8_tile_reference", "int8_channel_reference", "smoothquant_o1",
    "smoothquant_o2", "smoothquant_o3",
)  # fmt: skip
FP8 = (
    "fp8_tensor_static", "fp8_tensor", "fp8_row", "fp8_tile", "fp8_tile_smooth", "fp8_channel_reference",
    "smoothquant_fp8",
)  # fmt: skip
TILES = {"fp8_tile": ("FP8", BLUE), "int8_tile_reference": ("INT8", RED)}

NOISE = 0.002
"""Loss in nats per byte below which an axis is linear: about two standard errors."""

STYLE = {
    "figure.dpi": 130, "font.size": 9, "font.family": "DejaVu Sans", "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left", "lines.linewidth": 1.3,
    "lines.markersize": 5, "svg.hashsalt": "", "legend.frameon": False,
}  # fmt: skip

Rows = list[dict[str, str]]


def draw(parts: Iterable[str], folder: Path) -> list[Path]:
    """Draws the figures for some parts of the study into the folder with the CSV files."""
    figures: dict[str, tuple[str, Callable[[Path], Figure]]] = {
        "minilm": ("minilm.png", sentence_figure),
        "lm": ("outliers.png", outlier_figure),
        "sweep": ("k_block.png", width_figure),
    }
    drawn = []
    for part in parts:
        name, make = figures[part]
        with mpl.rc_context(STYLE):
            make(folder).savefig(folder / name, metadata={"Software": None}, bbox_inches="tight")
        drawn.append(folder / name)
    return drawn


def rows_of(path: Path) -> Rows:
    """The rows of a CSV file, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sentence_figure(folder: Path) -> Figure:
    """Cosine error for each scheme, mean and worst, best first."""
    rows = sorted(rows_of(folder / "minilm.csv"), key=lambda row: -float(row["error_mean"]))
    figure = Figure(figsize=(7.2, 0.26 * len(rows) + 1.3))
    axes = figure.add_subplot()
    for at, row in enumerate(rows):
        mean, worst = float(row["error_mean"]), float(row["error_worst"])
        axes.plot([mean, worst], [at, at], color=GREY, linewidth=1, zorder=1)
        axes.plot(mean, at, "o", color=DARK, zorder=2)
        axes.plot(worst, at, "o", markerfacecolor="white", markeredgecolor=DARK, zorder=2)
        axes.text(1.03, at, f"{float(row['nearest_same']):.1%}", transform=axes.get_yaxis_transform(), va="center")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["scheme"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("1 - cosine similarity to the float model's embedding (log scale)")
    top = rows[-1]
    for key, text, x in (("error_mean", "mean", 0), ("error_worst", "worst sentence", 6)):
        axes.annotate(
            text, (float(top[key]), len(rows) - 1), (x, 8), textcoords="offset points", ha="left" if x else "center"
        )
    axes.text(1.03, 1.0, "nearest neighbor\nis the same", transform=axes.transAxes, va="bottom", fontsize=8)
    return figure


def outlier_figure(folder: Path) -> Figure:
    """The loss increase from quantization against the outlier factor: INT8 beside FP8, on the same axis."""
    rows = rows_of(folder / "lm.csv")
    figure = Figure(figsize=(9.6, 4.6))
    left, right = figure.subplots(1, 2, sharex=True, sharey=True, gridspec_kw={"wspace": 0.75})
    for axes, title, schemes in ((left, "INT8", INT8), (right, "FP8 (e4m3)", FP8)):
        series = {
            scheme: {float(row["factor"]): float(row["increase"]) for row in rows if row["scheme"] == scheme}
            for scheme in schemes
        }
        outlier_panel(axes, {scheme: points for scheme, points in series.items() if points})
        axes.set_title(title)
    left.set_ylabel("loss above the float model's, nats per byte\n(logarithmic above the shaded band, linear in it)")
    figure.canvas.draw()
    for axes in (left, right):
        label_ends(axes)
    return figure


def outlier_panel(axes: Axes, series: Mapping[str, Mapping[float, float]]) -> None:
    """One line per scheme: dashed for schemes that smooth, thick for tile granularity."""
    for index, (scheme, points) in enumerate(series.items()):
        smooth, tile = "smooth" in scheme, "tile" in scheme
        color = BLUE if tile else RED if smooth else DARK if "tensor" in scheme else GREY
        axes.plot(
            list(points), list(points.values()), "--" if smooth else "-", marker=MARKERS[index], color=color,
            linewidth=2 if tile and not smooth else 1.2, label=scheme,
        )  # fmt: skip
    factors = sorted({factor for points in series.values() for factor in points})
    axes.set_xscale("log")
    loss_axis(axes)
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_tick_params(labelleft=True)
    axes.set_xlabel("outlier channels are this many times as large")


def loss_axis(axes: Axes) -> None:
    """A logarithmic axis for losses; linear within the noise, which is shaded."""
    axes.axhspan(-NOISE, NOISE, color="#eeeeee", zorder=0, linewidth=0)
    axes.set_yscale("symlog", linthresh=NOISE, linscale=0.6)
    axes.set_ylim(bottom=-NOISE)
    axes.set_yticks([-0.001, 0, 0.001, 0.01, 0.1, 1, *([10] if axes.get_ylim()[1] > 10 else [])])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_ends(axes: Axes, gap: float = 0.048, place: float = 1.1) -> None:
    """Labels each line after its last point, and moves overlapping labels apart."""
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    to_axes = axes.transAxes.inverted()
    ends = sorted(
        ((*to_axes.transform(axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))), line)
         for line in lines), key=lambda end: end[1],
    )  # fmt: skip
    heights = spread([y for _, y, _ in ends], gap)
    for (x, y, line), height in zip(ends, heights, strict=True):
        axes.annotate(
            line.get_label(), (x, y), (place, height), xycoords="axes fraction", va="center", fontsize=8,
            color=line.get_color(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions near the requested ones, at least `gap` apart; overlapping groups share the displacement."""
    groups: list[list[float]] = []
    for each in wanted:
        groups.append([each])
        while len(groups) > 1 and bottom(groups[-1], gap) < bottom(groups[-2], gap) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def bottom(group: Sequence[float], gap: float) -> float:
    """The lowest position of a group that keeps the center of the group in place."""
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def width_figure(folder: Path) -> Figure:
    """Error against tile width for both models; throughput on a second axis if measured."""
    rows = rows_of(folder / "k_block.csv")
    columns = [key for key in rows[0] if key.startswith("increase_")]
    factors = [column.removeprefix("increase_") for column in columns]
    sizes = list(dict.fromkeys(row["k_block"] for row in rows))
    figure = Figure(figsize=(9.6, 3.9))
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.6})
    for scheme, (name, color) in TILES.items():
        found = [row for row in rows if row["scheme"] == scheme]
        left.plot([float(row["cosine_error"]) for row in found], "o-", color=color, label=name)
        for column, factor, marker in zip(columns, factors, "os", strict=True):
            filled = color if column == columns[0] else "white"
            label = f"{name}, outliers x {factor}" if column != columns[0] else f"{name}, plain"
            bars = [2 * float(row[column.replace("increase", "standard_error")]) for row in found]
            values = [float(row[column]) for row in found]
            right.plot(values, f"{marker}-", color=color, markerfacecolor=filled, label=label)
            right.errorbar(range(len(found)), values, bars, fmt="none", ecolor=color, elinewidth=0.7, capsize=2)
    left.set_ylim(bottom=0)
    left.set_title("all-MiniLM-L6-v2: 1 - mean cosine similarity")
    loss_axis(right)
    right.set_title("language model: loss above float, nats per byte")
    for axes in (left, right):
        axes.set_xticks(range(len(sizes)), ["whole K" if size == "-1" else size for size in sizes])
        axes.set_xlabel("columns of an activation's tile (k_block)")
    figure.text(0.5, -0.06, caption(left, sizes, folder / THROUGHPUT), ha="center", fontsize=8, color=DARK)
    figure.canvas.draw()
    label_ends(left, 0.06, place=1.25 if len(figure.axes) > 2 else 1.06)
    label_ends(right, 0.06, place=1.06)
    return figure


def caption(axes: Axes, sizes: Sequence[str], path: Path) -> str:
    """Draws the throughput on a second axis if it was measured; returns a sentence for the caption."""
    if not path.exists():
        return f"The throughput at each width is not measured yet; {path.name} will add it to the left panel."
    rows = rows_of(path)
    second = axes.twinx()
    second.spines["right"].set_visible(True)
    products = dict.fromkeys(row["size"] for row in rows)
    for size, marker in zip(products, "x+", strict=False):
        measured = {row["k_block"]: float(row["tflops"]) for row in rows if row["size"] == size}
        known = [at for at, width in enumerate(sizes) if width in measured]
        second.plot(known, [measured[sizes[at]] for at in known], f"{marker}:", color=DARK)
    second.set_ylim(bottom=0)
    second.set_ylabel("TFLOP/s (dotted)")
    named = " and ".join(f"{size} ({marker})" for size, marker in zip(products, "x+", strict=False))
    return f"Dotted: throughput of the GPU kernel at that width, M = N = K = {named}."
