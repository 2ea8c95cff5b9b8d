"""The projection's counts against torch's own counter and values worked by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qrnn
from pipeline import cost, params, paths
from pipeline.processed import Processed
from pipeline.tasks import task_class
from pipeline.tasks.base import Shape
from qrnn import products
from qrnn.models.classifier import Classifier
from qrnn.models.language_model import LanguageModel
from qrnn.models.seq2seq import Seq2Seq
from qrnn.variational import sampled_masks

STACKS = [
    ("lstm", {}),
    ("variational", {"recurrent_dropout": 0.5, "dropout": 0.5}),
    ("qrnn", {"kernel_size": 2}),
    ("qrnn", {"kernel_size": [4, 2]}),
    ("qrnn", {"kernel_size": [6, 3], "causal": False}),
    ("qrnn", {"kernel_size": 9, "pooling": "ifo"}),
]


def counted(run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """FLOPs forward and backward as torch counts them, every product in an operation that it knows."""
    monkeypatch.setattr(products, "ONEDNN", False)

    def in_place(out: Any, a: Any, b: Any, out_shape: Any = None, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    with torch.backends.mkldnn.flags(enabled=False):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
        with counter:
            loss = run().sum()
        forward = counter.get_total_flops()
        with counter:
            loss.backward()
    return forward, counter.get_total_flops()


def assert_counted(work: cost.Work, run: Any, monkeypatch: pytest.MonkeyPatch, starts: int = 0) -> None:
    """`starts`: FLOPs of the gradient of an LSTM's first state, projected although zeros need none."""
    forward, backward = counted(run, monkeypatch)
    assert forward > 0
    assert (work.forward, work.backward) == (forward, backward + starts)


def lstm_starts(family: str, layers: int) -> int:
    """Of each layer (B, 4m) times (4m, m) with B = 3 and m = 5."""
    return layers * 2 * 3 * 20 * 5 if family == "lstm" else 0


