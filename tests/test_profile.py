"""The profile of a training step: its parts are the whole, each operator is in the part that it belongs to."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import cli, read_json, skip_without_bfloat16_lstm

from pipeline import ledger, machine, paths, profile
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.tasks.base import Step
from pipeline.trial import Training

CELLS = [(cell.task, cell.model) for cell in load(paths.CODE / "params.yaml").cells("sample")]
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def trial(task: str, model: str) -> Any:
    """A trial of the tiny root; `lstm-variational`, of which scale sample has no cell, is made of its LSTM."""
    if model != "lstm-variational":
        return load().trial("sample", task, model, 1)
    made = load().trial("sample", task, "lstm", 1)
    noise = {"family": "variational", "recurrent_dropout": 0.2, "word_dropout": 0.2, "zoneout": 0.1}
    return dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, **noise))


@pytest.mark.parametrize(("task", "model"), CELLS)
def test_parts_add_up_to_the_step(data: Path, task: str, model: str) -> None:
    """The tiny data have fewer batches than are profiled, so that epochs end within."""
    said: list[str] = []
    result = profile.run(trial(task, model), device="cpu", steps=6, out=data / "out.json", say=said.append)
    parts = result["parts"]
    whole = result["profiled_step_ms"]["mean"]
    assert whole > 0
    assert sum(part["mean"] for part in parts.values()) == pytest.approx(whole, rel=1e-6)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1, rel=1e-6)
    assert all(part["p10"] <= part["median"] <= part["p90"] for part in parts.values())
    layers = {"LSTM"} if model == "lstm" else {"pooling", "convolution products"}
    for name in layers:
        assert parts[name]["median"] > 0
        assert parts[f"backward: {name}"]["median"] > 0
    assert not {"LSTM", "pooling", "convolution products"} - layers & set(parts)
    for name in ("input", "embedding", "output projection and loss", "optimiser", "rest: Python, profiler"):
        assert parts[name]["median"] > 0
    assert [name for name in parts if any(line.startswith(f"{name}  ") for line in said)] == list(parts)
    assert read_json(data / "out.json")["step_ms"] == result["step_ms"]


def test_a_profile_leaves_no_record_and_no_working_folder(data: Path) -> None:
    before = sorted(data.rglob("*"))
    profile.run(trial("ptb", "qrnn"), device="cpu", steps=2, say=lambda _: None)
    assert sorted(data.rglob("*")) == before
    assert ledger.records("sample") == []


OPERATORS = {  # torch's names of operators that can belong to one part alone
    "qrnn::pool_packed": "pooling",
    "qrnn::pool_packed_backward": "backward: pooling",
    "_OffsetProducts": "convolution products",
    "_OffsetProductsBackward": "backward: convolution products",
    "aten::embedding": "embedding",
    "aten::embedding_dense_backward": "backward: embedding",
    "aten::_log_softmax": "output projection and loss",
    "aten::_log_softmax_backward_data": "backward: output projection and loss",
    "aten::mkldnn_rnn_layer": "LSTM",
    "aten::mkldnn_rnn_layer_backward": "backward: LSTM",
    "_Recurrence": "LSTM",
    "_RecurrenceBackward": "backward: LSTM",
    "aten::_softmax": "attention",
    "aten::_softmax_backward_data": "backward: attention",
    "aten::_fused_adam_": "optimiser",
    "aten::_foreach_norm": "optimiser",
}


FAMILIES = {"qrnn": ("qrnn::", "_Offset"), "lstm": ("aten::mkldnn_rnn",), "variational": ("_Recurrence",)}


def profiled(task: str, model: str, precision: Any = "float32") -> list[tuple[str, str]]:
    """(name, part) of every event of two steps."""
    training = Training(trial(task, model), machine.select("cpu", 1, precision), report=lambda _: None)
    events = profile.recorded(training, profile.endless(training), 2)
    made_by = profile.makers(events)
    return [(event.name, profile.part_of(event, made_by)) for event in events]


@pytest.mark.parametrize(("task", "model"), [*CELLS, ("ptb", "lstm-variational")])
def test_every_operator_is_in_its_part(data: Path, task: str, model: str) -> None:
    found = {(name, part) for name, part in profiled(task, model) if name in OPERATORS}
    assert found <= set(OPERATORS.items())
    own = FAMILIES[trial(task, model).recipe.family]
    others = tuple(start for starts in FAMILIES.values() for start in starts if start not in own)
    absent = {name for name in OPERATORS if name.startswith(others)} | (
        set() if task == "iwslt" else {"aten::_softmax", "aten::_softmax_backward_data"}
    )
    assert {name for name, _ in found} == set(OPERATORS) - absent


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_of_a_variational_lstm_are_in_its_part(data: Path, precision: str) -> None:
    """Of the input, and of h by the written gradient or, in bfloat16, by the definition; others are the output's."""
    if precision == "bfloat16":
        skip_without_bfloat16_lstm("variational")
    products = ("aten::mm", "aten::addmm")
    found = {part for name, part in profiled("ptb", "lstm-variational", precision) if name in products}
    output = "output projection and loss"
    assert found - {output, f"backward: {output}"} == {"LSTM", "backward: LSTM"}


def event(name: str, start: float, end: float, parent: Any = None, *, own: float = 0.0, device: float = 0.0,
          node: int = -1, kind: Any = CPU) -> Any:  # fmt: skip
    """One of the profiler's events, microseconds."""
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=time_range, cpu_parent=parent, self_cpu_time_total=own, self_device_time_total=device,
        sequence_nr=node, device_type=kind,
    )  # fmt: skip


