"""The one training loop: a trial's recipe and data in, a record out. No Ray, MLflow, DVC or datasets is needed.

Every epoch draws its order and its dropout from (seed, epoch), so a trial resumed from its checkpoint goes on as if it
had never stopped.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import files, ledger, machine, paths
from pipeline.optimise import Optimiser, initialise
from pipeline.params import Trial
from pipeline.processed import Processed
from pipeline.tasks import Task, task_class

TICK_S = 5.0  # seconds between progress reports within an epoch
LOSS_CHECK_STEPS = 50  # steps between looks at the loss: a look waits for the device


class Diverged(Exception):
    """The loss is not a finite number."""


@dataclass(frozen=True)
class Progress:
    """What a running trial tells: position, loss so far in the epoch, times in seconds; `entry` closes an epoch.

    `key` is that of the record to come.
    """

    trial: str
    key: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    loss_unit: str
    elapsed_s: float
    left_s: float
    entry: dict[str, Any] | None = None

    def __str__(self) -> str:
        where = f"{self.trial:<24} epoch {self.epoch}/{self.epochs}"
        left = f"{duration(self.elapsed_s)} gone, {duration(self.left_s)} left"
        if self.entry is None:
            return f"{where}  step {self.step}/{self.steps}  loss {self.loss:.3f} {self.loss_unit}  {left}"
        figures = "  ".join(f"{k} {v:.2f}" for k, v in self.entry["valid"].items() if isinstance(v, float))
        return f"{where}  done  loss {self.loss:.3f} {self.loss_unit}  valid: {figures}  {left}"


Report = Callable[[Progress], None]


@dataclass
class State:
    """Where a trial stands between two epochs: what a checkpoint holds besides model and optimiser."""

    epoch: int = 0
    best: float | None = None
    selected_epoch: int = 0
    selected: dict[str, torch.Tensor] | None = None
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    started_at: float = dataclasses.field(default_factory=time.time)
    peak_bytes: int = 0


def run(trial: Trial, *, device: str = "auto", threads: int = 1, report: Report = print) -> ledger.Record:
    """Trains, selects on validation, tests once, and writes the trial's record.

    A diverged trial leaves a record that says so. An unfinished run of the same trial (same recipe, data, seed and
    sources) is taken up from its last finished epoch.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads.
        report: takes each `Progress`; by default it is printed.

    Raises:
        UserError: data missing or altered, no such device, or the record cannot be written.
    """
    cell = trial.cell
    place = machine.select(device, threads)
    data = Processed(paths.processed(cell.scale, cell.task))
    identity = ledger.identity(trial, data.hash)
    task = task_class(cell.task)(data, trial.recipe, place)
    machine.reset_peak(place)
    torch.manual_seed(stream(trial.seed, "init"))
    model = task.model()
    initialise(model, trial.recipe)
    loop = Loop(trial, task, model.to(place), identity, report)
    error = None
    try:
        loop.train()
    except Diverged as diverged:
        error = str(diverged)
    record = loop.record(machine.describe(place, threads), error)
    ledger.write(record)
    loop.close()
    return record


class Loop:
    """One trial's training, epoch by epoch, with a checkpoint after each."""

    def __init__(self, trial: Trial, task: Task, model: nn.Module, identity: ledger.Identity, report: Report) -> None:
        self.trial, self.task, self.model, self.identity, self.report = trial, task, model, identity, report
        self.recipe = trial.recipe
        self.optimiser = Optimiser(model, trial.recipe)
        self.folder = paths.run(trial.cell.scale, trial.cell.task, trial.cell.model, trial.seed)
        self.state = State()
        self.begun = self.ticked = time.monotonic()
        self.resume()

    def train(self) -> None:
        for epoch in range(self.state.epoch + 1, self.recipe.epochs + 1):
            self.epoch(epoch)

    def epoch(self, epoch: int) -> None:
        """Trains one epoch, validates, keeps the weights if they are to be selected, and saves a checkpoint."""
        torch.manual_seed(stream(self.trial.seed, "epoch", epoch))
        order = np.random.default_rng(stream(self.trial.seed, "order", epoch))
        rate = self.optimiser.start_epoch(epoch)
        self.model.train()
        begin = time.monotonic()
        nats, items, weight = torch.zeros((), dtype=torch.float64, device=self.task.device), 0, 0
        steps = self.task.steps_per_epoch()
        for number, step in enumerate(self.task.steps(self.model, order), start=1):
            self.optimiser.step(step.loss)
            nats += step.nats
            items += step.items
            weight += step.weight
            if number % LOSS_CHECK_STEPS == 0 or number == steps:
                self.check(nats, epoch, number)
            if time.monotonic() - self.ticked > TICK_S:
                self.tick(epoch, number, steps, nats.item() / weight)
        epoch_s = time.monotonic() - begin
        self.model.eval()
        valid = self.task.validate(self.model)
        self.check(torch.tensor(valid[self.task.criterion]), epoch, steps, self.task.criterion)
        entry = {"epoch": epoch, "train_loss": nats.item() / weight, "learning_rate": rate, "valid": valid,
                 "epoch_s": epoch_s, "items_per_s": items / epoch_s, "finished_at": time.time()}  # fmt: skip
        self.settle(entry)
        self.tick(epoch, steps, steps, entry["train_loss"], entry)

    def check(self, value: torch.Tensor, epoch: int, step: int, what: str = "loss") -> None:
        if not math.isfinite(value.item()):
            raise Diverged(f"{what} {value.item()} at epoch {epoch}, step {step}; expected a finite number")

    def settle(self, entry: dict[str, Any]) -> None:
        """Takes a finished epoch into the state and saves it."""
        state, value = self.state, entry["valid"][self.task.criterion]
        if self.recipe.selection == "last" or self.task.better(value, state.best):
            state.best, state.selected_epoch = value, entry["epoch"]
            state.selected = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        state.epoch = entry["epoch"]
        state.curve.append(entry)
        state.peak_bytes = max(state.peak_bytes, machine.peak_bytes(self.task.device))
        self.save()

    def record(self, environment: dict[str, Any], error: str | None) -> ledger.Record:
        """The finished trial's record; tests the selected weights unless the trial diverged."""
        trial, state = self.trial, self.state
        valid: dict[str, Any] | None = None
        test: dict[str, Any] | None = None
        if error is None:
            self.model.load_state_dict(state.selected)
            self.model.eval()
            valid = state.curve[state.selected_epoch - 1]["valid"]
            test = self.task.test(self.model)
        return {
            **describe(trial, self.identity, self.task.data.manifest, environment),
            "status": "done" if error is None else "diverged",
            "error": error,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "curve": state.curve,
            "selected_epoch": state.selected_epoch or None,
            "valid": valid,
            "test": test,
            "timing": self.timing(),
            "peak_bytes": max(state.peak_bytes, machine.peak_bytes(self.task.device)),
            "started_at": state.started_at,
            "finished_at": time.time(),
        }

    def timing(self) -> dict[str, Any]:
        """Seconds of training (validation apart). Not exclusive: other trials may have run beside this one."""
        seconds = [entry["epoch_s"] for entry in self.state.curve]
        speeds = [entry["items_per_s"] for entry in self.state.curve]
        epoch_s, items_per_s = (float(np.median(values)) if values else None for values in (seconds, speeds))
        return {"epoch_s": epoch_s, "items_per_s": items_per_s, "item": self.task.item,
                "total_s": sum(seconds), "exclusive": False}  # fmt: skip

    def tick(self, epoch: int, step: int, steps: int, loss: float, entry: dict[str, Any] | None = None) -> None:
        """Reports progress, and leaves it in a file for `pipeline status`."""
        self.ticked = time.monotonic()
        elapsed = self.ticked - self.begun
        done = (epoch - 1 + step / steps) - self.resumed
        left = elapsed / done * (self.recipe.epochs - self.resumed - done)
        progress = Progress(
            self.trial.name,
            self.identity.key,
            epoch,
            self.recipe.epochs,
            step,
            steps,
            loss,
            self.task.loss_unit,
            elapsed,
            left,
            entry,
        )
        note = {"text": str(progress), "updated_at": time.time(), "epoch": epoch, "epochs": self.recipe.epochs}
        files.write_json(self.folder / "progress.json", note)
        self.report(progress)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        content = {
            "identity": dataclasses.asdict(self.identity),
            "state": dataclasses.asdict(self.state),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.optimiser.state_dict(),
        }
        with files.replacing(self.checkpoint) as temporary:
            torch.save(content, temporary)

    def resume(self) -> None:
        """Takes up a checkpoint of this very trial, where there is one."""
        self.resumed = 0
        if not self.checkpoint.is_file():
            return
        content = torch.load(self.checkpoint, map_location=self.task.device, weights_only=True)
        if content["identity"] != dataclasses.asdict(self.identity):
            return
        self.state = State(**content["state"])
        self.resumed = self.state.epoch
        self.model.load_state_dict(content["model"])
        self.optimiser.optimiser.load_state_dict(content["optimiser"])

    def close(self) -> None:
        """Removes what only an unfinished trial needs."""
        self.checkpoint.unlink(missing_ok=True)
        (self.folder / "progress.json").unlink(missing_ok=True)


