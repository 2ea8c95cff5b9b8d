"""The paper's claim of speed, measured: Figure 4, and a training step of every task.

Right half of the figure: one layer against nn.LSTM over batch sizes and lengths. Left half: where the time of a
language model's training step goes. Besides, a training step of each task by its LSTM and its QRNN; the paper gives the
time of an epoch for two of them. The two sides of every comparison take turns, on the same batches, in float32 as the
paper's. The machine should do nothing else, which nothing here can see to: the load before and after is stated.
"""

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import machine, measurements, profile, speed_layer
from pipeline.measurements import MODELS
from pipeline.params import TASKS, Params, Trial
from pipeline.processed import manifest_of
from pipeline.tasks.base import Step
from pipeline.trial import Training

SPLIT = "ptb"  # the task whose step Figure 4, left, is of


def run(
    params: Params,
    scale: str,
    *,
    device: str | None = None,
    threads: int | None = None,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Measures what the ledger lacks for this machine; returns the measurement's file.

    Args:
        device, threads: as params.yaml says unless given.
        again: measures although it is recorded.

    Raises:
        UserError: processed data missing or altered, no such device, or a layer that fails its gate.
    """
    asked, compute, seed = params.speed(scale), params.compute(scale), params.seeds(scale)[0]
    trials = {task: {model: params.trial(scale, task, model, seed) for model in MODELS} for task in TASKS}
    for pair in trials.values():
        manifest_of(pair["qrnn"])
    settings = measurements.settings(params, scale)
    used = machine.select(device or compute.device, threads or compute.threads, "float32")
    file = measurements.path(scale, used.describe())
    if not again and measurements.stands(file, settings, used.describe()):
        say(f"speed: recorded already: {file}; --again measures anew")
        return file
    begin, load_before = time.time(), os.getloadavg()[0]
    code = {**machine.revision(), "fingerprint": measurements.fingerprint()}
    say("one layer, nn.LSTM's time over the QRNN's in inference, by length:")
    layer = speed_layer.run(
        device=used.device.type,
        threads=used.threads,
        keep_memory=True,
        repeats=asked.repeats,
        batch_sizes=asked.batch_sizes,
        lengths=asked.lengths,
        say=say,
    )
    # Two models in one process: with one trial's share of memory each step would give back what the other has to fault
    # in again.
    both = dataclasses.replace(used, kept_share=2 * used.kept_share)
    steps = {task: compare(pair, both, asked.steps, say) for task, pair in trials.items()}
    parts = split(trials[SPLIT], both, asked.steps)
    return measurements.write({
        "schema": measurements.SCHEMA,
        "scale": scale,
        "settings": settings,
        "command": f"python -m pipeline speed --figure4 --scale {scale}"
                   f" --device {used.device.type} --threads {used.threads}",
        "code": code,
        "environment": used.describe(),
        "load_1min": {"before": load_before, "after": os.getloadavg()[0]},
        "layer": layer,
        "steps": steps,
        "parts": parts,
        "started_at": begin,
        "finished_at": time.time(),
    })  # fmt: skip


def compare(
    pair: dict[str, Trial], used: machine.Machine, steps: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Training steps of a task by both models in turns: ms (median, 10 and 90 %), items of a step, and the ratios.

    `ratio` is the time of all steps by the LSTM over that by the QRNN; `ratios` the spread of single steps', and
    `times_ms` what these took.
    """
    running = _warm(pair, used, steps)
    times: dict[str, list[float]] = {model: [] for model in pair}
    items: dict[str, list[int]] = {model: [] for model in pair}
    for _ in range(steps):
        for model, (_, steps_of) in running.items():
            (taken,), count = profile.timed(steps_of, 1, used.device)
            times[model].append(taken)
            items[model].append(count)
    theirs, ours = (times[model] for model in MODELS)
    ratio = sum(theirs) / sum(ours)
    say(f"{pair['qrnn'].cell.task}: a training step, LSTM's time over the QRNN's: {ratio:.2f} over {steps} steps")
    return {
        "ms": {model: profile.spread(taken) for model, taken in times.items()},
        "items": items,
        "item": running["qrnn"][0].task.item,
        "ratio": ratio,
        "ratios": profile.spread([b / a for a, b in zip(ours, theirs, strict=True)]),
        "times_ms": times,
    }


def split(pair: dict[str, Trial], used: machine.Machine, steps: int) -> dict[str, dict[str, float]]:
    """Where the time of a step goes, by model: mean ms of the profile's parts, the models profiled in turns."""
    running = _warm(pair, used, steps)
    sums: dict[str, dict[str, float]] = {model: defaultdict(float) for model in pair}
    for turn in range(steps + 1):  # the profiler's own first use is not counted
        for model, (training, steps_of) in running.items():
            events = profile.recorded(training, steps_of, 1)
            for name, part in profile.read(events, on_device=used.device.type == "cuda")["parts"].items():
                sums[model][name] += part["mean"] / steps if turn else 0.0
    return {model: dict(parts) for model, parts in sums.items()}


def _warm(pair: dict[str, Trial], used: machine.Machine, steps: int) -> dict[str, tuple[Training, Iterator[Step]]]:
    """Both trainings and their steps; as many as are to be looked at have been taken once, in turns.

    In turns, since what is made for one training gives back the memory that steps of another have left.
    """
    trainings = {model: profile.begun(trial, used) for model, trial in pair.items()}
    for number in (profile.WARM_UP_STEPS + steps + 1, profile.WARM_UP_STEPS):
        running = {model: (training, profile.endless(training)) for model, training in trainings.items()}
        for _ in range(number):
            for _, steps_of in running.values():
                next(steps_of)
    return running