def device_events() -> Sequence[Any]:
    """Two steps of 1000 us on a device; backward runs on a thread of its own, whose events have no parent."""
    events = []
    for begin in (0, 2000):
        step = event("part: training step", begin, begin + 1000, own=50)
        taken = event("part: input", begin, begin + 100, step, device=10)
        pooled = event("qrnn::pool_packed", begin + 200, begin + 300, step, device=200, node=7 + begin)
        launch = event("cuLaunchKernel", begin + 210, begin + 220, pooled)
        node = event(f"{profile.NODE}Pool", begin + 400, begin + 500, node=7 + begin)
        inner = event("qrnn::pool_packed_backward", begin + 410, begin + 490, node, device=300)
        again = event("cudaLaunchKernel", begin + 420, begin + 430, inner)
        kernels = [event("kernel", begin + start, begin + end, kind=CUDA)
                   for start, end in ((20, 30), (220, 420), (450, 750), (800, 890))]  # fmt: skip
        update = event("part: optimiser", begin + 600, begin + 700, step)
        adam = event("aten::_fused_adam_", begin + 610, begin + 690, update, device=90)
        spanned = event("part: training step", begin, begin + 1000, kind=CUDA)
        spanned.is_user_annotation = True
        events += [step, taken, pooled, launch, node, inner, again, *kernels, update, adam, spanned]
    return events


def test_parts_on_a_device_by_hand() -> None:
    """10 + 200 + 300 + 90 of 1000 us; 400 are left, in which the device waits."""
    result = profile.read(device_events(), on_device=True)
    means = {name: part["mean"] for name, part in result["parts"].items() if part["mean"]}
    expected = {"input": 0.01, "pooling": 0.2, "backward: pooling": 0.3, "optimiser": 0.09,
                "rest: waiting for the host": 0.4}  # fmt: skip
    assert means == pytest.approx(expected)
    assert list(means) == list(expected)
    assert result["device_busy_share"] == pytest.approx(0.6)
    assert result["launches_per_step"] == 2


def test_kernels_side_by_side_keep_the_device_busy_once() -> None:
    """One from 700 to 850 besides those to 750 and from 800: 50 us more are covered, of 1000."""
    beside = [event("kernel", begin + 700, begin + 850, kind=CUDA) for begin in (0, 2000)]
    result = profile.read([*device_events(), *beside], on_device=True)
    assert result["device_busy_share"] == pytest.approx(0.65)
    assert result["parts"]["rest: waiting for the host"]["mean"] == pytest.approx(0.35)


def test_steps_that_are_looked_at_were_taken_once_before(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning: a checkpoint of the trial, be it of other sources, is none of it."""
    folder = paths.run("sample", "ptb", "qrnn", 1)
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("of others")
    begun, taken = [], []
    descend = Training.descend

    def watched(training: Training, epoch: int) -> Iterator[Step]:
        begun.append(epoch)
        for step in descend(training, epoch):
            taken.append(epoch)
            yield step

    monkeypatch.setattr(Training, "descend", watched)
    profile.run(trial("ptb", "qrnn"), device="cpu", steps=2, say=lambda _: None)
    first = profile.WARM_UP_STEPS + 2 * 2
    assert begun == [1, 1]  # twice the first epoch, which has 10 steps
    assert len(taken) == 2 * first


def test_what_is_between_the_steps_is_in_none() -> None:
    outside = [event("aten::add", 1500, 1600, device=100), event("aten::add", -50, -10, device=100)]
    parts = [
        profile.read(events, on_device=True)["parts"] for events in (device_events(), [*device_events(), *outside])
    ]
    assert parts[0] == parts[1]


def test_timed_steps_are_the_trials_own(data: Path) -> None:
    """PTB has 200 tokens in 4 streams, unrolled by 5: every step has 20."""
    training = Training(trial("ptb", "lstm"), machine.select("cpu", 1), report=lambda _: None)
    times, items = profile.timed(profile.endless(training), 15, training.device)
    assert len(times) == 15
    assert min(times) > 0
    assert items == 300
    assert len(list(itertools.islice(profile.endless(training), 25))) == 25  # of 10 an epoch


def test_a_model_that_has_no_steps_is_refused(data: Path) -> None:
    wanted = load(paths.CODE / "params.yaml").trial("paper", "imdb", "nbsvm-bi", 1)
    with pytest.raises(UserError, match="nbsvm-bi: expected a model that is trained by steps"):
        profile.run(wanted)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("ptb", "gru", "unknown model of ptb 'gru'; expected one of lstm, qrnn, qrnn-zoneout"),
        ("ptb", "qrnn", "no processed data; expected what `dvc repro` makes of this task"),
        ("chess", "qrnn", "argument --task: invalid choice: 'chess'"),
    ],
)
def test_errors_end_in_one_line(root: Path, task: str, model: str, message: str) -> None:
    done = cli("profile", "--scale", "sample", "--task", task, "--model", model, QRNN_ROOT=str(root))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_needs_no_cluster_and_says_nothing_but_the_table(data: Path) -> None:
    done = cli("profile", "--scale", "sample", "--task", "ptb", "--model", "qrnn", "--steps", "2", QRNN_ROOT=str(data))
    assert done.returncode == 0
    assert done.stdout.startswith("ptb/qrnn/seed-1: ")
    assert "pooling  " in done.stdout
    assert done.stderr == ""
