"""The one training loop: a trial's recipe and data in, a record out. No Ray, MLflow, DVC or datasets is needed."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline import files, ledger, machine, nbsvm, recording
from pipeline.checkpoint import ANEW, Checkpoint, OtherSources, State
from pipeline.errors import UserError
from pipeline.optimise import Optimiser, initialise
from pipeline.params import Compile, NbsvmRecipe, Precision, Recipe, Trial
from pipeline.processed import Processed
from pipeline.progress import Progress, Report, folder, leave_note, remove_note
from pipeline.tasks import task_class
from pipeline.tasks.base import Step

TICK_S = 5.0  # seconds between progress reports within an epoch
CHECKPOINT_S = 10.0  # seconds between checkpoints: one takes as long as a short epoch on a fast device
LOSS_CHECK_STEPS = 50  # steps between looks at the loss: a look waits for the device


class Diverged(Exception):
    """The loss, or a validation or test metric, is not a finite number."""


class OutOfTime(Exception):
    """The next epoch would not end within the time limit; what is done is in the checkpoint."""


def run(
    trial: Trial,
    *,
    device: str = "auto",
    threads: int = 1,
    precision: Precision = "auto",
    compile: Compile = "none",
    report: Report = print,
    time_limit_s: float = math.inf,
    other_sources: bool = False,
) -> ledger.Record:
    """Trains, selects on validation, tests once, and writes the trial's record.

    A diverged trial leaves a record that says so. An unfinished run of the same trial (same recipe, data, seed and
    sources) is taken up from its last checkpoint, see `Training`.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads.
        precision, compile: see `machine.Machine`.
        report: takes each `Progress`; by default it is printed.
        time_limit_s: no epoch is begun that would end later than this many seconds from now; the first is begun in
            any case.
        other_sources: whether to go on from a checkpoint that other sources made; the record names them then.

    Raises:
        OutOfTime: the limit is reached; the same call goes on from the checkpoint.
        UserError: data missing, altered or made with other parameters, no such device, another process at the same
            trial, its checkpoint of another precision or device or (at scale paper) of other sources, or the record
            cannot be written.
    """
    if isinstance(trial.recipe, NbsvmRecipe):
        where = machine.select("cpu", threads)  # scikit-learn's fit, in float64
    else:
        where = machine.select(device, threads, precision, compile)
    with files.alone(folder(trial) / "lock", trial.name):
        try:
            if isinstance(trial.recipe, NbsvmRecipe):
                return nbsvm.run(trial, where, report)
            return _train(trial, where, report, time_limit_s, other_sources)
        finally:
            remove_note(trial)


def _train(
    trial: Trial, where: machine.Machine, report: Report, time_limit_s: float, other_sources: bool
) -> ledger.Record:
    training = Training(trial, where, report, other_sources)
    try:
        training.train(time_limit_s)
        outcome = {"status": "done", "error": None, **training.test()}
    except Diverged as diverged:
        nothing = dict.fromkeys(("valid", "test", "outputs", "states"))
        outcome = {"status": "diverged", "error": str(diverged), **nothing}
    record = training.record(outcome)
    ledger.write(record)
    training.checkpoint.remove()
    return record


class Training:
    """One trial's model, optimiser and state, and the loop over them.

    The first epoch that ends well leaves a checkpoint, and the last; each other one if the checkpoint before it is
    `CHECKPOINT_S` old. One that is begun `anew` takes no notice of a checkpoint.
    """

    def __init__(
        self,
        trial: Trial,
        where: machine.Machine,
        report: Report,
        other_sources: bool = False,
        anew: bool = False,
    ) -> None:
        self.begun = self.ticked = time.monotonic()
        require_products(trial.recipe, where)
        cell, device = trial.cell, where.device
        self.trial, self.recipe, self.machine, self.device, self.report = trial, trial.recipe, where, device, report
        data = Processed.of(trial)
        self.identity = ledger.identity(trial, data.hash)
        self.description = recording.describe(trial, self.identity, data.manifest, where.options)
        self.task = task_class(cell.task)(data, trial.recipe, device, self.tell)
        if not self.task.steps_per_epoch():
            raise UserError(f"{trial.name}: expected training data for at least one batch of {trial.recipe.batch_size}")
        machine.reset_peak(device)
        torch.manual_seed(stream(trial.seed, "init"))
        self.model = self.task.model()
        initialise(self.model, trial.recipe)
        self.task.warm_start(self.model)
        self.model.to(device)
        self.trained = where.compiled(self.model)
        self.optimiser = Optimiser(self.model, trial.recipe)
        # At scale paper records of other sources stand, and days may be in a checkpoint.
        policy: OtherSources = "accepted" if other_sources else "refused" if cell.scale == "paper" else "anew"
        self.checkpoint = Checkpoint(folder(trial), self.identity, policy)
        self.state = State() if anew else self.checkpoint.load(self.model, self.optimiser.optimiser, device)
        self.resumed = self.state.epoch

    def train(self, time_limit_s: float = math.inf) -> None:
        longest_s, saved_at, saved_epoch = 0.0, -math.inf, self.state.epoch
        self.require_machine()
        self.note_revision()
        if not self.resumed and self.checkpoint.manifest.is_file():
            self.tick(1, 0, 1, math.nan, doing="the checkpoint is of another recipe, data or sources; begins anew")
        self.warm_up()
        for epoch in range(self.state.epoch + 1, self.recipe.epochs + 1):
            if self.stale():
                break
            begin = time.monotonic()
            if longest_s and begin - self.begun + longest_s > time_limit_s:
                if self.state.epoch > saved_epoch:
                    self.save()
                raise OutOfTime(f"stopped after epoch {epoch - 1} of {self.recipe.epochs} by the time limit")
            entry = self.epoch(epoch)
            self.select(entry)
            if time.monotonic() - saved_at > CHECKPOINT_S or epoch == self.recipe.epochs or self.stale():
                self.save()
                saved_at, saved_epoch = time.monotonic(), epoch
            steps = self.task.steps_per_epoch()
            self.tick(epoch, steps, steps, entry["train_loss"], entry)
            longest_s = max(longest_s, time.monotonic() - begin)

    def save(self) -> None:
        self.checkpoint.save(self.state, self.model, self.optimiser.optimiser)

    def require_machine(self) -> None:
        """A record's result is of one kind of device and one precision: it ends with those it began with.

        What else of the machine differs from one start to the next is in the record.
        """
        here = f"{self.device.type} in {self.machine.precision}"
        begun = self.state.machine or here
        if begun != here:
            raise UserError(f"{self.checkpoint.manifest}: expected a trial that was begun on {here}, got one begun on "
                            f"{begun}; go on with these, or {ANEW}")  # fmt: skip
        self.state.machine = here
        environment = self.machine.describe()
        if environment not in self.state.environments[-1:]:
            self.state.environments.append(environment)

    def note_revision(self) -> None:
        """Keeps the code that goes on now, unless it is that which came last."""
        code = self.description["code"]
        if code["fingerprint"] not in [last["fingerprint"] for last in self.state.revisions[-1:]]:
            self.state.revisions.append(code)

    def warm_up(self) -> None:
        """One batch forward and backward for nothing, so that compiling kernels is in no epoch's time."""
        self.model.train()
        step = next(self.steps(np.random.default_rng(0)))
        step.loss.backward()
        self.model.zero_grad(set_to_none=True)

    def steps(self, order: np.random.Generator) -> Iterator[Step]:
        """The task's steps, each forward pass in the machine's precision."""
        steps = iter(self.task.steps(self.trained, order))
        while True:
            with self.machine.products():
                step = next(steps, None)
            if step is None:
                return
            yield step

    def descend(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch, each given out after its update, at the learning rate that is set."""
        torch.manual_seed(stream(self.trial.seed, "epoch", epoch))
        self.model.train()
        for step in self.steps(self.order(epoch)):
            self.optimiser.step(step.loss)
            self.machine.relieve()
            yield step

    def order(self, epoch: int) -> np.random.Generator:
        """What shuffles an epoch's batches."""
        return np.random.default_rng(stream(self.trial.seed, "order", epoch))

    def stale(self) -> bool:
        """Whether validation has been no better for as many epochs as the recipe has patience."""
        patience = self.recipe.patience
        return patience is not None and self.state.epoch - self.state.selected_epoch >= patience

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Trains and validates one epoch; returns its entry of the curve."""
        rate = self.optimiser.start_epoch(epoch)
        nats, weight, items = torch.zeros((), dtype=torch.float64, device=self.device), 0, 0
        steps = self.task.steps_per_epoch()
        begin = time.monotonic()
        for number, step in enumerate(self.descend(epoch), start=1):
            nats += step.nats
            weight += step.weight
            items += step.items
            if number % LOSS_CHECK_STEPS == 0 or number == steps:
                require_finite("loss", nats.item(), epoch, number)
            if time.monotonic() - self.ticked > TICK_S:
                self.tick(epoch, number, steps, nats.item() / weight)
        epoch_s = time.monotonic() - begin
        self.model.eval()
        with self.machine.products():
            valid = self.task.validate(self.model)
        for name, value in valid.items():
            require_finite(f"validation {name}", value, epoch, steps)
        return {"epoch": epoch, "train_loss": nats.item() / weight, "learning_rate": rate, "valid": valid,
                "epoch_s": epoch_s, "items_per_s": items / epoch_s, "finished_at": time.time()}  # fmt: skip

    def select(self, entry: dict[str, Any]) -> None:
        """Takes an epoch into the state, and its weights where they are the ones to test so far."""
        state, value = self.state, entry["valid"][self.task.criterion]
        if self.recipe.selection == "last" or self.task.better(value, state.best):
            state.best, state.selected_epoch = value, entry["epoch"]
            state.selected = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        state.epoch = entry["epoch"]
        state.curve.append(entry)
        state.peak_bytes = max(state.peak_bytes, machine.peak_bytes(self.device))

    def test(self) -> dict[str, Any]:
        """What the selected weights make of validation and test data: the only look at the latter."""
        self.model.load_state_dict(self.state.selected)
        self.model.eval()
        epoch = self.state.selected_epoch
        torch.manual_seed(stream(self.trial.seed, "test"))  # of sampled masks
        with self.machine.products():
            test, outputs = self.task.test(self.model)
            states = self.task.states(self.model)
        for name, value in test.items():
            require_finite(f"test {name}", value, epoch, self.task.steps_per_epoch())
        valid = self.state.curve[epoch - 1]["valid"]
        return {"valid": valid, "test": test, "outputs": outputs, "states": states}

    def record(self, outcome: dict[str, Any]) -> ledger.Record:
        state = self.state
        return {
            **self.description,
            **outcome,
            "environment": self.machine.describe(),
            "earlier_environments": state.environments[:-1],
            "earlier_code": state.revisions[:-1],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "curve": state.curve,
            "selected_epoch": state.selected_epoch or None,
            "timing": recording.timing(state.curve, self.task.item),
            "peak_bytes": max(state.peak_bytes, machine.peak_bytes(self.device)),
            "started_at": state.started_at,
            "finished_at": time.time(),
        }

    def tell(self, doing: str) -> None:
        """Tells now and then what is done between the training of epochs, and where the trial stands."""
        if time.monotonic() - self.ticked > TICK_S:
            steps = self.task.steps_per_epoch()
            self.tick(max(self.state.epoch, 1), steps, steps, math.nan, doing=doing)

    def tick(
        self,
        epoch: int,
        step: int,
        steps: int,
        loss: float,
        entry: dict[str, Any] | None = None,
        doing: str | None = None,
    ) -> None:
        """Tells where the trial stands."""
        self.ticked = time.monotonic()
        elapsed = self.ticked - self.begun
        done = max((epoch - 1 + step / steps) - self.resumed, 1e-9)  # 0 where only the test was left to do
        progress = Progress(
            trial=self.trial.name,
            key=self.identity.key,
            epoch=epoch,
            epochs=self.recipe.epochs,
            step=step,
            steps=steps,
            loss=loss,
            loss_unit=self.task.loss_unit,
            elapsed_s=elapsed,
            left_s=elapsed / done * (self.recipe.epochs - self.resumed - done),
            entry=entry,
            doing=doing,
        )
        leave_note(self.trial, progress)
        self.report(progress)


def require_products(recipe: Recipe, where: machine.Machine) -> None:
    """Refuses products that would not be in the precision that the record names.

    Raises:
        UserError: bfloat16 for nn.LSTM on CUDA, whose cuDNN call torch's autocast makes in float16 all the same, or on
            a CPU for which oneDNN has no such LSTM.
    """
    if recipe.family not in ("lstm", "variational") or where.precision != "bfloat16":
        return
    if where.device.type == "cuda":
        raise UserError("precision: expected float32 or tf32 for an LSTM on a CUDA device, got bfloat16, "
                        "which torch's autocast turns into float16 there")  # fmt: skip
    if not machine.bfloat16_lstm_runs():
        raise UserError("precision: expected float32 for an LSTM on this CPU, got bfloat16, for which torch's oneDNN "
                        "has no LSTM here (it wants AVX-512)")  # fmt: skip


def require_finite(what: str, value: Any, epoch: int, step: int) -> None:
    """Raises Diverged for a number that is infinite or none; other values (counts, signatures) pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Diverged(f"{what} {value} at epoch {epoch}, step {step}; expected a finite number")


def stream(seed: int, *names: Any) -> int:
    """A seed for one random stream of a trial, derived from the root seed and the stream's name."""
    return int(files.sha256_text(files.canonical_json([seed, *names]))[:15], 16)
