"""One layer against nn.LSTM (Figure 4, right): inference and training over batch sizes and lengths, in one run.

Times are wall-clock medians in seconds; ratios are nn.LSTM's time over the QRNN's, as in the paper. The two take turns
in one process, each first every other time, after two untimed calls of each. Inference is in evaluation mode: cuDNN
keeps for a gradient what its LSTM computes in training mode. Nothing is timed before the QRNN has passed a comparison
with the float64 definition at every length of the grid with its fewest and its most rows, for which kernels may differ,
and at all other shapes. Axes: T time steps, B batch rows, m units, here as many as inputs.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import files, machine
from pipeline.errors import UserError
from qrnn import QRNN

UNITS = 320
LENGTHS = (32, 64, 128, 256, 512)
BATCH_SIZES = (8, 16, 32, 64, 128, 256)
# Figure 4, right: inference, over cuDNN's LSTM, on a GPU that is not named. Rows are batch sizes, columns lengths.
PAPER = {
    8: (5.5, 8.8, 11.0, 12.4, 16.9),
    16: (5.5, 6.7, 7.8, 8.3, 10.8),
    32: (4.2, 4.5, 4.9, 4.9, 6.4),
    64: (3.0, 3.0, 3.0, 3.0, 3.7),
    128: (2.1, 1.9, 2.0, 2.0, 2.4),
    256: (1.4, 1.4, 1.3, 1.3, 1.3),
}
OTHER_SHAPES = ((20, 105, 640),)  # (B, T, m): the language model's layer (section 3.2)
STEPS = ((1, 640), (20, 640), (8, 320))  # (B, m) of streaming, one time step a call
UNTIMED = 2  # rounds: the first compiles, in the second caches and allocators still fill
TOLERANCE = 1e-4  # of float32 outputs and gradients, against float64, relative to the largest where that is above 1


def run(
    *,
    device: str = "auto",
    threads: int = 1,
    keep_memory: bool = False,
    repeats: int = 7,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    lengths: Sequence[int] = LENGTHS,
    units: int = UNITS,
    others: Sequence[tuple[int, int, int]] = OTHER_SHAPES,
    steps: Sequence[tuple[int, int]] = STEPS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole comparison as a JSON value.

    Raises:
        UserError: the QRNN differs from the definition, or there is no such device.
    """
    selected = machine.select(device, threads, "float32", keep_memory=keep_memory)
    where = selected.device
    load_before = os.getloadavg()[0]
    errors = {length: max(gate(rows, length, units, where) for rows in {min(batch_sizes), max(batch_sizes)})
              for length in lengths}  # fmt: skip
    other_errors = [gate(*shape, where) for shape in others] + [gate_step(*shape, where) for shape in steps]
    machine.reset_peak(where)  # gives back what the definition in float64 took
    cells = []
    for rows in batch_sizes:
        cells += [compare(rows, length, units, where, repeats) for length in lengths]
        say(" ".join(f"{cell['inference']['ratio']:.2f}" for cell in cells[-len(lengths) :]) + f"  (batch {rows})")
    return {
        "title": "Figure 4, right: one layer, nn.LSTM's time over the QRNN's",
        "environment": selected.describe(),
        "load_1min": {"before": load_before, "after": os.getloadavg()[0]},
        "kernel_size": 2,
        "pooling": "fo",
        "repeats": repeats,
        "gate": {"tolerance": TOLERANCE, "error_of_length": errors, "error_of_others": max(other_errors, default=0.0)},
        "grid": cells,
        "others": [compare(*shape, where, repeats) for shape in others],
        "steps": [compare_step(*shape, where, repeats) for shape in steps],
    }


def gate(rows: int, length: int, units: int, device: torch.device) -> float:
    """The largest difference of output and gradients, of input and weights, from the definition in float64.

    Raises:
        UserError: it exceeds the tolerance.
    """
    layer, exact = _with_its_definition(units, device, length)
    x = torch.randn(length, rows, units, device=device)
    upstream = torch.randn_like(x)
    results = []
    for module, dtype in ((layer, torch.float32), (exact, torch.float64)):
        given = x.to(dtype).requires_grad_()
        output, _ = module(given)
        gradients = torch.autograd.grad(output, [given, *module.parameters()], upstream.to(dtype))
        results.append((output.detach(), *gradients))
    return max(_difference(got, expected) for got, expected in zip(*results, strict=True))


def gate_step(rows: int, units: int, device: torch.device) -> float:
    """The largest difference of the outputs of two steps from the definition in float64.

    Raises:
        UserError: it exceeds the tolerance.
    """
    layer, exact = _with_its_definition(units, device, rows)
    x = torch.randn(2, rows, units, device=device)
    with torch.inference_mode():
        first, state = layer.step(x[0])
        second, _ = layer.step(x[1], state)
        return _difference(torch.stack([first, second]), exact(x.double())[0])


