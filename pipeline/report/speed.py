"""The report's section on speed: Figure 4 and training steps, from measurements in the ledger."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import measurements
from pipeline.params import TASKS
from pipeline.report import layout as layouts
from pipeline.report import tables
from pipeline.report.text import capital, code, grid, joined, plain

Measurement = dict[str, Any]
Lines = list[str]

RNN, SOFTMAX, OPTIMISER, OTHER = "RNN", "softmax", "optimisation", "the rest"
# Of the profile's parts, forward and backward, what the paper's figure calls by these names; all else is the rest.
GROUPS = {
    "LSTM": RNN,
    "convolution products": RNN,
    "pooling": RNN,
    "output projection and loss": SOFTMAX,
    "optimiser": OPTIMISER,
}
BACKWARD = "backward: "
EPOCH = "timing.epoch_s"
STALE = {
    "sources": "made by other sources than the present ones",
    "settings": "made with other sizes, recipes or data than params.yaml has now",
}


def summary(measurement: Measurement, wanted: dict[str, Any]) -> dict[str, Any]:
    """What `tables.json` keeps of a measurement: where it was made, and every figure that the report prints.

    `wanted` are the settings that a measurement would have now.
    """
    layer = measurement["layer"]
    return {
        "machine": tables.device(measurement),
        "name": measurements.name(measurement["environment"]),
        "environment": measurement["environment"],
        "commit": tables.commit(measurement),
        "differs": measurements.differences(measurement, wanted),
        "command": measurement["command"],
        "finished": datetime.fromtimestamp(measurement["finished_at"], UTC).date().isoformat(),
        "load_1min": measurement["load_1min"],
        "kernel_size": layer["kernel_size"],
        "pooling": layer["pooling"],
        "repeats": layer["repeats"],
        "grid": _figures(layer["grid"]),
        "others": _figures(layer["others"]),
        "streaming": _figures(layer["steps"]),
        "steps": {
            task: {**_figures(measurement["steps"][task]), "paper_epoch_ratio": paper_ratio(task)}
            for task in TASKS
            if task in measurement["steps"]
        },
        "split": {model: split(parts) for model, parts in measurement["parts"].items()},
    }


def _figures(found: Any) -> Any:
    """All that was measured but the times of single calls, which the report prints nowhere."""
    if isinstance(found, dict):
        return {name: _figures(value) for name, value in found.items() if name not in measurements.TIMES}
    return [_figures(value) for value in found] if isinstance(found, list) else found


def paper_ratio(task: str) -> float | None:
    """The LSTM's time of an epoch over the QRNN's, where the paper has both."""
    models = layouts.published()["tables"].get(task, {}).get("models", {})
    lstm, qrnn = (models.get(model, {}).get("figures", {}).get(EPOCH) for model in measurements.MODELS)
    return lstm["value"] / qrnn["value"] if lstm and qrnn else None


def split(parts: dict[str, float]) -> dict[str, float]:
    """Mean ms of a step by the paper's names of its parts; they add up to the step under the profiler."""
    sums = dict.fromkeys((RNN, SOFTMAX, OPTIMISER, OTHER), 0.0)
    for name, ms in parts.items():
        sums[GROUPS.get(name.removeprefix(BACKWARD), OTHER)] += ms
    return sums


def section(
    measured: Sequence[dict[str, Any]], figures: Sequence[str], files: Sequence[str], titles: dict[str, str]
) -> Lines:
    """Lines of the section.

    Args:
        measured: summaries.
        figures, files: of each, the paths of its figure and of its measurement relative to the report.
        titles: of the tasks, by task.
    """
    lines = ["## Figure 4. Speed", ""]
    if not measured:
        return [*lines, "Not measured: `python -m pipeline speed --figure4`.", ""]
    for one, figure, file in zip(measured, figures, files, strict=True):
        lines += [
            f"### {plain(one['machine'])}",
            "",
            *_made(one, file),
            "",
            *_layer(one),
            "",
            f"![speed]({figure})",
            "",
        ]
        lines += [*_steps(one, titles), "", *_split(one), ""]
    return lines


def _made(one: dict[str, Any], file: str) -> Lines:
    environment, load = one["environment"], one["load_1min"]
    stale = "".join(f" {capital(STALE[difference])}." for difference in one["differs"])
    kept = "kept by the process" if environment["memory_kept"] else "given back"
    return [
        f"[One measurement]({file}) of {one['finished']} (UTC), commit {code(one['commit'])}, {code(one['command'])};"
        f" {environment['precision']}, torch {plain(environment['torch'])}, freed memory {kept}; load"
        f" {load['before']:.1f} before and {load['after']:.1f} after.{stale}"
    ]


def _layer(one: dict[str, Any]) -> Lines:
    cells = {(cell["batch_size"], cell["length"]): cell for cell in one["grid"]}
    batch_sizes, lengths = (sorted({shape[axis] for shape in cells}) for axis in (0, 1))
    rows = [[str(rows), *(_cell(cells[rows, length]) for length in lengths)] for rows in batch_sizes]
    return [
        f"One layer of {one['grid'][0]['units']} units and as many inputs, for the QRNN a filter of"
        f" {one['kernel_size']} steps and {one['pooling']}-pooling (the paper names neither): nn.LSTM's time over the"
        " QRNN's, inference / training (and the paper's for inference, over cuDNN's LSTM on a GPU that it does not"
        f" name). Medians of {one['repeats']} calls each, in turns. {_spread(one['grid'])}", "",
        *grid(["Batch", *(f"T = {length}" for length in lengths)], rows), "",
        *(f"- Batch {cell['batch_size']}, T = {cell['length']}, {cell['units']} units: {_cell(cell)}"
          for cell in one["others"]),
        *(f"- One time step a call, batch {cell['batch_size']}, {cell['units']} units: {cell['ratio']:.2f} against"
          f" nn.LSTMCell (single calls {cell['ratio_min']:.2f} to {cell['ratio_max']:.2f})"
          for cell in one["streaming"]),
    ]  # fmt: skip


