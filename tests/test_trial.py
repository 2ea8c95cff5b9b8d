"""Trials: every cell trains and leaves a record; divergence, interruption, resumption, metrics by hand."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import LSTMS, cli, made_with, skip_without_bfloat16_lstm, write_params, write_ptb

from pipeline import files, grid, ledger, machine, paths, recording, trial
from pipeline import progress as progress_module
from pipeline.errors import UserError
from pipeline.params import Trial, load
from pipeline.processed import Processed
from pipeline.progress import Progress, duration
from pipeline.tasks import task_class
from pipeline.tasks.base import bucketed, padded
from pipeline.tasks.imdb import start_from_vectors
from pipeline.tasks.ptb import Ptb
from pipeline.trial import Training

CELLS = [(cell.task, cell.model) for cell in load(paths.CODE / "params.yaml").cells("sample")]
CPU = torch.device("cpu")


def one(task: str = "ptb", model: str = "qrnn", seed: int = 1):
    return load().trial("sample", task, model, seed)


def lstm_of(family: str):
    """PTB's LSTM as a trial of one of `LSTMS`."""
    made = one(model="lstm")
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, family=family))


def silent(_progress: Progress) -> None:
    pass


def figures(record: dict) -> tuple:
    """What must not depend on when or how often a trial was started."""
    return [(e["train_loss"], e["valid"], e["learning_rate"]) for e in record["curve"]], record["test"], record["key"]


@pytest.mark.parametrize(("task", "model"), CELLS)
def test_every_cell_leaves_a_record(data: Path, task: str, model: str) -> None:
    told: list[Progress] = []
    record = trial.run(one(task, model), device="cpu", report=told.append)
    assert ledger.records("sample") == [record]
    assert record["status"] == "done"
    assert [entry["epoch"] for entry in record["curve"]] == [1, 2]
    assert record["parameters"] > 0
    assert record["peak_bytes"] > 10**6
    assert record["data"]["hash"] == Processed(paths.processed("sample", task)).hash
    assert math.isfinite(record["test"][{"imdb": "accuracy", "ptb": "perplexity", "iwslt": "bleu"}[task]])
    assert [p.epoch for p in told if p.entry] == [1, 2]
    assert "left" in str(told[0])
    assert list(paths.run("sample", task, model, 1).glob("checkpoint*")) == []


@pytest.mark.parametrize(("task", "model"), CELLS)
def test_bfloat16_products_train_weights_in_float32(data: Path, task: str, model: str) -> None:
    skip_without_bfloat16_lstm(one(task, model).recipe.family)
    exact = trial.run(one(task, model), device="cpu", report=silent)
    rounded = trial.run(one(task, model), device="cpu", precision="bfloat16", report=silent)
    losses = [[entry["train_loss"] for entry in record["curve"]] for record in (exact, rounded)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # weights stale by a step, or in bfloat16, learn less
    assert losses[1][1] < losses[1][0]
    assert rounded["environment"]["precision"] == "bfloat16"
    assert rounded["command"].endswith("--device cpu --threads 1 --precision bfloat16")
    assert rounded["key"] == exact["key"]


def test_tf32_is_refused_on_a_cpu(data: Path) -> None:
    with pytest.raises(UserError, match="precision: expected float32 or bfloat16 on a CPU, got tf32"):
        trial.run(one(), device="cpu", precision="tf32", report=silent)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU: apt-get install g++")
@pytest.mark.parametrize(("task", "model"), [("ptb", "qrnn-zoneout"), ("imdb", "lstm"), ("iwslt", "qrnn")])
def test_compiled_steps_are_the_models_own(data: Path, task: str, model: str) -> None:
    """Without noise, since a compiled step draws other random numbers; imdb and iwslt have batches of many shapes."""
    wanted = one(task, model)
    wanted = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, dropout=0.0, zoneout=0.0))
    plain = trial.run(wanted, device="cpu", report=silent)
    torch._dynamo.utils.counters.clear()
    compiled = trial.run(wanted, device="cpu", compile="default", report=silent)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one_epoch, other in zip(plain["curve"], compiled["curve"], strict=True):
        assert other["train_loss"] == pytest.approx(one_epoch["train_loss"], rel=1e-4)
    assert (plain["environment"]["compile"], compiled["environment"]["compile"]) == ("none", "default")
    assert compiled["command"].endswith("--precision float32 --compile default")
    assert compiled["key"] == plain["key"]


