"""Where the time of a training step goes: the trial's own steps, first timed alone, then under torch's profiler.

A part is named by the range or the operator that its work runs under, and the backward pass of a part by the part whose
forward pass made the node of the graph. On a CPU a part's time is what its operators took themselves, so that the parts
and the rest (Python between operators, and the profiler's own work) add up to the step. On a CUDA device it is the time
of the kernels that they launched, and what no kernel covers is the device waiting for the host: where kernels run side
by side, parts and waiting are more than the step. The latter is written and was never run on a device.
"""

import bisect
import itertools
import os
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline import files, machine
from pipeline.errors import UserError
from pipeline.params import NbsvmRecipe, Precision, Trial
from pipeline.tasks.base import Step, padding_share
from pipeline.trial import Training
from qrnn.variational import VariationalLayer

WARM_UP_STEPS = 3  # besides the trial's own warm-up: allocators and caches fill
PREFIX = "part: "  # of the names of our ranges in the profile
STEP = "training step"
PRODUCTS, LSTM, OUTPUT, OPTIMISER = "convolution products", "LSTM", "output projection and loss", "optimiser"
ELEMENTWISE, REST, IDLE = "dropout, masks, copies", "rest: Python, profiler", "rest: waiting for the host"
# Operators that say by the start of their names what they are for, where no range does.
OPERATORS = {
    "_OffsetProducts": PRODUCTS,
    "aten::matmul": PRODUCTS,  # of the context, eq. 7
    "aten::lstm": LSTM,
    "qrnn::pool": "pooling",
    "aten::bmm": "attention",
    "aten::softmax": "attention",
    "aten::cross_entropy_loss": OUTPUT,
    "Optimizer.zero_grad": OPTIMISER,
}
# Submodules of the models that are ranges of their own.
MODULES = {
    "embedding": "embedding",
    "source_embedding": "embedding",
    "target_embedding": "embedding",
    "attended": "attention",
    "direct": "attention",
    "output": OUTPUT,
}
FORWARD = ("input", "embedding", PRODUCTS, LSTM, "pooling", "attention", OUTPUT, ELEMENTWISE)
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")
NODE = "autograd::engine::evaluate_function: "
BACKWARD = "backward: "


def run(
    trial: Trial,
    *,
    steps: int = 20,
    device: str = "auto",
    threads: int = 1,
    precision: Precision = "auto",
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Profiles, prints, and returns what goes to `out` as JSON: times in ms, memory in bytes. Leaves no record.

    Raises:
        UserError: a model that is not trained by steps, data missing or altered, no such device or precision.
    """
    training = begun(trial, machine.select(device, threads, precision))
    deque(itertools.islice(endless(training), WARM_UP_STEPS + 2 * steps), maxlen=0)  # see `begun`
    running = endless(training)
    for _ in range(WARM_UP_STEPS):
        next(running)
    times, items = timed(running, steps, training.device)
    result = {
        "trial": trial.name,
        "environment": training.machine.describe(),
        "revision": machine.revision(),
        "steps": steps,
        "step_ms": spread(times),
        "items_per_s": items / sum(times) * 1e3,
        "item": training.task.item,
        "peak_bytes": machine.peak_bytes(training.device),
        "padding": padding(training),
        **read(recorded(training, running, steps), on_device=training.device.type == "cuda"),
    }
    for line in table(result):
        say(line)
    if out is not None:
        files.write_json(out, result)
        say(f"written: {out}")
    return result


def begun(trial: Trial, used: machine.Machine) -> Training:
    """A trial's training from its beginning, whatever checkpoint there is.

    The steps that are to be looked at must be taken once before: on a CUDA device a batch of another length may be the
    first to need a kernel, which takes seconds to compile; on a CPU the first dozen steps may be slower than all others
    by a quarter (IWSLT's, while memory grows), one model's more than another's. `endless` begins anew with the batches.

    Raises:
        UserError: a model that is not trained by steps, data missing or altered.
    """
    if isinstance(trial.recipe, NbsvmRecipe):
        raise UserError(
            f"{trial.cell.model}: expected a model that is trained by steps, got one that is fitted at once"
        )
    training = Training(trial, used, report=lambda _: None, anew=True)
    training.optimiser.start_epoch(1)
    training.warm_up()
    return training


def endless(training: Training) -> Iterator[Step]:
    """The trial's training steps, epoch after epoch at the first one's learning rate."""
    return itertools.chain.from_iterable(map(training.descend, itertools.count(1)))


def timed(running: Iterator[Step], steps: int, device: torch.device) -> tuple[list[float], int]:
    """(ms of each step, waiting for the device at its end; items of all)."""
    times, items = [], 0
    for _ in range(steps):
        begin = time.perf_counter()
        items += next(running).items
        wait(device)
        times.append((time.perf_counter() - begin) * 1e3)
    return times, items


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def padding(training: Training) -> dict[str, float]:
    """The share of padded positions in the first epoch, in validation and in the test (decoding apart)."""
    task = training.task
    shapes = {
        "training": task.shapes(training.order(1)),
        "validation": task.evaluation_shapes(test=False),
        "test": task.evaluation_shapes(test=True),
    }
    return {name: padding_share(batches) for name, batches in shapes.items()}


def recorded(training: Training, running: Iterator[Step], steps: int) -> Any:
    """The profiler's events of so many further steps."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library tells on stderr when it starts and stops
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if training.device.type == "cuda" else [])]
    with ranges(training) as begin, profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(PREFIX + STEP):
                begin()
                next(running)
                wait(training.device)
    return profiler.events()


