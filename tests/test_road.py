"""The road in a fresh Git clone, with real DVC, Ray and MLflow, on tiny corpora: raw text to report, another scale,
and back again.
"""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY, ray_by_turns, read_json

from pipeline import paths
from pipeline.params import TASKS, load
from pipeline.report import tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), ray_by_turns]
SIZES = {"train": 60, "valid": 12, "test": 12}


@pytest.fixture
def clone(tmp_path: Path, values: dict) -> Path:
    """A checkout under Git whose scales sample and small are both tiny and generated."""
    folder = tmp_path / "a clone"
    for name in ("qrnn", "pipeline", "stages"):
        shutil.copytree(paths.CODE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(paths.CODE / name, folder / name)
    values["seeds"] = {"sample": [1], "small": [1], "paper": [1]}
    values["speed"]["sample"] = {"batch_sizes": [1], "lengths": [2], "repeats": 1, "steps": 2}
    for task in TASKS:
        for scale in ("sample", "small"):
            valid = {"valid": 0} if task == "imdb" else {}
            values[task][scale]["fetch"] = {"source": "sample", "seed": 5, **SIZES, **valid}
            values[task][scale]["train"].update(TINY, layers=2)
    values["imdb"]["small"]["preprocess"]["corpus_vectors"] = TINY["embedding"]
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a clone"]):
        git(folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments)
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def repro(folder: Path, scale: str, *stages: str) -> str:
    """`make repro SCALE=...` without the installation, or up to some stages; returns what was printed."""
    return python(folder, "pipeline", "repro", "--scale", scale, *stages)


def python(folder: Path, *module: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("QRNN_ROOT", "PYTHONPATH")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([sys.executable, "-m", *module], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ledger_bytes(folder: Path, scale: str) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in (folder / "ledger" / scale).rglob("*.json")}


def measured(folder: Path) -> Path:
    """The one measurement of speed."""
    (file,) = (folder / "ledger/sample/speed").glob("*.json")
    return file


def cpu_seconds() -> float:
    """Of the processes that have ended: unlike the clock it runs no faster where other tests run beside this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_raw_text_to_report_and_back_again(clone: Path) -> None:
    first = repro(clone, "sample")
    assert first.strip().endswith(f"report: {clone}/results/sample/report.md")
    report = (clone / "results/sample/report.md").read_text()
    assert "8 trials: 8 done, 0 diverged, 0 failed, 0 missing" in report
    assert f"### {tables.device(read_json(measured(clone)))}" in report
    metrics = read_json(clone / "results/sample/metrics.json")
    models = {(cell.task, cell.model) for cell in load(clone / "params.yaml").cells("sample")}
    assert {(task, model) for task, found in metrics.items() for model in found} == models
    assert (clone / "mlflow.db").exists()
    assert git(clone, "status", "--porcelain") == ""

    begin = cpu_seconds()
    assert "Data and pipelines are up to date." in repro(clone, "sample")
    seconds = cpu_seconds() - begin
    begin = cpu_seconds()
    python(clone, "dvc", "status")
    looked = cpu_seconds() - begin

    before = ledger_bytes(clone, "sample")
    assert "imdb: 3 done" in repro(clone, "small", "tune@imdb")
    assert len(ledger_bytes(clone, "small")) == 3
    again = repro(clone, "sample")
    assert again.count(", 0 to run") + again.count("cached - skipping run") + again.count("didn't change") >= 3
    assert " to run" not in again.replace(", 0 to run", "")
    assert ledger_bytes(clone, "sample") == before
    assert git(clone, "status", "--porcelain") == ""
    assert seconds < 2 * looked  # most of it is DVC's own look at what has changed, however fast the machine
