"""The kernels' benchmark: gate, interleaving, figures, command line; on tiny shapes."""

import sys

import pytest
import torch
from conftest import cli, read_json

from pipeline import machine, speed
from pipeline.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """The compiled peer takes half a minute to compile; what it would add is another row."""
    absent = speed.Candidate("torch associative_scan", None, "not installed (test)")
    monkeypatch.setattr(speed, "_associative_scan", lambda: absent)
    monkeypatch.setattr(speed, "COPY_BYTES", {"cpu": 1 << 16})


def test_a_run_gates_times_prints_and_writes(tmp_path):
    lines: list[str] = []
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    result = speed.run(shapes="2x3x5, 4x7x33", quick=True, device="cpu", threads=threads, out=out, say=lines.append)
    assert read_json(out) == result
    assert result["gate"]["torch associative_scan"] == "not installed (test)"
    assert result["gate"]["qrnn numba"].startswith("ok, error ")
    assert [(c["batch"], c["steps"], c["candidate"]) for c in result["cells"]] == [
        (2, 3, "qrnn numba"),
        (2, 3, "qrnn reference"),
        (4, 7, "qrnn numba"),
        (4, 7, "qrnn reference"),
    ]
    cell = result["cells"][2]
    # 4 rows x 7 steps x 33 channels x 4 bytes; 5 elements forward, 8 more backward
    assert (cell["forward"]["bytes"], cell["both"]["bytes"]) == (18480, 48048)
    for part in (cell["forward"], cell["both"]):
        assert part["low_ms"] <= part["median_ms"] <= part["high_ms"]
        assert part["gb_s"] == pytest.approx(part["bytes"] / part["median_ms"] / 1e6)
        assert part["copy_fraction"] == pytest.approx(part["gb_s"] / cell["copy_gb_s"])
        assert part["repeats"] == 3
    assert sum("4x7x33" in line for line in lines) == 2


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    wrong = speed.Candidate("wrong", lambda z, f, o: torch.sigmoid(o) * torch.tanh(z) * torch.sigmoid(f))
    broken = speed.Candidate("broken", lambda z, f, o: 1 / 0)
    monkeypatch.setattr(speed, "candidates", lambda device: [wrong, broken])
    result = speed.run(shapes="1x1x1", quick=True, device="cpu", threads=1, out=None, say=lambda _: None)
    assert result["gate"]["wrong"].startswith("wrong: errors h ")
    assert result["gate"]["broken"] == "cannot run here: ZeroDivisionError: division by zero"
    assert result["cells"] == []


class WrongGradient(torch.autograd.Function):
    """The right output; a gradient of NaN, as of memory that nobody wrote."""

    @staticmethod
    def forward(ctx, z, f, o):
        return speed._pool(z, f, o, "reference")

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.full_like(grad, float("nan")), grad


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (WrongGradient.apply, "df nan"),
        (lambda z, f, o: speed._pool(z, f.detach(), o, "reference"), "df inf"),  # it has none
    ],
)
def test_a_candidate_with_a_wrong_gradient_is_not_timed(function, said):
    assert said in speed.gate(speed.Candidate("x", function), CPU)
    assert speed.gate(speed.Candidate("x", function), CPU).startswith("wrong: errors h ")


def test_a_candidate_that_takes_powers_of_two_alone_passes_the_gate():
    def pool(z, f, o):
        assert z.shape[0] & (z.shape[0] - 1) == 0
        return speed._pool(z, f, o, "reference")

    assert speed.gate(speed.Candidate("x", pool, gate_steps=512), CPU).startswith("ok")
    assert speed.gate(speed.Candidate("x", pool), CPU).startswith("cannot run here: AssertionError")


def test_a_peer_whose_import_fails_is_listed_with_its_reason(monkeypatch):
    class Compiles:
        def __getattr__(self, name):
            raise OSError("no ninja")

    monkeypatch.setitem(sys.modules, "accelerated_scan", Compiles())
    monkeypatch.setitem(sys.modules, "accelerated_scan.warp", Compiles())
    assert speed._accelerated_scan().missing == "cannot run here: OSError: no ninja"