def test_patience_ends_training_without_a_better_validation(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(one().recipe, epochs=9, patience=3)
    values = iter([9.0, 8.0, 8.5, 8.0, 8.1, 1.0])
    monkeypatch.setattr(Ptb, "validate", lambda self, model: {"perplexity": next(values)})
    record = trial.run(dataclasses.replace(one(), recipe=recipe), device="cpu", report=silent)
    assert [entry["epoch"] for entry in record["curve"]] == [1, 2, 3, 4, 5]
    assert record["selected_epoch"] == 2


def test_same_seed_same_figures_and_another_seed_others(data: Path) -> None:
    first, again, other = (trial.run(one("imdb", seed=s), device="cpu", report=silent) for s in (1, 1, 2))
    assert figures(first) == figures(again)
    assert figures(first)[0] != figures(other)[0]


def test_an_lstm_in_bfloat16_is_refused_on_cuda_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bfloat16_lstm_runs", lambda: True)
    where = {device: machine.Machine(torch.device(device), 1, "bfloat16") for device in ("cpu", "cuda")}
    for model, device in (("lstm", "cpu"), ("qrnn", "cuda")):
        trial.require_products(one(model=model).recipe, where[device])
    for family in LSTMS:
        with pytest.raises(
            UserError, match="precision: expected float32 or tf32 for an LSTM on a CUDA device, got bfloat16"
        ):
            trial.require_products(lstm_of(family).recipe, where["cuda"])


def test_an_lstm_in_bfloat16_is_refused_where_torch_has_none(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "bfloat16_lstm_runs", lambda: False)
    trial.require_products(one().recipe, machine.Machine(torch.device("cpu"), 1, "bfloat16"))
    for family in LSTMS:
        with pytest.raises(UserError, match="precision: expected float32 for an LSTM on this CPU, got bfloat16"):
            trial.run(lstm_of(family), device="cpu", precision="bfloat16", report=silent)


@pytest.mark.parametrize(("task", "model"), [("imdb", "qrnn"), ("ptb", "qrnn-zoneout"), ("iwslt", "lstm")])
def test_interrupted_trial_goes_on_to_the_same_figures(data: Path, task: str, model: str) -> None:
    whole = trial.run(one(task, model), device="cpu", report=silent)
    ledger.path_of(one(task, model)).unlink()

    def stop(progress: Progress) -> None:
        if progress.entry:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(one(task, model), device="cpu", report=stop)
    told: list[Progress] = []
    resumed = trial.run(one(task, model), device="cpu", report=told.append)
    assert [p.epoch for p in told if p.entry] == [2]
    assert figures(resumed) == figures(whole)


def test_however_short_the_limit_an_epoch_is_trained(data: Path) -> None:
    """Else a trial whose data take longer to load than its limit would never end."""
    told: list[Progress] = []
    for _ in range(2):
        with contextlib.suppress(trial.OutOfTime):
            trial.run(one(), device="cpu", report=told.append, time_limit_s=1e-9)
    assert [p.epoch for p in told if p.entry] == [1, 2]
    assert ledger.read(ledger.path_of(one()))["status"] == "done"


def test_a_checkpoint_half_replaced_by_another_recipes_stops_nothing(data: Path) -> None:
    """Cut off between the tensors and the manifest, which is still the other recipe's and names the same file."""
    folder = interrupted()
    found = json.loads((folder / "checkpoint.json").read_bytes())
    (folder / "checkpoint.json").write_text(json.dumps({**found, "key": "another"}))
    flip_a_bit(folder / found["file"])
    told: list[Progress] = []
    trial.run(one(), device="cpu", report=told.append)
    assert [p.epoch for p in told if p.entry] == [1, 2]


def test_memory_is_looked_after_at_every_step(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all of them, since every batch of texts has another shape."""
    looked = []
    monkeypatch.setattr(machine.Machine, "relieve", lambda _self: looked.append(1))
    training = Training(one(), machine.select("cpu", 1), report=silent)
    taken = list(training.descend(1))
    assert len(looked) == len(taken) == training.task.steps_per_epoch() > 1


def test_checkpoint_of_another_recipe_is_not_taken_up(data: Path, values: dict) -> None:
    """And that is said, for what is thrown away may have taken hours."""
    interrupted()
    changed = yaml.safe_load((data / "params.yaml").read_text())
    changed["ptb"]["sample"]["train"]["dropout"] = 0.25
    write_params(data, changed)
    told: list[Progress] = []
    trial.run(one(), device="cpu", report=told.append)
    assert "the checkpoint is of another recipe, data or sources; begins anew" in str(told[0])
    assert [p.epoch for p in told if p.entry] == [1, 2]


def test_a_trial_ends_in_the_precision_that_it_began_with(data: Path) -> None:
    """The record names one, and its times are of one."""
    interrupted()
    with pytest.raises(UserError, match=r"begun on cpu in bfloat16, got one begun on cpu in float32; .* to start anew"):
        trial.run(one(), device="cpu", precision="bfloat16", report=silent)
    told: list[Progress] = []
    trial.run(one(), device="cpu", report=told.append)
    assert [p.epoch for p in told if p.entry] == [2]


def test_a_record_names_every_machine_that_a_trial_was_on(data: Path) -> None:
    interrupted()
    record = trial.run(one(), device="cpu", threads=2, report=silent)
    assert [environment["threads"] for environment in record["earlier_environments"]] == [1]
    assert record["environment"]["threads"] == 2
    assert trial.run(one(seed=2), device="cpu", report=silent)["earlier_environments"] == []


def test_at_the_papers_scale_a_checkpoint_of_other_sources_is_not_thrown_away(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = dataclasses.replace(one(), cell=dataclasses.replace(one().cell, scale="paper"))
    write_ptb(paths.processed("paper", "ptb"))
    file = interrupted(wanted=wanted) / "checkpoint.json"
    before = file.read_bytes()
    monkeypatch.setattr(ledger, "fingerprint", lambda task: "others")
    with pytest.raises(UserError, match=r"expected a checkpoint of the present sources, got one of others; go on with"):
        trial.run(wanted, device="cpu", report=silent)
    assert file.read_bytes() == before


def test_a_checkpoint_of_other_sources_can_be_gone_on_from_and_the_record_names_them(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the figures of a trial that none but the present sources ran."""
    whole = trial.run(one(), device="cpu", report=silent)
    interrupted()
    before = ledger.fingerprint("ptb")
    monkeypatch.setattr(ledger, "fingerprint", lambda task: "others")
    record = trial.run(one(), device="cpu", report=silent, other_sources=True)
    assert [code["fingerprint"] for code in record["earlier_code"]] == [before]
    assert record["code"]["fingerprint"] == "others"
    assert (whole["earlier_code"], figures(record)) == ([], figures(whole))


def test_a_checkpoint_that_names_no_code_is_of_the_sources_in_its_manifest(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those are that were made before the code was kept."""
    interrupted()
    file = paths.run("sample", "ptb", "qrnn", 1) / "checkpoint.json"
    manifest = json.loads(file.read_bytes())
    tensors = file.parent / manifest["file"]
    content = torch.load(tensors, weights_only=True)
    del content["state"]["revisions"]
    torch.save(content, tensors)
    file.write_text(json.dumps(manifest | {"sha256": files.sha256_file(tensors), "fingerprint": "older"}))
    record = trial.run(one(), device="cpu", report=silent, other_sources=True)
    assert record["earlier_code"] == [{"commit": None, "dirty": None, "fingerprint": "older"}]


def test_a_note_that_cannot_be_written_ends_no_trial(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, durable: bool = True) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(progress_module.files, "replacing", full)
    where = {"trial": "a", "key": "k", "epoch": 1, "epochs": 1, "step": 1, "steps": 1, "loss": 0.0, "loss_unit": ""}
    progress_module.leave_note(one(), Progress(**where, elapsed_s=0.0, left_s=0.0))


def test_a_trial_is_said_to_run_while_it_runs(data: Path) -> None:
    """However it ends: with a record, by Ctrl-C, in a crash. What failed after its last words does not run either."""
    wanted = one("imdb")
    said: list[str | None] = []

    def stop(progress: Progress) -> None:
        said.append(progress_module.running(wanted))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(wanted, device="cpu", report=stop)
    assert said[0]
    assert progress_module.running(wanted) is None
    trial.run(wanted, device="cpu", report=silent)
    assert progress_module.running(wanted) is None
    where = {"trial": wanted.name, "key": "k", "epoch": 1, "epochs": 1, "step": 1, "steps": 1, "loss": 0.0}
    progress_module.leave_note(wanted, Progress(**where, loss_unit="", elapsed_s=0.0, left_s=0.0))
    assert progress_module.running(wanted, since=time.time() - 60)
    assert progress_module.running(wanted, since=time.time() + 60) is None


def test_what_a_killed_process_was_writing_is_removed(data: Path) -> None:
    folder = paths.run("sample", "ptb", "qrnn", 1)
    folder.mkdir(parents=True)
    (folder / ".checkpoint-1.pt.abc").write_bytes(b"half")
    trial.run(one(), device="cpu", report=silent)
    assert list(folder.glob("*checkpoint*")) == list(folder.glob(".checkpoint*")) == []


def test_two_processes_do_not_train_one_trial(data: Path) -> None:
    refused: list[subprocess.CompletedProcess] = []

    def start_another(progress: Progress) -> None:
        if progress.entry and not refused:
            refused.append(cli("trial", "--scale", "sample", "--task", "ptb", "--model", "qrnn", "--seed", "1"))

    record = trial.run(one(), device="cpu", report=start_another)
    assert refused[0].returncode == 2
    assert "expected no other process at ptb/qrnn/seed-1, got one that runs" in refused[0].stderr
    assert ledger.records("sample") == [record]


def test_short_epochs_do_not_each_write_a_checkpoint(data: Path, values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = yaml.safe_load((data / "params.yaml").read_text())
    changed["ptb"]["sample"]["train"]["epochs"] = 5
    write_params(data, changed)
    saved: list[int] = []
    save = trial.Checkpoint.save
    monkeypatch.setattr(trial.Checkpoint, "save", lambda *given: (saved.append(given[1].epoch), save(*given)))
    whole = trial.run(one(), device="cpu", report=silent)
    assert saved == [1, 5]  # the first, and the one that the test needs
    ledger.path_of(one()).unlink()
    monkeypatch.setattr(trial, "CHECKPOINT_S", 0.0)
    trial.run(one(), device="cpu", report=silent)
    assert saved[2:] == [1, 2, 3, 4, 5]
    ledger.path_of(one()).unlink()
    monkeypatch.undo()
    monkeypatch.setenv("QRNN_ROOT", str(data))
    epoch = trial.Training.epoch
    monkeypatch.setattr(trial.Training, "epoch", lambda *given: (time.sleep(0.3), epoch(*given))[1])
    with pytest.raises(trial.OutOfTime):
        trial.run(one(), device="cpu", report=silent, time_limit_s=1.2)
    stopped = json.loads((paths.run("sample", "ptb", "qrnn", 1) / "checkpoint.json").read_bytes())["file"]
    assert stopped != "checkpoint-1.pt"  # what was trained within the limit is not lost
    monkeypatch.undo()
    monkeypatch.setenv("QRNN_ROOT", str(data))
    assert figures(trial.run(one(), device="cpu", report=silent)) == figures(whole)


def test_a_checkpoint_holds_the_weights_once_where_the_last_epoch_is_the_one_to_test(data: Path) -> None:
    folder = interrupted()
    kept = torch.load(folder / "checkpoint-1.pt", weights_only=True)
    assert (kept["state"]["selected_epoch"], kept["state"]["selected"]) == (1, None)


def test_nan_loss_is_recorded_as_diverged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.tasks.ptb import Ptb

    class Broken(Ptb):
        def steps(self, model, order):
            for step in super().steps(model, order):
                yield type(step)(step.loss * math.nan, step.nats * math.nan, step.weight, step.items)

    monkeypatch.setattr(trial, "task_class", lambda name: Broken)
    record = trial.run(one(), device="cpu", report=silent)
    assert record["status"] == "diverged"
    assert record["error"] == "loss nan at epoch 1, step 10; expected a finite number"
    assert record["test"] is None
    assert ledger.standing(one(), ledger.identity(one(), record["data"]["hash"])) is ledger.Standing.DIVERGED


@pytest.mark.parametrize("where", ["validate", "test"])
def test_nan_in_any_metric_is_recorded_as_diverged(data: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    from pipeline.tasks.imdb import Imdb

    metrics = {"accuracy": 50.0, "loss": math.nan, "reviews": 3}
    found = {"validate": metrics, "test": (metrics, "010")}[where]
    broken = type("Broken", (Imdb,), {where: lambda self, model: found})
    monkeypatch.setattr(trial, "task_class", lambda name: broken)
    record = trial.run(one("imdb"), device="cpu", report=silent)
    assert record["status"] == "diverged"
    assert record["error"].startswith(f"{'validation' if where == 'validate' else 'test'} loss nan at epoch")


def test_full_disk_at_the_checkpoint_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, file: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint-1\.pt: the checkpoint could not be written: "):
        trial.run(one(), device="cpu", report=silent)
    left = {p.name for p in paths.run("sample", "ptb", "qrnn", 1).iterdir()}
    assert left <= {"progress.json", "lock"}


def test_data_too_short_for_a_batch_are_named(data: Path) -> None:
    write_ptb(paths.processed("sample", "ptb"), tokens=3)
    with pytest.raises(UserError, match="expected training data for at least one batch of 4"):
        trial.run(one(), device="cpu", report=silent)


def test_evaluation_tells_how_far_it_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TICK_S", 0.0)
    told: list[Progress] = []
    trial.run(one("iwslt"), device="cpu", report=told.append)
    assert any("test: 12/12 sentences translated" in str(progress) for progress in told)


def test_failed_record_is_well_formed(data: Path) -> None:
    ledger.write(recording.failed(one(), "ValueError: boom", {}))
    assert ledger.records("sample")[0]["status"] == "failed"


def test_full_disk_at_the_record_loses_no_training(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: dict) -> None:
        raise UserError("no space")

    monkeypatch.setattr(ledger, "write", full)
    with pytest.raises(UserError, match="no space"):
        trial.run(one(), device="cpu", report=silent)
    monkeypatch.undo()
    monkeypatch.setenv("QRNN_ROOT", str(data))
    told: list[Progress] = []
    assert trial.run(one(), device="cpu", report=told.append)["status"] == "done"
    assert [progress for progress in told if progress.entry] == []


def interrupted(epochs: int = 1, wanted: Trial | None = None) -> Path:
    """The working folder of a trial (PTB's QRNN unless given) that was interrupted at the end of an epoch."""
    wanted = wanted or one()

    def stop(progress: Progress) -> None:
        if progress.entry and progress.epoch == epochs:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(wanted, device="cpu", report=stop)
    return progress_module.folder(wanted)


def test_a_checkpoint_is_tensors_and_a_manifest_that_vouches_for_them(data: Path) -> None:
    folder = interrupted()
    manifest = json.loads((folder / "checkpoint.json").read_bytes())
    tensors = folder / "checkpoint-1.pt"
    assert manifest["file"] == tensors.name
    assert manifest["sha256"] == hashlib.sha256(tensors.read_bytes()).hexdigest()
    folder = interrupted(epochs=2)
    assert sorted(file.name for file in folder.glob("checkpoint*")) == ["checkpoint-2.pt", "checkpoint.json"]


def test_a_stop_before_the_manifest_leaves_the_checkpoint_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trial.run(one(), device="cpu", report=silent)
    ledger.path_of(one()).unlink()
    interrupted()
    write_json = files.write_json

    def stop(path: Path, value: object) -> None:
        if path.name == "checkpoint.json":
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        trial.run(one(), device="cpu", report=silent)
    monkeypatch.undo()
    monkeypatch.setenv("QRNN_ROOT", str(data))
    told: list[Progress] = []
    resumed = trial.run(one(), device="cpu", report=told.append)
    assert [p.epoch for p in told if p.entry] == [2]
    assert figures(resumed) == figures(whole)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: flip_a_bit(folder / "checkpoint-1.pt"), r"checkpoint-1\.pt: expected SHA-256 \w{64}, found"),
        (lambda folder: (folder / "checkpoint-1.pt").unlink(), r"checkpoint-1\.pt: expected a checkpoint \(No such"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), r"checkpoint\.json: expected a checkpoint's"),
        (lambda folder: (folder / "checkpoint.json").write_text("[]"), r"checkpoint\.json: expected a checkpoint's"),
    ],
)
def test_a_broken_checkpoint_is_named(data: Path, harm: Callable[[Path], None], message: str) -> None:
    harm(interrupted())
    with pytest.raises(UserError, match=f"{message}.*; remove checkpoint.json to start anew"):
        trial.run(one(), device="cpu", report=silent)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7799, "2 h 09 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_altered_data_are_refused(data: Path) -> None:
    with (paths.processed("sample", "ptb") / "train.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"train\.npy: expected sha256 .* found .*; run `dvc repro` again"):
        trial.run(one(), device="cpu", report=silent)
    (paths.processed("sample", "ptb") / "train.npy").unlink()
    with pytest.raises(UserError, match="no such file"):
        trial.run(one(), device="cpu", report=silent)


def test_model_learns_what_can_be_learnt(data: Path, values: dict) -> None:
    """A text that repeats itself has perplexity 1; the unigram model of it stays at 3."""
    write_ptb(paths.processed("sample", "ptb"), tokens=2000)
    changed = yaml.safe_load((data / "params.yaml").read_text())
    changed["ptb"]["sample"]["train"].update(epochs=3, learning_rate=0.02, dropout=0.0)
    write_params(data, changed)
    for model in ("qrnn", "lstm"):
        assert trial.run(one(model=model), device="cpu", report=silent)["test"]["perplexity"] < 1.1


def test_ptb_scores_every_token_once_from_the_one_before(data: Path) -> None:
    task = task_class("ptb")(Processed(paths.processed("sample", "ptb")), one().recipe, CPU)
    windows = list(task._windows("test", 1, 7))
    inputs, targets = (torch.cat([w[i] for w in windows]).flatten().tolist() for i in (0, 1))
    text = np.tile([1, 2, 0], 40)[:100].tolist()
    assert targets == text
    assert inputs == [0, *text[:-1]]
    two = torch.cat([w[1] for w in task._windows("test", 2, 7)])
    assert two[:, 1].tolist() == text[50:]


def test_perplexity_is_that_of_the_model_s_own_probabilities(data: Path) -> None:
    """A model whose logits are constant has the perplexity of its softmax, by hand."""
    task = task_class("ptb")(Processed(paths.processed("sample", "ptb")), one().recipe, CPU)
    probabilities = torch.tensor([0.5, 0.25, 0.25])

    def model(inputs: torch.Tensor, state: object) -> tuple:
        return probabilities.log().expand(*inputs.shape, 3), state

    text = np.tile([1, 2, 0], 40)[:100]
    expected = math.exp(-np.log([0.5, 0.25, 0.25])[text].mean())
    assert task.test(model)[0]["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_words_without_a_vector_are_drawn_like_the_vectors() -> None:
    embedding = torch.nn.Embedding(2000, 10)
    vectors = 0.5 + 2.0 * torch.randn(400, 10)
    ids = torch.arange(2, 402)
    start_from_vectors(embedding, ids, vectors)
    assert torch.equal(embedding.weight[ids], vectors)
    assert not embedding.weight[0].any()
    drawn = embedding.weight[402:]
    assert drawn.mean().item() == pytest.approx(vectors.mean().item(), abs=0.1)
    assert drawn.std().item() == pytest.approx(vectors.std().item(), rel=0.05)


def test_zero_vectors_without_word_vectors_are_refused(data: Path) -> None:
    """Nothing would be set to zero, and the trial would have another identity than the same one by default."""
    wanted = one("imdb")
    zero = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, unknown_vectors="zero"))
    message = "unknown_vectors: expected drawn where the data hold no word vectors, got zero"
    with pytest.raises(UserError, match=message):
        trial.run(zero, device="cpu", report=silent)
    assert ledger.records("sample") == []


