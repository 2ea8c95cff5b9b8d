"""dvc.yaml as DVC sees it: which stages a change makes stale, at which scale; the command that chooses the scale."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import cli

from pipeline import paths
from pipeline.params import TASKS

pytestmark = pytest.mark.slow


def dvc(folder: Path, *arguments: str) -> str:
    """Runs dvc in a folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which every stage of scales sample and small counts as run: its outs are stand-ins."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("qrnn", "pipeline", "stages"):
        shutil.copytree(paths.CODE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(paths.CODE / name, folder)
    (folder / ".dvc").mkdir()
    shutil.copy(paths.CODE / ".dvc/config", folder / ".dvc")
    for scale in ("small", "sample"):
        set_parameter(folder, ["scale"], scale)
        pretend(folder, scale)
        dvc(folder, "commit", "--force")
    return folder


def pretend(folder: Path, scale: str) -> None:
    for task in TASKS:
        for path in (
            f"data/{scale}/raw/{task}/t",
            f"data/{scale}/processed/{task}/t",
            f"data/{scale}/trials/{task}.json",
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(f"{scale} {task}")
    for path in (
        f"data/{scale}/speed.json",
        f"ledger/{scale}/r.json",
        *(f"results/{scale}/{n}" for n in ("report.md", "tables.json", "claims.json", "metrics.json")),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(scale)
    (folder / f"results/{scale}/figures").mkdir()


def set_parameter(folder: Path, where: list[str], value: object) -> None:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    block = values
    for name in where[:-1]:
        block = block[name]
    block[where[-1]] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def stale(folder: Path) -> set[str]:
    """Stages whose own code, data or parameters changed since they ran."""
    text = dvc(folder, "status")
    return set(re.findall(r"^([\w@-]+):$", text, flags=re.MULTILINE))


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "project"))


def test_nothing_is_stale_at_first(project: Path) -> None:
    assert stale(project) == set()


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        (["ptb", "sample", "train", "dropout"], 0.3, {"tune@ptb", "speed"}),
        (["imdb", "sample", "models", "qrnn", "pooling"], "f", {"tune@imdb", "speed"}),
        (["iwslt", "sample", "preprocess", "max_characters"], 30, {"preprocess@iwslt"}),
        (["ptb", "sample", "fetch", "seed"], 3, {"fetch@ptb"}),
        (["ptb", "paper", "train", "dropout"], 0.3, set()),
        (["seeds", "sample"], [1], {"tune@imdb", "tune@ptb", "tune@iwslt", "speed"}),
        (["compute", "sample", "threads"], 2, {"speed"}),
        (["speed", "sample", "repeats"], 1, {"speed"}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_a_parameter_makes_stale_what_reads_it(project: Path, where: list[str], value: object, expected: set) -> None:
    set_parameter(project, where, value)
    assert stale(project) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipeline/tasks/ptb.py", {"tune@ptb", "speed"}),
        ("pipeline/corpora/imdb.py", {"fetch@imdb", "preprocess@imdb"}),
        ("qrnn/stack.py", {"tune@imdb", "tune@ptb", "tune@iwslt", "speed"}),
        ("pipeline/speed_layer.py", {"speed"}),
        ("pipeline/report/markdown.py", {"report"}),
        ("ledger/sample/r.json", {"report"}),
        ("ledger/small/r.json", set()),
        ("data/sample/processed/ptb/t", {"preprocess@ptb", "tune@ptb", "speed"}),
    ],
)
def test_a_file_makes_stale_what_reads_it(project: Path, file: str, expected: set) -> None:
    with (project / file).open("a") as opened:
        opened.write("# changed\n")
    assert stale(project) == expected


def test_a_scale_has_its_own_folders() -> None:
    text = (paths.CODE / "dvc.yaml").read_text()
    found = re.findall(r"^ +- ((?:data|results|ledger)/\S+?):?$", text, flags=re.MULTILINE)
    assert len(found) > 10
    assert all(path.split("/")[1] == "${scale}" for path in found)


def test_truncated_lock_is_named(root: Path) -> None:
    (root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  fetch@imdb:\n    cmd: [python")
    done = cli("repro", "--scale", "sample")
    assert done.returncode == 2
    assert "dvc.lock: no valid YAML" in done.stderr
    assert "remove it: recorded trials are not run again" in done.stderr


def test_repro_sets_the_scale_for_its_run_alone(root: Path, tmp_path: Path) -> None:
    """A stand-in for dvc tells what it saw; params.yaml is as before afterwards, also after a failure."""
    before = (root / "params.yaml").read_text()
    for status in (0, 3):
        (root / "dvc.py").write_text(
            "import sys, yaml\n"
            "print('saw', yaml.safe_load(open('params.yaml'))['scale'], sys.argv[1:])\n"
            f"sys.exit({status})\n"
        )
        done = cli("repro", "--scale", "small", "tune@ptb", PYTHONPATH=str(root) + os.pathsep + str(paths.CODE))
        assert "saw small ['repro', 'tune@ptb']" in done.stdout, done.stderr
        assert done.returncode == status
        assert (root / "params.yaml").read_text() == before


def test_an_edit_during_repro_stays_and_the_scale_goes_back(root: Path) -> None:
    (root / "dvc.py").write_text("with open('params.yaml', 'a') as file:\n    file.write('# edited\\n')\n")
    before = (root / "params.yaml").read_text()
    done = cli("repro", "--scale", "small", PYTHONPATH=str(root) + os.pathsep + str(paths.CODE))
    assert done.returncode == 0, done.stderr
    assert (root / "params.yaml").read_text() == before + "# edited\n"
