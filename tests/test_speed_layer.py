"""The comparison of one layer with nn.LSTM, at tiny sizes: what it holds, and that its gate shuts."""

import json
from pathlib import Path

import pytest
import torch
from conftest import cli

from pipeline import speed_layer
from pipeline.errors import UserError
from qrnn import QRNN


@pytest.fixture(autouse=True)
def _settings_put_back():
    threads, matmul, cudnn = (
        torch.get_num_threads(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def tiny(**changes):
    options = {"batch_sizes": (1, 3), "lengths": (2, 5), "units": 8, "others": ((2, 3, 4),), "steps": ((1, 4),)}
    return speed_layer.run(device="cpu", threads=1, repeats=3, say=lambda _: None, **{**options, **changes})


def test_every_cell_is_timed_both_ways_and_the_settings_are_stated():
    result = tiny()
    assert [(cell["batch_size"], cell["length"]) for cell in result["grid"]] == [(1, 2), (1, 5), (3, 2), (3, 5)]
    for timing in (*(cell[mode] for cell in result["grid"] for mode in ("inference", "training")), *result["steps"]):
        assert timing["ratio"] == timing["lstm_s"] / timing["qrnn_s"] > 0
        assert timing["ratio_min"] <= timing["ratio_max"]
        assert [len(timing["times_s"][model]) for model in ("qrnn", "lstm")] == [3, 3]
    environment = result["environment"]
    assert (environment["threads"], environment["precision"]) == (1, "float32")
    assert 0 < max(result["gate"]["error_of_length"].values()) < 1e-5
    printed = speed_layer.table(json.loads(json.dumps(result)))
    assert "T = 2" in printed
    assert "B 2, T 3, 4 units" in printed
    assert "1 threads, float32," in printed


def test_the_gate_shuts_on_a_wrong_layer(monkeypatch):
    """Nothing is timed then."""
    right = QRNN.forward

    def wrong(self, x, *args, **options):
        output, state = right(self, x, *args, **options)
        return (output * 1.01 if x.dtype == torch.float32 else output), state

    monkeypatch.setattr(QRNN, "forward", wrong)
    monkeypatch.setattr(speed_layer, "compare", lambda *_: pytest.fail("timed behind a shut gate"))
    with pytest.raises(UserError, match=r"speed: expected the layer within 0.0001 of its definition, got 0\.\d+"):
        tiny()


def test_the_gate_is_at_the_shapes_that_are_timed(monkeypatch):
    """Kernels may differ by rows and length: the fewest and the most rows at every length, and all other shapes."""
    seen = []
    gate, step = speed_layer.gate, speed_layer.gate_step
    monkeypatch.setattr(speed_layer, "gate", lambda *shape: seen.append(shape[:3]) or gate(*shape))
    monkeypatch.setattr(speed_layer, "gate_step", lambda *shape: seen.append(shape[:2]) or step(*shape))
    result = tiny()
    assert sorted(seen[:4]) == [(1, 2, 8), (1, 5, 8), (3, 2, 8), (3, 5, 8)]
    assert seen[4:] == [(2, 3, 4), (1, 4)]
    assert 0 < result["gate"]["error_of_others"] < 1e-5


@pytest.mark.parametrize("part", ["weight", "step"])
def test_the_gate_shuts_on_a_wrong_gradient_of_the_weights_and_a_wrong_step(monkeypatch, part):
    if part == "step":
        right = QRNN.step
        monkeypatch.setattr(QRNN, "step", lambda self, *given: (right(self, *given)[0] + 0.01, right(self, *given)[1]))
    else:
        forward = QRNN.forward

        def wrong(self, x, *args, **options):
            output, state = forward(self, x, *args, **options)
            weight = self.layers[0].weight
            extra = weight.sum() - weight.sum().detach() if x.dtype == torch.float32 else 0.0
            return output + extra, state  # the same output, another gradient

        monkeypatch.setattr(QRNN, "forward", wrong)
    with pytest.raises(UserError, match=r"speed: expected the layer within 0\.0001 of its definition, got "):
        tiny()


def test_inference_is_timed_in_evaluation_mode_and_training_in_training_mode(monkeypatch):
    """In training mode cuDNN's LSTM keeps what a gradient would need, whether one is wanted or not."""
    modes, forward = set(), torch.nn.LSTM.forward

    def watched(self, *args):
        modes.add((self.training, torch.is_inference_mode_enabled()))
        return forward(self, *args)

    monkeypatch.setattr(torch.nn.LSTM, "forward", watched)
    speed_layer.compare(2, 3, 4, torch.device("cpu"), 1)
    assert modes == {(False, True), (True, False)}


def test_the_two_take_turns_at_being_first():
    order = []
    found = speed_layer._turns(lambda: order.append("q"), lambda: order.append("l"), torch.device("cpu"), 4)
    rounds = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert rounds == ["lq", "ql"] * 3  # two of them untimed
    assert [len(times) for times in found["times_s"].values()] == [4, 4]


def test_the_papers_figures_stand_beside_its_shapes():
    assert all(len(row) == len(speed_layer.LENGTHS) for row in speed_layer.PAPER.values())
    assert tuple(speed_layer.PAPER) == speed_layer.BATCH_SIZES
    cell = speed_layer.compare(8, 64, 320, torch.device("cpu"), 1)
    assert cell["paper_inference_ratio"] == 8.8
    assert "(8.8)" in speed_layer._cell(cell)
    assert "paper_inference_ratio" not in speed_layer.compare(8, 64, 16, torch.device("cpu"), 1)


def test_the_command_wants_its_study_named(tmp_path: Path):
    done = cli("speed", "--quick")
    assert done.returncode == 2
    assert "--layer" in done.stderr