def imdb_made_with(*absent: str, **changes: object) -> None:
    """Says of the data that they were made with the parameters of params.yaml, but for these."""
    parameters = {**vars(load().task("sample", "imdb").preprocess), **changes}
    made_with(paths.processed("sample", "imdb"), **{k: v for k, v in parameters.items() if k not in absent})


@pytest.mark.parametrize(
    ("absent", "changes", "expected", "got"),
    [
        ((), {"tokeniser": "whitespace"}, "tokeniser moses", "tokeniser whitespace"),
        ((), {"minimum_count": 3, "vocabulary_size": 9}, "minimum_count 1, vocabulary_size null",
         "minimum_count 3, vocabulary_size 9"),
        (("split_seed",), {}, "split_seed 1", "split_seed unknown"),
        ((), {"stemmer": "porter"}, "stemmer unknown", "stemmer porter"),
    ],
)  # fmt: skip
def test_data_made_with_other_parameters_are_of_no_trial(
    data: Path, absent: tuple[str, ...], changes: dict, expected: str, got: str
) -> None:
    wanted = one("imdb")
    imdb_made_with()
    record = trial.run(wanted, device="cpu", report=silent)
    assert grid.standing_of(wanted) is ledger.Standing.DONE
    imdb_made_with(*absent, **changes)
    assert grid.standing_of(wanted) is ledger.Standing.MISSING
    message = (
        f"processed/imdb/manifest.json: expected data made with {expected} (params.yaml), got {got}; "
        "`python -m pipeline repro --scale sample preprocess@imdb` makes them anew"
    )
    for use in (lambda: trial.run(wanted, device="cpu", report=silent), lambda: recording.failed(wanted, "lost", {})):
        with pytest.raises(UserError, match=re.escape(message)):
            use()
    done = cli("trial", "--scale", "sample", "--task", "imdb", "--model", "qrnn", "--seed", "1", QRNN_ROOT=str(data))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert ledger.records("sample") == [record]