def test_a_shape_that_finds_no_room_is_a_row_with_its_reason():
    setting = speed.Setting(machine.select("cpu", 1, "float32"), [], repeats=1)
    shape = (1 << 20, 1 << 20, 1 << 10)
    (cell,) = speed._measured(shape, [speed.Candidate("x", lambda z, f, o: z)], setting)
    assert cell["forward"]["failure"].startswith("RuntimeError: ")
    assert "RuntimeError" in speed.line(cell, None)


def test_a_candidate_that_fails_at_a_shape_is_a_row_with_its_reason():
    def pool(z, f, o):
        raise MemoryError("too much")

    setting = speed.Setting(machine.select("cpu", 1, "float32"), [(1, 1, 1)], repeats=1)
    (cell,) = speed.measure((1, 1, 1), [speed.Candidate("x", pool)], setting)
    assert cell["forward"] == cell["both"] == {"failure": "MemoryError: too much"}
    assert "too much" in speed.line(cell, None)


def test_a_candidate_without_a_backward_keeps_its_forward_and_its_host_time_may_be_missing(tmp_path, monkeypatch):
    def pool(z, f, o):
        if z.shape == (1, 1, 1):
            raise ValueError("too small")
        if z.requires_grad and z.shape[0] == 5:
            return speed._pool(z, f, o, "reference").detach()  # no gradient
        return speed._pool(z, f, o, "reference")

    monkeypatch.setattr(speed, "candidates", lambda device: [speed.Candidate("x", pool)])
    out = tmp_path / "speed.json"
    speed.run(shapes="2x5x3", quick=True, device="cpu", threads=1, out=out, say=lambda _: None)
    written = read_json(out)
    assert written["host_us"] == {"x": None}
    (cell,) = written["cells"]
    assert cell["forward"]["repeats"] == 3
    assert cell["both"]["failure"].startswith("RuntimeError: ")


def test_a_run_that_is_cut_off_leaves_the_shapes_it_has_measured(tmp_path, monkeypatch):
    measure = speed.measure

    def stops_at_the_second(shape, *others):
        if shape == (1, 2, 3):
            raise KeyboardInterrupt
        return measure(shape, *others)

    monkeypatch.setattr(speed, "measure", stops_at_the_second)
    out = tmp_path / "speed.json"
    with pytest.raises(KeyboardInterrupt):
        speed.run(shapes="2x3x5,1x2x3", quick=True, device="cpu", threads=1, out=out, say=lambda _: None)
    assert {cell["steps"] for cell in read_json(out)["cells"]} == {3}


def test_only_the_candidates_asked_for_are_measured():
    asked = {"quick": True, "device": "cpu", "threads": 1, "out": None, "say": lambda _: None}
    result = speed.run(shapes="2x3x5", only=["qrnn numba"], **asked)
    assert [cell["candidate"] for cell in result["cells"]] == ["qrnn numba"]
    with pytest.raises(UserError, match=r"--candidate: expected one of qrnn numba; qrnn reference; .*, got 'numba'"):
        speed.run(shapes="2x3x5", only=["numba"], **asked)


def test_the_lstm_beside_the_kernels_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(torch.nn, "LSTM", lambda *sizes, device: made.append(sizes) or (lambda z: (z,)))
    function = speed._lstm(CPU).function
    for _ in range(3):
        function(torch.ones(2, 1, 5), None, None)
    assert made == [(5, 5)]


def test_no_shapes_are_not_all_shapes():
    """As of a variable of the shell that is not set."""
    with pytest.raises(UserError, match="--shapes: expected BxTxC"):
        speed.run(shapes="", quick=True, device="cpu", threads=1, out=None)


@pytest.mark.parametrize("text", ["8x32", "0x1x1", "axbxc", "", "8x32x²"])
def test_a_bad_shape_is_named(text):
    with pytest.raises(UserError, match=r"--shapes: expected BxTxC, such as 20x105x640, got"):
        speed.parse(text)


def test_the_papers_thirty_cells_and_the_tasks_shapes_are_listed():
    assert len(speed.PAPER) == 30
    assert {(20, 105, 640), (24, 231, 256), (16, 100, 320)} == set(speed.TASKS)
    assert max(steps for _, steps, _ in speed.LONG) == 65536


def test_the_command_line_names_a_bad_shape():
    done = cli("speed", "--kernels", "--shapes", "8")
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "error: --shapes: expected BxTxC, such as 20x105x640, got '8'",
    )
