"""The command line: `python -m pipeline COMMAND --help`."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import files, paths
from pipeline.errors import UserError, guarded
from pipeline.params import SCALES, TASKS, load


def main() -> int | None:
    arguments = _parser().parse_args()
    return arguments.command(arguments)


def repro(arguments: argparse.Namespace) -> int:
    """dvc repro at a scale, then the path of its report."""
    scale = arguments.scale or load().scale
    _require_whole_lock()
    with _scale_set(scale):
        status = subprocess.run([sys.executable, "-m", "dvc", "repro", *arguments.targets], cwd=paths.root()).returncode
    report = paths.results(scale) / "report.md"
    if status == 0 and report.is_file():
        print(f"report: {report}")
    return status


def trial(arguments: argparse.Namespace) -> int:
    """One trial on this machine, without Ray."""
    from pipeline import ledger
    from pipeline.processed import read_manifest

    params = load()
    wanted = params.trial(arguments.scale, arguments.task, arguments.model, arguments.seed)
    data_hash = read_manifest(paths.processed(arguments.scale, arguments.task))["hash"]
    standing = ledger.standing(wanted, ledger.identity(wanted, data_hash))
    if standing in (ledger.Standing.DONE, ledger.Standing.DIVERGED) and not arguments.again:
        print(f"{wanted.name}: recorded already ({standing.value}): {ledger.path_of(wanted)}; --again runs it anew")
        return 0
    from pipeline import trial as training  # imports torch, so only once there is something to train

    compute = params.compute(arguments.scale)
    threads = arguments.threads or compute.threads
    record = training.run(wanted, device=arguments.device or compute.device, threads=threads, report=_say)
    print(f"{wanted.name}  {ledger.outcome(record)}\nrecord: {ledger.path_of(wanted)}")
    return 0 if record["status"] == "done" else 1


def tune(arguments: argparse.Namespace) -> None:
    """The missing trials of a scale, fanned out by Ray Tune."""
    from pipeline import tune as fan_out

    params = load()
    for task in arguments.task or TASKS:
        fan_out.run(params, arguments.scale, task)


def status(arguments: argparse.Namespace) -> None:
    """The grid of a scale: done, running, diverged, failed, missing."""
    from pipeline.grid import table

    print(table(load(), arguments.scale))


def sync(arguments: argparse.Namespace) -> None:
    """MLflow rebuilt from the ledger."""
    from pipeline import ledger, tracking

    print(tracking.sync(ledger.records(arguments.scale)))


def take_in(arguments: argparse.Namespace) -> None:
    """Records from another machine into the ledger."""
    from pipeline import ledger

    new, known = ledger.take_in(arguments.folder)
    print(f"{new} records imported, {known} here already; `dvc repro` takes them into the report")


def report(arguments: argparse.Namespace) -> None:
    """Tables and figures of a scale, from the ledger as it stands."""
    from pipeline.report import write

    print(f"report: {write(load(), arguments.scale)}")


def speed(arguments: argparse.Namespace) -> int:
    """Pooling kernels beside their peers on one device; run it where nothing else runs."""
    from pipeline import speed as timing

    result = timing.run(
        shapes=arguments.shapes,
        quick=arguments.quick,
        device=arguments.device,
        threads=arguments.threads,
        out=arguments.out,
        say=_say,
    )
    return 1 if any(text.startswith("wrong") for text in result["gate"].values()) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Reproduction of 'Quasi-Recurrent Neural Networks': runs, watches and reports its experiments.",
        epilog="Scales: sample (generated corpora, CPU, minutes), small (real corpora cut down for a CPU), paper. "
        "Parameters are in params.yaml; QRNN_DATA_MIRROR names a folder with the real corpora, RAY_ADDRESS a cluster, "
        "MLFLOW_TRACKING_URI a tracking server.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _add(commands, "repro", repro, "run whatever is out of date, from raw text to the report")
    command.add_argument("--scale", choices=SCALES, help="default: the scale that params.yaml names")
    command.add_argument("targets", nargs="*", help="stages, such as tune@ptb; default: all")

    command = _add(commands, "trial", trial, "run one trial on this machine; needs torch and numba only")
    _scale_option(command)
    command.add_argument("--task", required=True, choices=TASKS)
    command.add_argument("--model", required=True, help="a row of the task's table, such as qrnn or lstm")
    command.add_argument("--seed", required=True, type=int, help="root seed of all random streams")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as params.yaml says")
    command.add_argument("--threads", type=_count, help="CPU threads; default: as params.yaml says")
    command.add_argument("--again", action="store_true", help="run it although it is recorded")

    command = _add(commands, "tune", tune, "run the missing trials side by side with Ray Tune")
    _scale_option(command)
    command.add_argument("--task", action="append", choices=TASKS, help="may be repeated; default: all tasks")

    command = _add(commands, "status", status, "print the grid: done, running, failed, missing")
    _scale_option(command)

    command = _add(commands, "sync", sync, "rebuild the MLflow view from the ledger")
    command.add_argument("--scale", choices=SCALES, help="default: all scales")

    command = _add(commands, "import", take_in, "take in records that trials left on another machine")
    command.add_argument("folder", type=Path, help="searched for seed-<n>.json; all are checked before one is taken")

    command = _add(commands, "speed", speed, "time pooling after a correctness gate, every candidate in turn")
    command.add_argument("--kernels", action="store_true", required=True, help="the pooling kernels and their peers")
    command.add_argument("--quick", action="store_true", help="three shapes, three repeats")
    command.add_argument("--shapes", help="BxTxC, comma-separated; default: the paper's, the tasks' and long ones")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--threads", type=_count, default=1, help="CPU threads; default: 1")
    command.add_argument("--out", type=Path, help="JSON file for all figures")

    command = _add(commands, "report", report, "write tables, figures and report.md from the ledger")
    _scale_option(command)
    return parser


def _add(commands, name, function, text):  # type: ignore[no-untyped-def]
    command = commands.add_parser(name, help=text, description=f"{function.__doc__} {text[0].upper()}{text[1:]}.")
    command.set_defaults(command=function)
    return command


def _scale_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", required=True, choices=SCALES)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _say(progress: object) -> None:
    print(progress, flush=True)


def _require_whole_lock() -> None:
    """DVC writes dvc.lock in place, so a machine that stopped can leave half of one, which DVC does not explain."""
    import yaml

    lock = paths.root() / "dvc.lock"
    try:
        yaml.safe_load(lock.read_bytes() if lock.exists() else b"")
    except yaml.YAMLError:
        raise UserError(f"{lock}: no valid YAML (cut off?); remove it: recorded trials are not run again") from None


@contextmanager
def _scale_set(scale: str) -> Iterator[None]:
    """The `scale` line of params.yaml set to `scale` for the block: DVC reads it there and takes no override."""
    file = paths.params_file()
    text = file.read_text(encoding="utf-8")
    changed = re.sub(r"^(scale:\s*)\w+", rf"\g<1>{scale}", text, count=1, flags=re.MULTILINE)
    if changed == text:
        yield
        return
    files.write_text(file, changed)
    try:
        yield
    finally:
        if file.read_text(encoding="utf-8") == changed:
            files.write_text(file, text)


if __name__ == "__main__":
    sys.exit(guarded(main))