def test_data_from_before_a_parameter_are_as_its_default_says(data: Path) -> None:
    imdb_made_with("tokeniser", "corpus_vectors")
    assert trial.run(one("imdb"), device="cpu", report=silent)["status"] == "done"
    assert grid.standing_of(one("imdb")) is ledger.Standing.DONE
    changed = yaml.safe_load((data / "params.yaml").read_text())
    changed["imdb"]["sample"]["preprocess"]["tokeniser"] = "whitespace"
    write_params(data, changed)
    with pytest.raises(UserError, match=r"expected data made with tokeniser whitespace .*, got tokeniser moses"):
        trial.run(one("imdb"), device="cpu", report=silent)


def test_padded_and_bucketed() -> None:
    rows = [np.array([5, 6, 7]), np.array([8])]
    assert padded(rows, before=2).tolist() == [[2, 2], [5, 8], [6, 0], [7, 0]]
    assert padded(rows, after=3).tolist() == [[5, 8], [6, 3], [7, 0], [3, 0]]
    lengths = np.random.default_rng(1).integers(1, 100, size=1003)
    batches = bucketed(lengths, 10, np.random.default_rng(2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
    padding = sum((lengths[b].max() - lengths[b]).sum() for b in batches) / lengths.sum()
    assert padding < 0.05


def test_trial_runs_without_the_heavy_packages(data: Path) -> None:
    """Ray, MLflow, DVC and datasets are made unimportable; so it is on a bare GPU machine."""
    program = (
        "import sys\n"
        "for name in ('ray', 'mlflow', 'dvc', 'datasets', 'sklearn', 'sacremoses'): sys.modules[name] = None\n"
        "sys.argv = 'pipeline trial --scale sample --task iwslt --model qrnn --seed 1'.split()\n"
        "import runpy; runpy.run_module('pipeline', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=paths.CODE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "record: " in done.stdout
    assert len(ledger.records("sample")) == 1


def test_command_line_trial(data: Path) -> None:
    arguments = ("trial", "--scale", "sample", "--task", "ptb", "--model", "qrnn", "--seed", "1")
    first = cli(*arguments)
    assert first.returncode == 0, first.stderr
    assert "epoch 2/2" in first.stdout
    again = cli(*arguments)
    assert "recorded already" in again.stdout
    assert re.search(r"^ptb/qrnn/seed-1 +done", cli("status", "--scale", "sample").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trial --scale huge --task ptb --model qrnn --seed 1", "invalid choice: 'huge'"),
        ("trial --scale sample --task wmt --model qrnn --seed 1", "invalid choice: 'wmt'"),
        ("trial --scale sample --task ptb --model gru --seed 1", "error: unknown model of ptb 'gru'; expected one of"),
        (
            "trial --scale sample --task ptb --model qrnn --seed -1",
            "error: seed: expected a whole number of at least 0",
        ),
        ("trial --scale small --task ptb --model qrnn --seed 1", "manifest.json: no processed data; expected what"),
        ("trial --scale sample --task ptb --model qrnn --seed 1 --device cuda", "expected a CUDA device, found none"),
        ("trial --scale sample --task ptb --model qrnn --seed 1 --threads 0", "at least 1, got '0'"),
        ("import nowhere", "error: nowhere: no such folder"),
    ],
)
def test_bad_command_is_one_line_and_not_0(data: Path, arguments: str, message: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = cli(*arguments.split())
    assert done.returncode == 2
    *usage, last = done.stderr.splitlines()
    assert message in last
    assert not usage or usage[0].startswith("usage: ")  # argparse's own
    assert "Traceback" not in done.stderr
    assert ledger.records() == []


def test_without_data_a_trial_stands_by_its_record(data: Path) -> None:
    trial.run(one(), device="cpu", report=silent)
    shutil.rmtree(paths.processed("sample", "ptb"))
    lines = {line.split()[0]: line for line in grid.table(load(), "sample").splitlines()}
    assert lines["ptb/qrnn/seed-1"].split()[1] == "done"
    assert lines["ptb/qrnn/seed-1"].endswith("(no data at hand: not held against them)")
    assert lines["ptb/lstm/seed-1"].split()[1:] == ["missing"]
    file = ledger.path("sample", "ptb", "qrnn", 1)
    ledger.write({**ledger.read(file), "config": {**one().config, "hidden": 9}})
    assert f"{one().name:<26} missing" in grid.table(load(), "sample").splitlines()
