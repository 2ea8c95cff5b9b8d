"""The shape of the house: imports go one way, light things stay light, dvc.yaml declares what a stage really reads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import write_imdb, write_iwslt, write_ptb

from pipeline import paths
from pipeline.params import TASKS

HEAVY = ("ray", "mlflow", "dvc", "datasets", "sklearn", "sacrebleu", "sacremoses", "matplotlib")


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize(("room", "above"), [("qrnn", {"pipeline", "stages"}), ("pipeline", {"stages"})])
def test_imports_go_one_way(room: str, above: set[str]) -> None:
    found = {str(file): imports(file) & above for file in (paths.CODE / room).rglob("*.py")}
    assert found
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("qrnn", (*HEAVY, "pipeline", "yaml", "numba.cuda")),
        ("pipeline.trial", HEAVY),
        ("pipeline.profile", HEAVY),
        ("pipeline.tasks.iwslt", HEAVY),
        ("pipeline.__main__", (*HEAVY, "torch")),
        ("pipeline.report", (*HEAVY[:-1], "torch")),
    ],
)
def test_light_modules_stay_light(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=paths.CODE, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_kernels_for_cuda_are_in_one_folder() -> None:
    users = [f for f in (paths.CODE / "qrnn").rglob("*.py") if re.search(r"numba(\.| import .*)cuda", f.read_text())]
    assert {f.parent.name for f in users} == {"numba_cuda"}


def stages() -> list[tuple[str, str, list[str]]]:
    """(stage, task, deps) of dvc.yaml at scale sample, with the templates filled in."""
    made = []
    for name, stage in yaml.safe_load((paths.CODE / "dvc.yaml").read_text())["stages"].items():
        for task in TASKS if "foreach" in stage else ("",):
            deps = stage.get("do", stage)["deps"]
            made.append((name, task, [d.replace("${item}", task).replace("${scale}", "sample") for d in deps]))
    return made


PROGRAM = """
import pathlib, runpy, sys
sys.argv = {argv!r}
if "{stage}" == "tune":
    import pipeline.tune
    def in_this_process(trials, *_):
        from pipeline import trial
        for one in trials:
            trial.run(one, device="cpu")
    pipeline.tune._fan_out = in_this_process
if "{stage}" in ("tune", "speed"):
    import pipeline.tracking
    pipeline.tracking.show = lambda *_: None
try:
    runpy.run_module("stages.{stage}", run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
root = pathlib.Path.cwd()
files = [pathlib.Path(m.__file__) for m in sys.modules.values() if getattr(m, "__file__", None)]
ours = [f.relative_to(root).as_posix() for f in files if f.is_relative_to(root)]
print("LOADED", "stages/{stage}.py", *[f for f in ours if f.split("/")[0] in ("qrnn", "pipeline", "stages")])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "task", "deps"), stages(), ids=lambda value: value if isinstance(value, str) else "")
def test_stage_declares_the_code_it_imports(root: Path, stage: str, task: str, deps: list[str]) -> None:
    """The stage is run; every module of ours that it loaded must be declared, and every module declared be loaded."""
    arguments = ["--scale", "sample", *(["--task", task] if task else [])]
    write = {"imdb": write_imdb, "ptb": write_ptb, "iwslt": write_iwslt}
    if stage == "preprocess":
        run_stage("fetch", arguments)
    if stage in ("tune", "speed", "report"):
        for name in TASKS:
            write[name](paths.processed("sample", name))
    loaded = set(run_stage(stage, arguments))
    code = [dep for dep in deps if dep.split("/")[0] in ("qrnn", "pipeline", "stages")]
    undeclared = {file for file in loaded if not any(file == dep or file.startswith(f"{dep}/") for dep in code)}
    unused = {dep for dep in code if not any(file == dep or file.startswith(f"{dep}/") for file in loaded)}
    if task in ("ptb", "iwslt"):
        unused -= {"pipeline/corpora/vectors.py", "pipeline/corpora/word2vec.py", "pipeline/figure3.py"}
    assert (undeclared, unused) == (set(), set())


def run_stage(stage: str, arguments: list[str]) -> list[str]:
    """Runs a stage, its trials in the same process, and returns the files of ours that were imported."""
    program = PROGRAM.format(stage=stage, argv=[stage, *arguments])
    done = subprocess.run([sys.executable, "-c", program], cwd=paths.CODE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("LOADED")[2].split()