@pytest.mark.parametrize(("family", "options"), STACKS)
def test_language_model_flops(family: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(11, 6, qrnn.make_stack(family, 6, 5, 2, **options))
    tokens = torch.randint(11, (7, 3))
    assert_counted(
        cost.batch_work(model, Shape(3, 7), True), lambda: model(tokens)[0], monkeypatch, lstm_starts(family, 2)
    )


@pytest.mark.parametrize("family", ["lstm", "qrnn"])
def test_dense_classifier_flops(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {} if family == "lstm" else {"kernel_size": 2, "pooling": "fo"}
    # A further input channel freezes an LSTM's padding on the CPU; rows without padding would have it too, so the
    # stack is run without lengths here.
    stack = qrnn.make_stack(family, 6, 5, 3, dense=True, **options)
    x = torch.randn(7, 3, 6, requires_grad=True)
    assert_counted(cost.stack_work(stack, 3, 7, True), lambda: stack(x)[0], monkeypatch, lstm_starts(family, 3))


def test_translation_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"kernel_size": 2, "pooling": "fo"}
    encoder = qrnn.make_stack("qrnn", 6, 5, 2, causal=False, **options)
    decoder = qrnn.make_stack("qrnn", 6, 5, 2, context_size=5, **options)
    model = Seq2Seq(11, None, 6, encoder, decoder)
    source, target, lengths = torch.randint(11, (9, 3)), torch.randint(11, (7, 3)), torch.tensor([9, 4, 6])
    work = cost.batch_work(model, Shape(3, 7, 9), True)
    assert_counted(work, lambda: model(source, lengths, target), monkeypatch)


def test_classifier_reads_only_the_last_step() -> None:
    """By hand, 2 FLOPs a multiply-add: k = 1, so T B n 3m of the layer, and B m 2 of the output."""
    model = Classifier(11, 6, qrnn.make_stack("qrnn", 6, 5, 1, kernel_size=1, pooling="fo"))
    assert cost.batch_work(model, Shape(3, 7), False).forward == 2 * (7 * 3 * 6 * 15 + 3 * 5 * 2)


def test_an_lstm_with_noise_is_launched_step_by_step() -> None:
    """7 steps of 2 layers: fused in evaluation; a loop in training and with sampled masks."""
    stack = qrnn.make_stack("variational", 6, 5, 2, recurrent_dropout=0.5)
    loop, fused = 7 * cost.LOOP_LAUNCHES, 7 * cost.RECURRENT_LAUNCHES
    assert cost.stack_work(stack, 3, 7, True).launches == 2 * 2 * (loop + cost.LSTM_LAUNCHES)
    stack.eval()
    assert cost.stack_work(stack, 3, 7, False).launches == 2 * (fused + cost.LSTM_LAUNCHES)
    with sampled_masks(stack):
        assert cost.stack_work(stack, 3, 7, False).launches == 2 * (loop + cost.LSTM_LAUNCHES)


def test_samples_are_counted_with_the_test(data: Path) -> None:
    """600 masks over 100 tokens: 256 a side at 16 steps (twice), 88 at 46."""
    recipe = params.load().task("sample", "ptb").recipes["lstm"]
    recipe = dataclasses.replace(recipe, family="variational", mc_samples=600)
    task = task_class("ptb")(Processed(paths.processed("sample", "ptb")), recipe, torch.device("meta"))
    found = cost.batches(task).sampled
    expected = [
        Shape(rows, t, filled=rows * t) for rows, steps in ((256, 16), (256, 16), (88, 46)) for t in pieces(100, steps)
    ]
    assert found == expected


def pieces(whole: int, size: int) -> list[int]:
    return [size] * (whole // size) + [whole % size]


def test_weights_and_optimiser_by_hand() -> None:
    """SGD, clipped: 6 of 10 weights are read twice; 10 gradients written and read, clipped (3), weights updated (2)."""
    model = nn.ModuleList([nn.Embedding(2, 2), nn.Linear(2, 2)])
    recipe = params.load().task("paper", "ptb").recipes["lstm"]
    assert cost.weight_work(model, recipe).elements == 2 * 6 + (2 + 3 + 2) * 10
    assert cost.weight_work(model, None).elements == 6


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (cost.Work(forward=cost.PEAK * cost.EFFICIENCY, backward=2 * cost.PEAK * cost.EFFICIENCY, launches=1), 3.0),
        (cost.Work(elements=cost.BANDWIDTH / 2, launches=1), 2.0),
        (cost.Work(elements=1, launches=4 / cost.LAUNCH_S), 4.0),
    ],
    ids=["arithmetic", "memory", "launches"],
)
def test_the_slowest_resource_decides(work: cost.Work, seconds: float) -> None:
    assert work.seconds == pytest.approx(seconds)


def test_table_has_a_line_for_each_cell_and_says_what_it_is(data: Path) -> None:
    wanted = params.load()
    lines = cost.table(wanted, "sample").splitlines()
    cells = [f"{cell.task}/{cell.model}" for cell in wanted.cells("sample")]
    assert lines[0].startswith("PROJECTION, not a measurement")
    assert [line.split()[0] for line in lines[2 : 2 + len(cells)]] == cells
    assert lines[2 + len(cells)].startswith("one seed: ")


def test_measured_minutes_are_of_a_cuda_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(device: str, seconds: float) -> dict:
        where = {"environment": {"device": device}, "timing": {"epoch_s": seconds}, "config": {"epochs": 3}}
        return {"task": "ptb", "model": "qrnn", "status": "done", **where}

    monkeypatch.setattr(cost.ledger, "records", lambda scale: [record("cpu", 600.0), record("cuda", 30.0)])
    assert cost.measured_minutes(params.Cell("paper", "ptb", "qrnn")) == 1.5
    assert cost.measured_minutes(params.Cell("paper", "ptb", "lstm")) is None


def test_missing_data_is_one_line_with_the_command(root: Path) -> None:
    done = cli("cost", "--scale", "sample", QRNN_ROOT=str(root))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{paths.processed('sample', 'imdb')}: expected processed data, found none" in done.stderr
    assert "python -m stages.preprocess --scale sample --task imdb" in done.stderr
