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
