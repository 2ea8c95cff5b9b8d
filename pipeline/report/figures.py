"""Figures as SVG, the same bytes for the same records: validation curves, and the paper's Figures 3 and 4."""

import io
from collections.abc import Sequence
from typing import Any

from pipeline import figure3
from pipeline.measurements import MODELS
from pipeline.report import layout as layouts
from pipeline.report.layout import Column, Floor, Layout

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito's, told apart by all eyes
MARKERS = "osD^vP"
SETTINGS = {
    "svg.hashsalt": "qrnn",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Record = dict[str, Any]


def curves(records: Sequence[Record], floors: Sequence[Floor], layout: Layout, labels: dict[str, str]) -> bytes | None:
    """Validation metric by epoch: a line a trial, a colour a model, a ring on the tested epoch, floors dashed.

    Left: all epochs. Right: those from half the earliest tested epoch on, without the floors, where lines differ.

    Args:
        labels: what to call the models, in the order of the table.

    Returns:
        The SVG, or None where no trial has a point.
    """
    lines = [(record, points) for record in records if (points := _points(record, layout.curve))]
    if not lines:
        return None
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 3.6), layout="constrained", facecolor="white")
        whole, late = figure.subplots(1, 2)
        models = list(labels)
        lines.sort(key=lambda line: (models.index(line[0]["model"]), line[0]["seed"]))
        first = min(record["selected_epoch"] or len(points) for record, points in lines) // 2
        styles = [*MODELS, *(model for model in models if model not in MODELS)]  # alike in every task's figure
        for axes, begin in ((whole, 0), (late, first)):
            for record, points in lines:
                shown = [point for point in points if point[0] >= begin]
                _draw(axes, record, shown, styles.index(record["model"]), labels[record["model"]])
        _draw_floors(whole, [f for f in floors if f.path.rpartition(".")[2] == layout.curve])
        _finish(whole, late, layout)
        return _svg(figure)


def speed(measured: dict[str, Any]) -> bytes:
    """Figure 4 of one measurement (as `report.speed.summary` has it).

    Left: parts of a training step of the language model, stacked. Right: inference of one layer by length, a line a
    batch size; the paper's dotted, which are of another device.
    """
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3.4), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_split(left, measured["split"])
        _draw_grid(right, measured["grid"])
        return _svg(figure)


def states(shown: Sequence[tuple[str, Record]]) -> bytes:
    """Figure 3: time downwards, a column a unit, colours by activation; a panel for each label and its record.

    Lines stand where a phrase that the paper's caption quotes has ended.
    """
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.2 + 3.2 * len(shown), 4.6), layout="constrained", facecolor="white")
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        unpacked = [figure3.unpack(record["states"]) for _, record in shown]
        reach = max(1.0, *(float(abs(values).max()) for values in unpacked))  # one colour bar is of all panels
        for axes, (label, record), values in zip(panels, shown, unpacked, strict=True):
            image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            axes.set_title(label, fontsize=9)
            axes.set_xlabel("unit")
            for _, last in record["states"]["spans"].values():
                axes.axhline(last + 0.5, color="black", linewidth=0.8)
        panels[0].set_ylabel("time step")
        spans = shown[0][1]["states"]["spans"]
        panels[-1].secondary_yaxis("right").set_yticks([last for _, last in spans.values()], spans, fontsize=8)
        figure.colorbar(image, ax=panels, location="bottom", shrink=0.5, label="activation")
        return _svg(figure)


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_split(axes: Any, split: dict[str, dict[str, float]]) -> None:
    models = list(split)
    below = [0.0] * len(models)
    for colour, part in zip(COLOURS, split[models[0]], strict=False):
        heights = [split[model][part] for model in models]
        axes.bar([model.upper() for model in models], heights, bottom=below, color=colour, width=0.6, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_ylabel("ms a training step (PTB)")
    axes.set_ylim(0, 1.45 * max(below))  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")


def _draw_grid(axes: Any, cells: Sequence[dict[str, Any]]) -> None:
    for index, rows in enumerate(sorted({cell["batch_size"] for cell in cells})):
        mine = sorted((cell for cell in cells if cell["batch_size"] == rows), key=lambda cell: cell["length"])
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 3}
        lengths = [cell["length"] for cell in mine]
        axes.plot(lengths, [cell["inference"]["ratio"] for cell in mine], "-", **style, label=f"batch {rows}")
        paper = [cell.get("paper_inference_ratio") for cell in mine]
        if None not in paper:
            axes.plot(lengths, paper, ":", **style, linewidth=1, markerfacecolor="none")
    axes.axhline(1, color="#555555", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("length (time steps)")
    axes.set_ylabel("nn.LSTM's time over the QRNN's, inference\n(dotted: the paper's)")
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the legend
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")


def _points(record: Record, metric: str) -> list[tuple[int, float]]:
    return [(entry["epoch"], value) for entry in record["curve"]
            if (value := layouts.number((entry.get("valid") or {}).get(metric))) is not None]  # fmt: skip


def _draw(axes: Any, record: Record, points: list[tuple[int, float]], index: int, label: str) -> None:
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    known = label in axes.get_legend_handles_labels()[1]
    finished = "-" if record["status"] == "done" else ":"
    if not points:
        return
    epochs, values = zip(*points, strict=True)
    axes.plot(epochs, values, finished, **style, markersize=3, linewidth=1.3, label=None if known else label)
    chosen = [point for point in points if point[0] == record["selected_epoch"]]
    if chosen and record["status"] == "done":
        axes.plot(*chosen[0], **style, markersize=8, markerfacecolor="none")


def _draw_floors(axes: Any, floors: Sequence[Floor]) -> None:
    grey = "#555555"
    for value, label in _merged(floors):
        axes.axhline(value, color=grey, linewidth=1, linestyle="--")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (1, value), xytext=(4, 0), color=grey, fontsize=8, **place)


def _merged(floors: Sequence[Floor]) -> list[tuple[float, str]]:
    """Values and labels; floors too close to be told apart in print share one line."""
    merged: list[tuple[float, str]] = []
    for floor in sorted(floors, key=lambda floor: floor.value):
        if merged and floor.value <= 1.05 * merged[-1][0]:
            value, label = merged[-1]
            merged[-1] = (value, f"{label}\n{_name(floor)}")
        else:
            merged.append((floor.value, _name(floor)))
    return merged


def _name(floor: Floor) -> str:
    """A floor's label; one that is of test data, beside curves of validation, says so."""
    return f"{floor.label} (test)" if floor.path.startswith("test.") else floor.label


def _finish(whole: Any, late: Any, layout: Layout) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    for axes in (whole, late):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    whole.set_ylabel(f"validation {Column(layout.curve).metric.label}")
    if layout.curve == "perplexity":
        whole.set_yscale("log")
        whole.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        whole.yaxis.set_major_formatter(ScalarFormatter())
        whole.yaxis.set_minor_formatter(NullFormatter())
    whole.plot([], [], "o", color="#555555", markersize=8, markerfacecolor="none", label="epoch that is tested")
    handles, names = whole.get_legend_handles_labels()
    whole.figure.legend(handles, names, frameon=False, loc="outside upper left", ncols=4, fontsize=8)
