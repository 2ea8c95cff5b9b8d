"""dvc.yaml as DVC sees it: which stages a change makes stale, at which scale; the command that chooses the scale."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import cli

from pipeline import __main__ as main
from pipeline import files, ledger, paths, recording
from pipeline.grid import forget_lost
from pipeline.params import TASKS, load

pytestmark = pytest.mark.slow
FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where yaml was built with it


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
        ("data/sample/processed/ptb/t", {"preprocess@ptb", "tune@ptb", "speed", "report"}),
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
    assert "dvc.lock: expected DVC's list of stages, got a part of one" in done.stderr
    assert "remove it: recorded trials are not run again" in done.stderr


def test_a_lock_is_whole_where_each_of_its_stages_is(finished: Path) -> None:
    """DVC's own, whole and cut off at the end of each line: YAML all the same."""
    lines = (finished / "dvc.lock").read_text().splitlines(keepends=True)
    stages = 0
    for number, following in enumerate([*lines, "  the-end:"]):
        is_whole = main._is_whole(yaml.load("".join(lines[:number]), FAST))
        if re.match(r"  \S", following) and number > 2:  # a stage has ended here
            stages += 1
            assert is_whole
        elif re.match(r"schema|stages|  \S|    (cmd|deps|params|outs)|    - path|      hash", lines[number - 1]):
            assert not is_whole, lines[number - 1]
    assert stages > 10


STAGE = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("ended")
"""
DVC = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as dvc does while a stage runs; of SIGTERM it dies
stage = subprocess.Popen([sys.executable, "-c", {STAGE!r}])
stage.wait()
sys.exit(7)
"""


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_end_of_repro_leaves_its_stage_running(root: Path, number: int, ignored: bool) -> None:
    """Nor where a shell started it in the background, which has it ignore SIGINT."""
    (root / "dvc.py").write_text(DVC)
    before = (root / "params.yaml").read_text()
    environment = {**os.environ, "PYTHONPATH": str(root) + os.pathsep + str(paths.CODE)}

    def started() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves

    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "repro", "--scale", "small"],
        cwd=paths.CODE, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=started,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(number)
    assert running.stdout.read() == "ended\n"
    assert running.wait(timeout=60) == 7
    assert (root / "params.yaml").read_text() == before


def test_trials_whose_record_is_gone_are_looked_at_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted, kept = load().grid("sample", "ptb"), []
    for trial in wanted:
        described = recording.describe(trial, ledger.Identity("k" * 20, "f"), {"hash": "d"})
        kept.append(ledger.write({**dict.fromkeys(ledger.REQUIRED), **described, "status": "diverged", "curve": [],
                                  "timing": {}, "started_at": 1.0, "finished_at": 2.0}))  # fmt: skip
    listed = {"trials": {trial.name: {"key": "k" * 20, "status": "diverged"} for trial in wanted}}
    file = paths.trials("sample", "ptb")

    def is_kept() -> bool:
        files.write_json(file, listed)
        forget_lost(load(), "sample")
        return file.exists()

    assert is_kept()
    assert capsys.readouterr().out == ""
    moved = kept[0].rename(kept[0].with_suffix(".moved"))
    assert not is_kept()
    assert capsys.readouterr().out.startswith("ptb: the ledger has changed since its trials were listed")
    moved.rename(kept[0])
    assert is_kept()
    listed["trials"][wanted[0].name]["key"] = "n" * 20
    assert not is_kept()
    files.write_json(paths.speed("sample"), {"file": "a.json", "sha256": "s"})
    (paths.ledger("sample") / "speed").mkdir()
    (paths.ledger("sample") / "speed" / "a.json").touch()
    forget_lost(load(), "sample")
    assert paths.speed("sample").exists()
    (paths.ledger("sample") / "speed" / "a.json").unlink()
    forget_lost(load(), "sample")
    assert not paths.speed("sample").exists()


def test_nohup_keeps_repro_from_the_end_of_its_terminal(root: Path) -> None:
    (root / "dvc.py").write_text("print('begun', flush=True)\ninput()\nprint('whole')\n")
    environment = {**os.environ, "PYTHONPATH": str(root) + os.pathsep + str(paths.CODE)}
    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "repro", "--scale", "small"],
        cwd=paths.CODE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(signal.SIGHUP)
    out, _ = running.communicate("\n")
    assert (out, running.returncode) == ("whole\n", 0)


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