def _spread(cells: Sequence[dict[str, Any]]) -> str:
    """How far single calls' ratios stray from the medians', and where they turn."""
    found = [cell[mode] for cell in cells for mode in ("inference", "training")]
    strayed = sorted(max(one["ratio_max"] / one["ratio"], one["ratio"] / one["ratio_min"]) - 1 for one in found)
    nine_of_ten = -(-9 * len(strayed) // 10)
    most, all_of_them = (f"{100 * share:.0f} %" for share in (strayed[nine_of_ten - 1], strayed[-1]))
    turned = sum((one["ratio_min"] < 1) != (one["ratio"] < 1) or (one["ratio_max"] > 1) != (one["ratio"] > 1)
                 for one in found)  # fmt: skip
    return (
        f"In 9 of 10 of these {len(found)} comparisons every single call's ratio is within {most} of that of the"
        f" medians, in all within {all_of_them}; in {turned or 'none'} a single call has the other model ahead."
    )


def _cell(cell: dict[str, Any]) -> str:
    paper = f" ({cell['paper_inference_ratio']})" if "paper_inference_ratio" in cell else ""
    return f"{cell['inference']['ratio']:.2f} / {cell['training']['ratio']:.2f}{paper}"


def _steps(one: dict[str, Any], titles: dict[str, str]) -> Lines:
    rows = []
    for task, found in one["steps"].items():
        ratios, paper = found["ratios"], found["paper_epoch_ratio"]
        rows.append([
            plain(titles.get(task, task)), *(_ms(found["ms"][model]) for model in ("lstm", "qrnn")),
            f"{found['ratio']:.2f} ({ratios['p10']:.2f} to {ratios['p90']:.2f})", f"{paper:.1f}" if paper else "—",
        ])  # fmt: skip
    return [
        "A training step by each task's recipe, the two models in turns on the same batches: median, in brackets the 10"
        " and 90 % of steps. The ratio is of all steps' time; the paper's is of the time of an epoch.", "",
        *grid(["Task", "LSTM (ms)", "QRNN (ms)", "LSTM / QRNN, here", "LSTM / QRNN, paper"], rows),
    ]  # fmt: skip


def _ms(found: dict[str, float]) -> str:
    return f"{found['median']:.1f} ({found['p10']:.1f} to {found['p90']:.1f})"


def _split(one: dict[str, Any]) -> Lines:
    lstm, qrnn = (one["split"][model] for model in measurements.MODELS)
    paper = layouts.published()["split"]
    printed = {name: [str(paper[model].get(name, "—")) for model in measurements.MODELS] for name in lstm}
    rows = [[name, f"{lstm[name]:.1f}", f"{qrnn[name]:.1f}", *printed[name]] for name in lstm]
    rows.append(["the step", f"{sum(lstm.values()):.1f}", f"{sum(qrnn.values()):.1f}", "—", "—"])
    return [
        "Where a step of the language model goes (Figure 4, left): mean ms under the profiler, forward and backward,"
        f" the two in turns; the paper's, of cuDNN's LSTM and the QRNN on an {paper['device']},"
        " read off its picture.",
        "",
        *grid(["Part", "LSTM, here", "QRNN, here", "LSTM, paper", "QRNN, paper"], rows),
    ]  # fmt: skip


def sentences(measured: Sequence[dict[str, Any]]) -> Lines:
    """What the measurements say beside the paper's claim."""
    return [sentence for one in measured for sentence in (_reach(one), _epochs(one))]


def _reach(one: dict[str, Any]) -> str:
    low, high = (pick(one["grid"], key=_inference) for pick in (min, max))
    training = sorted(cell["training"]["ratio"] for cell in one["grid"])
    published = sorted(cell["paper_inference_ratio"] for cell in one["grid"] if "paper_inference_ratio" in cell)
    paper = f" The paper has {published[0]} to {published[-1]} at these shapes, on a GPU." if published else ""
    return (
        f"{one['machine']}: a QRNN layer's inference is {_inference(low):.2f} (batch {low['batch_size']}, T ="
        f" {low['length']}) to {_inference(high):.2f} (batch {high['batch_size']}, T = {high['length']}) times as fast"
        f" as nn.LSTM's, its training {training[0]:.2f} to {training[-1]:.2f} times.{paper}"
    )


def _epochs(one: dict[str, Any]) -> str:
    found = joined([f"{task.upper()} {step['ratio']:.2f}" for task, step in one["steps"].items()])
    published = [f"{task.upper()} {step['paper_epoch_ratio']:.1f}" for task, step in one["steps"].items()
                 if step["paper_epoch_ratio"]]  # fmt: skip
    return (
        f"{one['machine']}: the LSTM's training step takes so many times the QRNN's: {found}; in the paper, by epochs,"
        f" {joined(published)}."
    )


def _inference(cell: dict[str, Any]) -> float:
    return cell["inference"]["ratio"]
