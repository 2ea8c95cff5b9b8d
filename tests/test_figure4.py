"""Figure 4 measured and recorded at tiny sizes; what the report makes of a measurement."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import cli, made_with, read_json, write_ptb

from pipeline import figure4, ledger, machine, measurements, paths, profile
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.report import speed, write


@pytest.fixture(autouse=True)
def _settings_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def written() -> dict[str, bytes]:
    """What `measured` has measured, by the file's name: once for all tests."""
    return {}


@pytest.fixture
def measured(data: Path, written: dict[str, bytes]) -> Path:
    """The measurement's file, a test's own."""
    if not written:
        file = figure4.run(load(), "sample", device="cpu", threads=1, say=lambda _: None)
        written[file.name] = file.read_bytes()
        return file
    ((name, content),) = written.items()
    file = paths.ledger("sample") / "speed" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def test_both_halves_and_every_task_are_measured(measured: Path) -> None:
    found = measurements.read(measured)
    assert measured.parent == paths.ledger("sample") / "speed"
    assert measured.name.endswith("-threads-1.json")
    assert [(cell["batch_size"], cell["length"]) for cell in found["layer"]["grid"]] == [(1, 2), (1, 10)]
    assert found["environment"]["precision"] == "float32"
    assert set(found["steps"]) == {"imdb", "ptb", "iwslt"}
    for step in found["steps"].values():
        assert step["ratio"] > 0
        assert len(step["items"]["lstm"]) == 2
        assert step["items"]["lstm"] == step["items"]["qrnn"]  # the same batches
    assert {name for name in found["parts"]["qrnn"] if "LSTM" in name} == set()
    assert found["parts"]["lstm"]["LSTM"] > 0
    assert found["parts"]["qrnn"]["pooling"] > 0
    assert set(found["load_1min"]) == {"before", "after"}


def test_ratios_are_of_the_lstm_over_the_qrnn(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that gives the LSTM 3, 6 and the QRNN 1, 4 ms, by hand: 9 / 5 in all, 3 and 1.5 by step."""
    times = iter([3.0, 1.0, 6.0, 4.0])
    monkeypatch.setattr(profile, "timed", lambda *_: ([next(times)], 7))
    pair = {model: load().trial("sample", "ptb", model, 1) for model in figure4.MODELS}
    found = figure4.compare(pair, machine.select("cpu", 1, "float32"), 2, say=lambda _: None)
    assert found["ratio"] == pytest.approx(1.8)
    assert found["ratios"]["median"] == pytest.approx(2.25)
    assert found["ms"]["lstm"]["median"] == 4.5
    assert found["ms"]["qrnn"]["median"] == 2.5
    assert found["times_ms"] == {"lstm": [3.0, 6.0], "qrnn": [1.0, 4.0]}


def test_both_models_are_warmed_up_in_turns(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After both are made: to make one gives back the memory that steps of the other have left."""
    done = []
    begun, endless = profile.begun, profile.endless
    monkeypatch.setattr(profile, "begun", lambda trial, used: done.append("made") or begun(trial, used))

    def watched(training):
        for step in endless(training):
            done.append(training.trial.cell.model)
            yield step

    monkeypatch.setattr(profile, "endless", watched)
    pair = {model: load().trial("sample", "ptb", model, 1) for model in figure4.MODELS}
    figure4._warm(pair, machine.select("cpu", 1, "float32"), 2)
    assert done == ["made", "made", *["lstm", "qrnn"] * (2 * profile.WARM_UP_STEPS + 3)]


def test_what_stands_is_not_measured_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = measured.read_bytes()
    said: list[str] = []
    assert figure4.run(load(), "sample", device="cpu", threads=1, say=said.append) == measured
    assert said == [f"speed: recorded already: {measured}; --again measures anew"]
    assert measured.read_bytes() == before

    found = measurements.read(measured)
    settings, here = found["settings"], found["environment"]
    assert measurements.stands(measured, settings, here)
    assert not measurements.stands(measured, {**settings, "repeats": 3}, here)
    assert not measurements.stands(measured, settings, {**here, "hostname": "another"})
    assert not measurements.stands(measured, settings, {**here, "torch": "3.0"})
    monkeypatch.setattr(measurements, "fingerprint", lambda: "other sources")
    assert not measurements.stands(measured, settings, here)
    at_paper = measurements.write({**found, "scale": "paper"})
    assert measurements.stands(at_paper, settings, here)
    assert not measurements.stands(at_paper, {**settings, "seed": 7}, here)


def test_by_the_command_it_is_measured_again_if_asked(data: Path) -> None:
    done = cli("speed", "--figure4", "--scale", "sample", "--device", "cpu", QRNN_ROOT=str(data))
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.splitlines()[-1].removeprefix("measurement: "))
    first = measurements.read(file)["finished_at"]
    assert "--device cpu --threads 1" in measurements.read(file)["command"]
    cli("speed", "--figure4", "--scale", "sample", "--device", "cpu", "--again", QRNN_ROOT=str(data))
    assert measurements.read(file)["finished_at"] > first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--figure4", "--quick", "--out", "x.json"), "--figure4: {}, got --quick, --out"),
        (("--layer", "--shapes", "1x1x1"), "--layer: {}, got --shapes"),
        (("--layer", "--again"), "--kernels and --layer: {}, got --again"),
    ],
)
def test_options_of_another_study_are_refused(options: tuple[str, ...], message: str) -> None:
    done = cli("speed", *options)
    expected = message.format("expected none of its other studies' options")
    assert (done.returncode, done.stderr.strip()) == (2, f"error: speed: {expected}")