def describe(
    trial: Trial, identity: ledger.Identity, manifest: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a record that say what was run, on what, and where."""
    cell = trial.cell
    return {
        "schema": ledger.SCHEMA,
        "key": identity.key,
        "scale": cell.scale,
        "task": cell.task,
        "model": cell.model,
        "seed": trial.seed,
        "command": command(trial),
        "config": trial.config,
        "code": {**machine.revision(), "fingerprint": identity.fingerprint},
        "data": {name: manifest.get(name) for name in ("hash", "source", "counts", "floors", "deviations")},
        "environment": environment,
    }


def failed(trial: Trial, error: str, environment: dict[str, Any]) -> ledger.Record:
    """The record of a trial that crashed: it stays in the report, counted and named."""
    data = Processed(paths.processed(trial.cell.scale, trial.cell.task))
    now = time.time()
    nothing = dict.fromkeys(("parameters", "selected_epoch", "valid", "test", "peak_bytes"))
    timing = {"epoch_s": None, "items_per_s": None, "item": None, "total_s": 0.0, "exclusive": False}
    return {**describe(trial, ledger.identity(trial, data.hash), data.manifest, environment), **nothing,
            "status": "failed", "error": error, "curve": [], "timing": timing,
            "started_at": now, "finished_at": now}  # fmt: skip


def command(trial: Trial) -> str:
    cell = trial.cell
    return f"python -m pipeline trial --scale {cell.scale} --task {cell.task} --model {cell.model} --seed {trial.seed}"


def stream(seed: int, *names: Any) -> int:
    """A seed for one random stream of a trial, derived from the root seed and the stream's name."""
    return int(files.sha256_text(files.canonical_json([seed, *names]))[:15], 16)


def duration(seconds: float) -> str:
    """Seconds as a reader likes them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