@contextmanager
def ranges(training: Training) -> Iterator[Callable[[], None]]:
    """Names parts of the step in the profile. Gives a function to be called where a step, so its input, begins."""
    entered: list[record_function] = []

    def enter(part: str) -> None:
        entered.append(record_function(PREFIX + part))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [training.model.register_forward_pre_hook(leave)]  # the input is made when the model is called
    for name, module in training.model.named_children():
        if name in MODULES:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=MODULES[name]: enter(part)))
            hooks.append(module.register_forward_hook(leave))
    with ExitStack() as undone:
        for hook in hooks:
            undone.callback(hook.remove)
        undone.enter_context(_method_in_range(training.optimiser, "update", OPTIMISER))
        for layer in training.model.modules():
            if isinstance(layer, VariationalLayer):  # runs by torch's operator only where nothing is dropped
                undone.enter_context(_method_in_range(layer, "steps", LSTM))
        yield lambda: enter("input")


@contextmanager
def _method_in_range(owner: Any, name: str, part: str) -> Iterator[None]:
    """Within it, a method of one object runs in a range of its own."""
    method = getattr(owner, name)

    def in_range(*arguments: Any) -> Any:
        with record_function(PREFIX + part):
            return method(*arguments)

    setattr(owner, name, in_range)
    try:
        yield
    finally:
        delattr(owner, name)


def read(events: Any, *, on_device: bool) -> dict[str, Any]:
    """What a profile says of its steps: ms of each part (median, spread, share), kernel launches, busy share."""
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    whole = sorted((e for e in host if e.name == PREFIX + STEP), key=lambda event: event.time_range.start)
    begins = [event.time_range.start for event in whole]
    made_by = makers(host)
    parts: list[dict[str, float]] = [defaultdict(float) for _ in whole]
    launches = 0
    for event in host:
        number = bisect.bisect_right(begins, event.time_range.start) - 1
        if number < 0 or event.time_range.start > whole[number].time_range.end:
            continue
        launches += event.name.startswith(LAUNCHES)
        own_us = event.self_device_time_total if on_device else event.self_cpu_time_total
        parts[number][part_of(event, made_by)] += own_us / 1e3
    steps_ms = [event.time_range.elapsed_us() / 1e3 for event in whole]
    busy_ms = busy(events, whole) if on_device else []
    for step, step_ms, covered in zip(parts, steps_ms, busy_ms, strict=False):
        step[IDLE] = step_ms - covered
    names = {name for step in parts for name in step}
    return {
        "profiled_step_ms": {**spread(steps_ms), "mean": statistics.fmean(steps_ms)},
        "parts": {name: summary([step.get(name, 0.0) for step in parts], steps_ms)
                  for name in sorted(names, key=_place)},
        "launches_per_step": launches / len(whole) if on_device else None,
        "device_busy_share": sum(busy_ms) / sum(steps_ms) if on_device else None,
    }  # fmt: skip


