"""A bundle trains on a machine that has nothing but it, and its records come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cli, read_json

from pipeline import bundle, ledger, trial
from pipeline.errors import UserError
from pipeline.params import load

TRIAL = ["trial", "--scale", "sample", "--task", "ptb", "--model", "qrnn", "--seed", "1"]


@pytest.mark.slow
def test_bundle_trains_elsewhere_and_its_record_comes_back(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = cli("bundle", "--scale", "sample", "--task", "ptb", "--out", str(data / "b.tar.xz"))
    assert made.returncode == 0, made.stderr
    there = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "tarfile", "-e", str(data / "b.tar.xz"), str(there)], check=True)
    folder = there / bundle.ROOT
    environment = {name: value for name, value in os.environ.items() if name not in ("QRNN_ROOT", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *TRIAL], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = read_json(folder / "ledger/sample/ptb/qrnn/seed-1.json")
    assert record["code"] == {**read_json(folder / "revision.json"), "fingerprint": ledger.fingerprint("ptb")}
    assert "1 records imported" in cli("import", str(folder / "ledger")).stdout
    wanted = load().trial("sample", "ptb", "qrnn", 1)
    identity = ledger.identity(wanted, record["data"]["hash"])
    assert ledger.standing(wanted, identity) is ledger.Standing.DONE


def test_same_content_gives_the_same_bytes(data: Path) -> None:
    bundle.write("sample", ["ptb"], data / "a")
    for file in (data / "data/sample/processed/ptb").iterdir():
        os.utime(file, (1.0, 2.0))
        file.chmod(0o600)
    bundle.write("sample", ["ptb"], data / "b")
    assert (data / "a").read_bytes() == (data / "b").read_bytes()


def test_missing_data_is_named_and_nothing_is_left(root: Path) -> None:
    with pytest.raises(UserError, match="no processed data"):
        bundle.write("sample", ["ptb"], root / "b.tar.xz")
    assert [file.name for file in root.iterdir()] == ["params.yaml"]


def test_time_limit_stops_at_a_checkpoint(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load().trial("sample", "ptb", "qrnn", 1)
    clock = iter(range(10**6))
    monkeypatch.setattr(trial.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(trial.OutOfTime, match="stopped after epoch 1 of 2 by the time limit"):
        trial.run(wanted, device="cpu", report=lambda _: None, time_limit_s=30.0)
    epochs: list[int] = []
    trial.run(wanted, device="cpu", report=lambda p: epochs.append(p.epoch) if p.entry else None)
    assert epochs == [2]


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf"])
def test_bad_time_limit_is_named(data: Path, text: str) -> None:
    done = cli(*TRIAL, f"--time-limit={text}")
    assert done.returncode == 2
    assert f"expected a number of seconds above 0, got '{text}'" in done.stderr