def _with_its_definition(units: int, device: torch.device, seed: int) -> tuple[QRNN, QRNN]:
    torch.manual_seed(seed)
    layer = QRNN(units, units).to(device)
    exact = QRNN(units, units, backend="reference").to(device).double()
    exact.load_state_dict(layer.state_dict())
    return layer, exact


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (got.double() - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not difference <= TOLERANCE:
        raise UserError(f"speed: expected the layer within {TOLERANCE} of its definition, got {difference}")
    return difference


def compare(rows: int, length: int, units: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Both layers at one shape, inference and training (forward and backward, weights and input)."""
    qrnn, lstm = QRNN(units, units).to(device), nn.LSTM(units, units).to(device)
    x = torch.randn(length, rows, units, device=device)
    given, upstream = x.clone().requires_grad_(), torch.randn_like(x)

    def inference(module: nn.Module) -> None:
        with torch.inference_mode():
            module(x)

    def training(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        given.grad = None
        module(given)[0].backward(upstream)

    made: dict[str, Any] = {"batch_size": rows, "length": length, "units": units}
    for name, call in (("inference", inference), ("training", training)):
        for module in (qrnn, lstm):
            module.train(name == "training")
        made[name] = _turns(lambda call=call: call(qrnn), lambda call=call: call(lstm), device, repeats)  # type: ignore[misc]
    if units == UNITS and rows in PAPER and length in LENGTHS:
        made["paper_inference_ratio"] = PAPER[rows][LENGTHS.index(length)]
    return made


def compare_step(rows: int, units: int, device: torch.device, repeats: int, calls: int = 50) -> dict[str, Any]:
    """One time step a call, `calls` in a row with the state handed on: QRNN.step against nn.LSTMCell."""
    qrnn, cell = QRNN(units, units).to(device).eval(), nn.LSTMCell(units, units).to(device).eval()
    x = torch.randn(rows, units, device=device)

    def ours() -> None:
        state = None
        with torch.inference_mode():
            for _ in range(calls):
                _, state = qrnn.step(x, state)

    def theirs() -> None:
        state = None
        with torch.inference_mode():
            for _ in range(calls):
                state = cell(x, state)

    return {"batch_size": rows, "units": units, "calls": calls, **_turns(ours, theirs, device, repeats)}


def _turns(qrnn: Callable[[], None], lstm: Callable[[], None], device: torch.device, repeats: int) -> dict[str, Any]:
    times: tuple[list[float], list[float]] = ([], [])
    both = [(qrnn, times[0]), (lstm, times[1])]
    for round_ in range(UNTIMED + repeats):
        for call, kept in both if round_ % 2 else both[::-1]:
            taken = _seconds(call, device)
            if round_ >= UNTIMED:
                kept.append(taken)
    ours, theirs = (statistics.median(one) for one in times)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "qrnn_s": ours,
        "lstm_s": theirs,
        "ratio": theirs / ours,
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "times_s": {"qrnn": times[0], "lstm": times[1]},
    }


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table(result: dict[str, Any]) -> str:
    """The grid in print: inference, training, and the paper's figure for inference, at each shape."""
    environment = result["environment"]
    cells = {(cell["batch_size"], cell["length"]): cell for cell in result["grid"]}
    lengths = sorted({length for _, length in cells})
    lines = [
        result["title"],
        f"{environment['device_name']}, {environment['threads']} threads, {environment['precision']},"
        f" torch {environment['torch']}, freed memory {'kept' if environment['memory_kept'] else 'given back'};"
        f" load {result['load_1min']['before']:.1f} before, {result['load_1min']['after']:.1f} after",
        "inference / training / (paper: inference)",
        "batch  " + "".join(f"{f'T = {length}':>22}" for length in lengths),
    ]
    for rows in sorted({rows for rows, _ in cells}):
        lines.append(f"{rows:<7}" + "".join(f"{_cell(cells[rows, length]):>22}" for length in lengths))
    for other in result["others"]:
        shape = f"B {other['batch_size']}, T {other['length']}, {other['units']} units"
        lines.append(f"{shape}: {_cell(other)}")
    for step in result["steps"]:
        lines.append(f"step, B {step['batch_size']}, {step['units']} units: {step['ratio']:.2f} x nn.LSTMCell")
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> str:
    paper = f" ({cell['paper_inference_ratio']})" if "paper_inference_ratio" in cell else ""
    return f"{cell['inference']['ratio']:.2f} / {cell['training']['ratio']:.2f}{paper}"


def main(*, device: str, threads: int | None, quick: bool, out: Path | None, keep_memory: bool = False) -> None:
    """The command: measures, prints the grid, and writes the JSON where `out` says."""
    less: dict[str, Any] = {"repeats": 3, "batch_sizes": (8, 32), "lengths": (32, 128)} if quick else {}
    say = partial(print, flush=True)
    result = run(device=device, threads=threads or torch.get_num_threads(), keep_memory=keep_memory, say=say, **less)
    print(table(result))
    if out is not None:
        files.write_json(out, result)
        print(f"written: {out}")