def test_other_data_are_measured_anew(measured: Path) -> None:
    settings = measurements.read(measured)["settings"]
    write_ptb(paths.processed("sample", "ptb"), tokens=300)
    again = figure4.run(load(), "sample", device="cpu", threads=1, say=lambda _: None)
    assert measurements.read(again)["settings"]["data"]["ptb"] != settings["data"]["ptb"]


def test_nothing_is_timed_before_all_data_are_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_with(paths.processed("sample", "iwslt"), max_characters=1)
    monkeypatch.setattr(figure4.speed_layer, "run", lambda **_: pytest.fail("timed"))
    with pytest.raises(UserError, match="iwslt"):
        figure4.run(load(), "sample", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "large"}, "expected a scale of sample, small, paper, got 'large'"),
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"started_at": 0.0}, r"expected checksum \w+, found \w+: the measurement was altered"),
    ],
)
def test_an_altered_measurement_is_refused(measured: Path, change: dict[str, Any], message: str) -> None:
    measured.write_text(json.dumps({**read_json(measured), **change}))
    with pytest.raises(UserError, match=message) as caught:
        measurements.read(measured)
    assert str(measured) in str(caught.value)


def test_a_measurement_of_another_machine_is_imported(measured: Path, tmp_path: Path) -> None:
    """Beside no record at all; the older of two of one machine is left."""
    root, elsewhere = paths.root(), tmp_path / "elsewhere" / "ledger" / "sample" / "speed"
    found = measurements.read(measured)
    other = copy.deepcopy(found)
    other["environment"].update(device="cuda", device_name="NVIDIA H200")
    elsewhere.mkdir(parents=True)
    for name, one in (("a", other), ("b", {**found, "finished_at": found["finished_at"] - 1})):
        (elsewhere / f"{name}.json").write_text(json.dumps({**one, "checksum": ledger.checksum(one)}))
    done = cli("import", str(tmp_path / "elsewhere"), QRNN_ROOT=str(root))
    assert done.stdout.startswith("0 records imported, 0 here already; 1 measurements of speed imported, 1 not")
    assert [one["environment"]["device_name"] for one in measurements.all_of("sample")] == [
        found["environment"]["device_name"], "NVIDIA H200",
    ]  # fmt: skip
    assert measurements.read(measured) == found
    assert (
        "; 0 measurements of speed imported, 2 not"
        in cli("import", str(tmp_path / "elsewhere"), QRNN_ROOT=str(root)).stdout
    )


def test_the_report_has_the_figure_and_its_numbers(measured: Path) -> None:
    report = write(load(), "sample")
    text = report.read_text()
    found = measurements.read(measured)
    cells = [f"{cell['inference']['ratio']:.2f} / {cell['training']['ratio']:.2f}" for cell in found["layer"]["grid"]]
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert row == f"| 1 | {' | '.join(cells)} |"
    assert "| IMDB: sentiment classification |" in text
    for task, paper in (("imdb", "3.2"), ("iwslt", "4.2")):  # 480 s over 150 s, 4.2 h over 1.0 h: tables 1 and 3
        step = found["steps"][task]
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {task.upper()}:")]
        spread = f"({step['ratios']['p10']:.2f} to {step['ratios']['p90']:.2f})"
        assert line.endswith(f"| {step['ratio']:.2f} {spread} | {paper} |")
    figure = report.parent / f"figures/speed-{measured.stem}.svg"
    assert f"![speed]({figure.relative_to(report.parent)})" in text
    before = figure.read_bytes()
    write(load(), "sample")
    assert figure.read_bytes() == before
    measured.unlink()
    write(load(), "sample")
    assert not figure.exists()
    assert "Nothing is measured yet." in report.read_text()