def busy(events: Any, steps: list[Any]) -> list[float]:
    """ms of each step in which the device runs a kernel or copies, however many side by side."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        # What a range on the host spans on the device is an event too.
        if event.device_type != torch.autograd.DeviceType.CPU and not getattr(event, "is_user_annotation", False)
    )
    found = []
    for step in steps:
        covered, until = 0.0, step.time_range.start
        for start, end in spans:
            start, end = max(start, until), min(end, step.time_range.end)
            if end > start:
                covered += end - start
                until = end
        found.append(covered / 1e3)
    return found


def makers(events: list[Any]) -> dict[int, str]:
    """The part of the forward pass that made each node of the backward pass, by the node's number.

    Operators bear the number of the node to be made next, so that the last one before the number changes made it.
    """
    found: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and _backward_node(event) is None:
            found[event.sequence_nr] = forward_part(event)
    return found


def part_of(event: Any, made_by: dict[int, str]) -> str:
    """What an event belongs to: the part it runs under, or the backward pass of the part that made its node."""
    node = _backward_node(event)
    return forward_part(event) if node is None else BACKWARD + made_by.get(node.sequence_nr, ELEMENTWISE)


def forward_part(event: Any) -> str:
    """The outermost of our ranges, or of the operators that we know, around an event."""
    path = _from_the_step_down(event)
    for ancestor in path:
        if ancestor.name.startswith(PREFIX):
            return ancestor.name.removeprefix(PREFIX)
        known = next((part for start, part in OPERATORS.items() if ancestor.name.startswith(start)), None)
        if known is not None:
            return known
    return ELEMENTWISE if path else REST


def _backward_node(event: Any) -> Any:
    """The node of the backward pass that an event belongs to, or None."""
    return next((node for node in _from_the_step_down(event) if node.name.startswith(NODE)), None)


def _from_the_step_down(event: Any) -> list[Any]:
    path: list[Any] = []
    while event is not None and event.name != PREFIX + STEP:
        path.append(event)
        event = event.cpu_parent
    return path[::-1]


def _place(part: str) -> tuple[int, str]:
    order = [*FORWARD, *(BACKWARD + name for name in reversed(FORWARD)), OPTIMISER, REST, IDLE]
    return (order.index(part) if part in order else len(order), part)


def spread(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [10, 90])
    return {"median": statistics.median(values), "p10": float(low), "p90": float(high)}


def summary(ms: list[float], steps_ms: list[float]) -> dict[str, float]:
    """Of one part's ms in each step; medians of parts do not add up to a step's, means and shares do."""
    return {**spread(ms), "mean": statistics.fmean(ms), "share": sum(ms) / sum(steps_ms)}


def table(result: dict[str, Any]) -> list[str]:
    """The profile in print."""
    environment, step, slowed = result["environment"], result["step_ms"], result["profiled_step_ms"]
    lines = [
        f"{result['trial']}: {environment['device_name']}, {environment['threads']} threads, "
        f"{environment['precision']}, torch {environment['torch']}",
        f"step: {step['median']:.2f} ms ({step['p10']:.2f} to {step['p90']:.2f}) over {result['steps']} steps; "
        f"under the profiler, as below, {slowed['median']:.2f} ms",
        f"speed: {result['items_per_s']:,.0f} {result['item']}/s; peak memory {result['peak_bytes'] / 2**20:,.0f} MiB",
    ]
    padded = ", ".join(f"{name} {100 * share:.1f} %" for name, share in result["padding"].items())
    lines.append(f"padding, of all positions computed: {padded}")
    if result["device_busy_share"] is not None:
        lines.append(
            f"device busy {100 * result['device_busy_share']:.0f} % of the step; "
            f"{result['launches_per_step']:.0f} kernel launches a step"
        )
    lines.append(f"{'part':<36}{'median ms':>11}{'10 to 90 %':>21}{'mean ms':>10}{'share':>9}")
    for name, part in result["parts"].items():
        lines.append(_line(name, part, 100 * part["share"]))
    lines.append(_line("the step under the profiler", slowed, 100.0))
    return lines


def _line(name: str, part: dict[str, float], percent: float) -> str:
    low_high = f"{part['p10']:.2f} to {part['p90']:.2f}"
    return f"{name:<36}{part['median']:>11.2f}{low_high:>21}{part['mean']:>10.2f}{percent:>7.1f} %"
