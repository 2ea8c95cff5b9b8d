"""The paper's claim of speed, measured: Figure 4, and a training step of every task.

Right half of the figure: one layer against nn.LSTM over batch sizes and lengths. Left half: where the time of a
language model's training step goes. Besides, a training step of each task by its LSTM and its QRNN, in turns on the
same batches; the paper gives the time of an epoch for two of them. Everything is in float32, as the paper's. The
machine should do nothing else, which nothing here can see to: the load before and after is stated.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import machine, measurements, profile, speed_layer
from pipeline.params import TASKS, Params, Speed, Trial
from pipeline.processed import manifest_of

MODELS = ("lstm", "qrnn")
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
    settings = {
        **_plain(asked),
        "recipes": {task: {model: trial.config for model, trial in pair.items()} for task, pair in trials.items()},
        "data": {task: manifest_of(pair["qrnn"])["hash"] for task, pair in trials.items()},
    }
    used = machine.select(device or compute.device, threads or compute.threads, "float32")
    file = measurements.path(scale, used.describe())
    if not again and measurements.stands(file, settings):
        say(f"speed: recorded already: {file}; --again measures anew")
        return file
    begin = time.time()
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
    steps = {task: compare(pair, used, asked.steps, say) for task, pair in trials.items()}
    parts = {model: _parts(trial, used, asked.steps) for model, trial in trials[SPLIT].items()}
    return measurements.write({
        "schema": measurements.SCHEMA,
        "scale": scale,
        "settings": settings,
        "command": f"python -m pipeline speed --figure4 --scale {scale}"
                   f" --device {used.device.type} --threads {used.threads}",
        "code": code,
        "environment": used.describe(),
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

    `ratio` is the time of all steps by the first model over that by the second; `ratios` the spread of single steps'.
    """
    trainings = {model: profile.begun(trial, used) for model, trial in pair.items()}
    running = {model: profile.endless(training) for model, training in trainings.items()}
    times: dict[str, list[float]] = {model: [] for model in pair}
    items: dict[str, list[int]] = {model: [] for model in pair}
    for turn in range(profile.WARM_UP_STEPS + steps):
        for model, steps_of in running.items():
            (taken,), count = profile.timed(steps_of, 1, used.device)
            if turn >= profile.WARM_UP_STEPS:
                times[model].append(taken)
                items[model].append(count)
    ours, theirs = (times[model] for model in reversed(MODELS))
    made = {
        "ms": {model: profile.spread(taken) for model, taken in times.items()},
        "items": items,
        "item": next(iter(trainings.values())).task.item,
        "ratio": sum(theirs) / sum(ours),
        "ratios": profile.spread([b / a for a, b in zip(ours, theirs, strict=True)]),
    }
    name = next(iter(pair.values())).cell.task
    say(f"{name}: a training step, LSTM's time over the QRNN's: {made['ratio']:.2f} over {steps} steps")
    return made


def _parts(trial: Trial, used: machine.Machine, steps: int) -> dict[str, Any]:
    """The profile of a trial's steps, less what the measurement says once for all."""
    found = profile.run(
        trial,
        steps=steps,
        device=used.device.type,
        threads=used.threads,
        precision=used.precision,
        say=lambda _: None,
    )
    kept = ("step_ms", "profiled_step_ms", "parts", "launches_per_step", "device_busy_share", "peak_bytes")
    return {name: found[name] for name in kept}


def _plain(asked: Speed) -> dict[str, Any]:
    """Lists for tuples, so that settings compare equal to their copy read back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(asked).items()}  # fmt: skip