def test_the_report_says_what_is_not_of_the_present(measured: Path, values: dict) -> None:
    """A task that came after the measurement is not missed; one whose data are not here is let pass."""
    found = measurements.read(measured)
    settings = copy.deepcopy(found["settings"])
    assert speed.summary(found, settings)["differs"] == []
    settings["data"]["ptb"] = None
    assert speed.summary(found, settings)["differs"] == []
    del found["settings"]["recipes"]["ptb"]["qrnn"]["zoneout_evaluation"]  # as if measured before there was such a one
    assert speed.summary(found, settings)["differs"] == []
    settings["recipes"]["ptb"]["lstm"]["dropout"] = 0.25
    older = {**found, "code": {**found["code"], "fingerprint": "f"}, "steps": {"ptb": found["steps"]["ptb"]}}
    made = speed.summary(older, settings)
    assert made["differs"] == ["sources", "settings"]
    text = "\n".join(speed.section([made], ["a.svg"], ["b.json"], {}))
    assert "Made by other sources than the present ones. Made with other sizes, recipes or data than" in text
    assert "| ptb |" in text
    assert speed.paper_ratio("parsing") is None


def test_a_step_is_split_as_the_paper_splits_it() -> None:
    parts = {"input": 1, "LSTM": 2, "backward: LSTM": 4, "pooling": 8, "backward: convolution products": 16,
             "output projection and loss": 32, "backward: output projection and loss": 64, "optimiser": 128,
             "dropout, masks, copies": 256}  # fmt: skip
    split = speed.split({name: float(ms) for name, ms in parts.items()})
    assert split == {"RNN": 30, "softmax": 96, "optimisation": 128, "the rest": 257}
    assert set(speed.GROUPS) <= {*profile.FORWARD, profile.OPTIMISER}


def test_the_report_says_how_far_single_calls_stray() -> None:
    """By hand: within 10, 21, 25 and 100 %, of which nine in ten are all; the second and the last have single calls on
    the other side of 1. Then ten of 10 %, and 5 % (of the slowest), 8, 12, 16, ... 40: the 18th of these 20 is 32."""
    spans = [(1.9, 2.0, 2.2), (1.0 / 1.01, 1.2, 1.3), (1.25, 1.25, 1.5625), (0.8, 0.9, 1.8)]
    found = [dict(zip(("ratio_min", "ratio", "ratio_max"), span, strict=True)) for span in spans]
    cells = [{"inference": found[0], "training": found[1]}, {"inference": found[2], "training": found[3]}]
    assert speed._spread(cells) == (
        "In 9 of 10 of these 4 comparisons every single call's ratio is within 100 % of that of the medians, in all"
        " within 100 %; in 2 a single call has the other model ahead."
    )
    assert speed._spread(cells[1:]).endswith("; in 1 a single call has the other model ahead.")
    assert speed._spread([{"inference": found[0], "training": found[0]}]).endswith("; in none a single call has the"
                                                                                   " other model ahead.")  # fmt: skip
    many = [{"inference": dict(found[0]), "training": {**found[0], "ratio_max": 2.0 * (1 + n / 25)}}
            for n in range(1, 11)]  # fmt: skip
    assert "In 9 of 10 of these 20 comparisons every single call's ratio is within 32 % of" in speed._spread(many)


def test_the_reading_names_best_and_worst_and_the_papers() -> None:
    def cell(batch_size: int, length: int, inference: float, training: float, paper: float) -> dict[str, Any]:
        return {"batch_size": batch_size, "length": length, "inference": {"ratio": inference},
                "training": {"ratio": training}, "paper_inference_ratio": paper}  # fmt: skip

    grid = [cell(8, 32, 1.5, 1.1, 5.5), cell(8, 512, 9.0, 1.4, 16.9), cell(256, 32, 0.9, 1.2, 1.4)]
    steps = {"imdb": {"ratio": 2.0, "paper_epoch_ratio": 3.2}, "ptb": {"ratio": 1.25, "paper_epoch_ratio": None},
             "iwslt": {"ratio": 3.0, "paper_epoch_ratio": 4.2}}  # fmt: skip
    assert speed.sentences([{"machine": "a machine", "grid": grid, "steps": steps}]) == [
        "a machine: a QRNN layer's inference is 0.90 (batch 256, T = 32) to 9.00 (batch 8, T = 512) times as fast as"
        " nn.LSTM's, its training 1.10 to 1.40 times. The paper has 1.4 to 16.9 at these shapes, on a GPU.",
        "a machine: the LSTM's training step takes so many times the QRNN's: IMDB 2.00, PTB 1.25 and IWSLT 3.00; in the"
        " paper, by epochs, IMDB 3.2 and IWSLT 4.2.",
    ]
