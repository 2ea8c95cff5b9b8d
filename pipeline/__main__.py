"""The command line: `python -m pipeline COMMAND --help`."""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from pipeline import files, paths
from pipeline.errors import UserError, guarded
from pipeline.params import SCALES, TASKS, Compile, NbsvmRecipe, Params, Precision, load


def main() -> int | None:
    arguments = _parser().parse_args()
    return arguments.command(arguments)


def repro(arguments: argparse.Namespace) -> int:
    """dvc repro at a scale, then the path of its report."""
    from pipeline.grid import forget_lost

    params = load()
    scale = arguments.scale or params.scale
    _require_whole_lock()
    # A second one would set another scale under the first.
    with files.alone(paths.root() / "runs" / "repro.lock", "repro in this folder"), _scale_set(scale):
        forget_lost(params, scale)
        status = _dvc("repro", *arguments.targets)
    report = paths.results(scale) / "report.md"
    if status == 0 and not arguments.targets and report.is_file():
        print(f"report: {report}")
    return status


def trial(arguments: argparse.Namespace) -> int:
    """One trial on this machine, without Ray."""
    from pipeline import ledger
    from pipeline.grid import standing_of
    from pipeline.processed import manifest_of

    params = load()
    wanted = params.trial(arguments.scale, arguments.task, arguments.model, arguments.seed)
    if isinstance(wanted.recipe, NbsvmRecipe):
        _refuse_for_a_fit(arguments, wanted.name)
    manifest_of(wanted)
    standing = standing_of(wanted)
    if standing in (ledger.Standing.DONE, ledger.Standing.DIVERGED) and not arguments.again:
        print(f"{wanted.name}: recorded already ({standing.value}): {ledger.path_of(wanted)}; --again runs it anew")
        return 0
    from pipeline import trial as training  # imports torch, so only once there is something to train

    limit = arguments.time_limit or math.inf
    try:
        record = training.run(wanted, **_machine(arguments, params), report=_say, time_limit_s=limit,
                              other_sources=arguments.other_sources)  # fmt: skip
    except training.OutOfTime as stop:
        print(f"{wanted.name}: {stop}; the same command goes on from there")
        return 3
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


def cost(arguments: argparse.Namespace) -> None:
    """Parameters, work a step and projected minutes of every cell on one NVIDIA H200; nothing is run.

    The processed data must be there, for the shapes of the batches.
    """
    from pipeline import cost as projection

    print(projection.table(load(), arguments.scale))


def profile(arguments: argparse.Namespace) -> None:
    """The trial's own training steps on its own data, first timed alone, then under torch's profiler.

    Parts: input (building the batch, copying it to the device), embedding, convolution products, LSTM, pooling,
    attention, output projection and loss, the model's other operators, each forward and backward; the optimiser
    (penalty, clipping, update); the rest. On a CPU by wall time, on a CUDA device by its kernels' time. The profiler
    slows small models, so that both times of a step are printed. Times mean something only where nothing else runs.
    The batches are those that the trial begins with, whatever checkpoint there is; no record is written.
    """
    from pipeline import profile as profiling

    params = load()
    wanted = params.trial(arguments.scale, arguments.task, arguments.model, params.seeds(arguments.scale)[0])
    profiling.run(wanted, **_machine(arguments, params), steps=arguments.steps, out=arguments.json, say=_say)


def sync(arguments: argparse.Namespace) -> None:
    """MLflow rebuilt from the ledger."""
    from pipeline import ledger, measurements, tracking

    print(tracking.sync(ledger.records(arguments.scale), measured=measurements.all_of(arguments.scale)))


def bundle(arguments: argparse.Namespace) -> None:
    """Code and processed data for a machine without a network."""
    from pipeline import bundle as bundling

    target = arguments.out or Path(f"qrnn-{arguments.scale}.tar.xz")
    size = bundling.write(arguments.scale, arguments.task or TASKS, target)
    print(f"{target}: {size / 2**20:.1f} MiB")
    if size > bundling.LIMIT_BYTES:
        print(f"larger than {bundling.LIMIT_BYTES / 2**20:.0f} MiB: --task makes a bundle of one task")
    print(
        f"there: tar xf {target.name} && cd {bundling.ROOT} && python -m pipeline trial --scale {arguments.scale} ..."
    )
    print("back here: python -m pipeline import FOLDER, with the ledger folder that the trials left")


def take_in(arguments: argparse.Namespace) -> None:
    """Records from another machine into the ledger."""
    from pipeline import ledger, measurements

    new, old = measurements.below(arguments.folder)
    taken = ledger.take_in(arguments.folder, arguments.replace, required=not new + old)
    for measurement in new:
        measurements.write(measurement)
    aside = f"; {len(new)} measurements of speed imported, {len(old)} not newer than those here" if new + old else ""
    print(f"{taken}{aside}; `dvc repro` takes them into the report")


def report(arguments: argparse.Namespace) -> None:
    """Tables, claims and figures of a scale, from the ledger as it stands."""
    from pipeline.report import write

    print(f"report: {write(load(), arguments.scale)}")


def verify(arguments: argparse.Namespace) -> int:
    """Every figure of results/<scale> anew from the raw records, the claims judged anew, each record looked at.

    What differs is printed, and then the exit status is 1.
    """
    from pipeline import verify as verification

    return int(verification.run(arguments.scale) > 0)


def compare(arguments: argparse.Namespace) -> None:
    """The difference of two models' test figures, with its interval over the examples of the test set.

    By a paired bootstrap of what the trials' records hold of the test set; the processed data must be there. It says
    what another test set would give of these trained models. What another training gives, the seeds say.
    """
    from pipeline import compare as comparison

    print(comparison.text(load(), arguments.scale, arguments.task, arguments.model, arguments.other))


def speed(arguments: argparse.Namespace) -> int:
    """Times, every candidate in turn, kernels and layers after a correctness gate; run it where nothing else runs."""
    if arguments.figure4:
        _refuse(arguments, "--figure4", "quick", "shapes", "candidate", "keep_memory", "out")
    else:
        _refuse(arguments, "--kernels and --layer", "scale", "again")
    if arguments.layer:
        _refuse(arguments, "--layer", "shapes", "candidate")
    if arguments.figure4:
        from pipeline import figure4

        params = load()
        file = figure4.run(
            params,
            arguments.scale or params.scale,
            device=arguments.device,
            threads=arguments.threads,
            again=arguments.again,
            say=_say,
        )
        print(f"measurement: {file}")
        return 0
    if arguments.layer:
        from pipeline import speed_layer

        speed_layer.main(
            device=arguments.device or "auto",
            threads=arguments.threads or 1,
            quick=arguments.quick,
            out=arguments.out,
            keep_memory=arguments.keep_memory,
        )
        return 0
    from pipeline import speed as timing

    result = timing.run(
        shapes=arguments.shapes,
        quick=arguments.quick,
        device=arguments.device or "auto",
        threads=arguments.threads or 1,
        out=arguments.out,
        only=arguments.candidate,
        keep_memory=arguments.keep_memory,
        say=_say,
    )
    return 1 if any(text.startswith("wrong") for text in result["gate"].values()) else 0


def _refuse(arguments: argparse.Namespace, study: str, *names: str) -> None:
    """Refuses the options of `speed` that a study does not take."""
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]:
        raise UserError(f"speed: {study}: expected none of its other studies' options, got {', '.join(given)}")


def _refuse_for_a_fit(arguments: argparse.Namespace, name: str) -> None:
    """Refuses what scikit-learn's fit cannot do and was asked for by name; params.yaml's are the networks'."""
    for option, possible in (("device", ("auto", "cpu")), ("precision", ("auto", "float32")), ("compile", ("none",))):
        given = getattr(arguments, option)
        if given not in (None, *possible):
            raise UserError(f"--{option}: expected {' or '.join(possible)} for {name}, a fit on the CPU, got {given}")


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

    command = _add(commands, "trial", trial, "run one trial on this machine; needs no Ray, MLflow, DVC or datasets")
    _cell_options(command)
    command.add_argument("--seed", required=True, type=int, help="root seed of all random streams")
    _machine_options(command)
    command.add_argument(
        "--compile",
        choices=typing.get_args(Compile),
        help="training steps by torch.compile; reduce-overhead: as CUDA graphs; default: as params.yaml says",
    )
    command.add_argument("--again", action="store_true", help="run it although it is recorded")
    command.add_argument(
        "--other-sources", action="store_true",
        help="go on from a checkpoint that other sources made; the record names them and the report marks its figures",
    )  # fmt: skip
    command.add_argument(
        "--time-limit", type=_seconds, metavar="S", help="stop after the last epoch that ends within S seconds"
    )

    command = _add(commands, "tune", tune, "run the missing trials side by side with Ray Tune")
    _scale_option(command)
    command.add_argument("--task", action="append", choices=TASKS, help="may be repeated; default: all tasks")

    command = _add(commands, "status", status, "print the grid: done, running, diverged, failed, missing")
    _scale_option(command)

    command = _add(commands, "cost", cost, "project the GPU time of a scale; needs no Ray, MLflow, DVC or datasets")
    _scale_option(command)

    command = _add(
        commands,
        "profile",
        profile,
        "print where the time of a training step goes; needs no Ray, MLflow or DVC",
    )
    _cell_options(command)
    _machine_options(command)
    command.add_argument(
        "--steps", type=_count, default=20, help="so many are timed, then as many profiled; default: 20"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="writes all figures there: ms, bytes, shares")

    command = _add(commands, "sync", sync, "rebuild the MLflow view from the ledger")
    command.add_argument("--scale", choices=SCALES, help="default: all scales")

    command = _add(commands, "bundle", bundle, "pack code and processed data into one file to carry elsewhere")
    _scale_option(command)
    command.add_argument("--task", action="append", choices=TASKS, help="may be repeated; default: all tasks")
    command.add_argument("--out", type=Path, help="default: qrnn-<scale>.tar.xz")

    command = _add(commands, "import", take_in, "take in what trials and `speed --figure4` left on another machine")
    command.add_argument(
        "folder",
        type=Path,
        help="searched for seed-<n>.json and speed/<machine>.json; all are checked before one is taken",
    )
    command.add_argument(
        "--replace", action="store_true", help="a finished record takes the place of another one of the same trial"
    )

    command = _add(commands, "speed", speed, "measure the kernels, the layer or training steps beside their peers")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--kernels", action="store_true", help="the pooling kernels and their peers")
    what.add_argument("--layer", action="store_true", help="one layer against nn.LSTM (Figure 4, right), 320 units")
    what.add_argument(
        "--figure4",
        action="store_true",
        help="Figure 4 and a training step of each task, as params.yaml says for the scale, recorded for the report",
    )
    command.add_argument("--scale", choices=SCALES, help="--figure4: default: the scale that params.yaml names")
    command.add_argument("--again", action="store_true", help="--figure4: measure although it is recorded")
    command.add_argument("--quick", action="store_true", help="a few shapes, few repeats")
    command.add_argument(
        "--shapes", help="--kernels: BxTxC, comma-separated; default: the paper's, the tasks', long ones"
    )
    command.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME",
        help="--kernels: measure this one, by the name that is printed; may be given several times; default: all",
    )
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="default: auto; --figure4: as params.yaml says"
    )
    command.add_argument("--threads", type=_count, help="CPU threads; default: 1; --figure4: as params.yaml says")
    command.add_argument(
        "--keep-memory",
        action="store_true",
        help="freed memory stays with the process, as in trials; default: the C library gives it back",
    )
    command.add_argument("--out", type=Path, help="JSON file for all figures")

    command = _add(commands, "report", report, "write tables, claims, figures and report.md from the ledger")
    _scale_option(command)

    command = _add(commands, "verify", verify, "recompute the results of a scale from the raw records")
    _scale_option(command)

    command = _add(
        commands, "compare", compare, "hold two models against each other, example by example of the test set"
    )
    _cell_options(command)
    command.add_argument("--other", required=True, metavar="MODEL", help="the row whose figure is subtracted")
    return parser


def _add(commands, name, function, text):  # type: ignore[no-untyped-def]
    command = commands.add_parser(name, help=text, description=f"{function.__doc__} {text[0].upper()}{text[1:]}.")
    command.set_defaults(command=function)
    return command


def _scale_option(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", required=True, choices=SCALES)


def _cell_options(command: argparse.ArgumentParser) -> None:
    _scale_option(command)
    command.add_argument("--task", required=True, choices=TASKS)
    command.add_argument("--model", required=True, help="a row of the task's table, such as qrnn or lstm")


def _machine_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as params.yaml says")
    command.add_argument("--threads", type=_count, help="CPU threads; default: as params.yaml says")
    command.add_argument(
        "--precision",
        choices=typing.get_args(Precision),
        help="of matrix products; default: as params.yaml says",
    )


def _machine(arguments: argparse.Namespace, params: Params) -> dict[str, typing.Any]:
    """What to run on: as asked, else as params.yaml says."""
    compute = params.compute(arguments.scale)
    asked = [name for name in ("device", "threads", "precision", "compile") if name in arguments]
    return {name: getattr(arguments, name) or getattr(compute, name) for name in asked}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def _say(progress: object) -> None:
    print(progress, flush=True)


def _dvc(*arguments: str) -> int:
    """Runs dvc and waits for its own end: cut off, it could leave half a dvc.lock and a stage that runs on.

    Ctrl-C, SIGTERM and the end of the terminal reach it, and the stage that it runs, as SIGINT: of SIGTERM dvc dies at
    once and its stage does not hear. Where the end of the terminal is ignored (nohup), it stays so.
    """
    group: list[int] = []
    asked = []

    def interrupt(*_: object) -> None:
        asked.append(True)
        for leader in group:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGINT)

    # Before dvc starts, which would inherit that a shell's job in the background ignores SIGINT.
    ends = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handled = [signal.SIGINT, *(number for number in ends if signal.getsignal(number) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        child = subprocess.Popen([sys.executable, "-m", "dvc", *arguments], cwd=paths.root(), start_new_session=True)
        group.append(child.pid)
        if asked:  # before there was anybody to tell
            interrupt()
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_whole_lock() -> None:
    """DVC writes dvc.lock in place, so a machine that stopped can leave half of one, which DVC does not explain."""
    import yaml

    lock = paths.root() / "dvc.lock"
    if not lock.exists():
        return
    try:
        content = yaml.safe_load(lock.read_bytes())
    except yaml.YAMLError:
        content = None
    if not _is_whole(content):
        raise UserError(f"{lock}: expected DVC's list of stages, got a part of one (cut off?); remove it: recorded "
                        "trials are not run again")  # fmt: skip


def _is_whole(lock: typing.Any) -> bool:
    """Whether each stage of a lock has what DVC writes of it: cut off at the end of a line, a list is YAML too."""
    stages = lock.get("stages") if isinstance(lock, dict) else None
    return isinstance(stages, dict) and all(
        isinstance(stage, dict) and "cmd" in stage and stage.get("outs")
        and all(isinstance(one, dict) and {"path", "md5", "size"} <= one.keys()
                for one in (*(stage.get("deps") or ()), *stage["outs"]))
        for stage in stages.values()
    )  # fmt: skip


@contextlib.contextmanager
def _scale_set(scale: str) -> Iterator[None]:
    """The `scale` line of params.yaml set to `scale` for the block: DVC reads it there and takes no override."""
    file = paths.params_file()
    before = load().scale
    if before == scale:
        yield
        return
    _write_scale(file, scale)
    try:
        yield
    finally:  # what else was edited meanwhile stays
        _write_scale(file, before)


def _write_scale(file: Path, scale: str) -> None:
    text = file.read_text(encoding="utf-8")
    changed, count = re.subn(r"^(scale:\s*)\w+", rf"\g<1>{scale}", text, count=1, flags=re.MULTILINE)
    if not count:
        raise UserError(f"{file}: expected a line such as 'scale: sample' to put {scale} into, found none")
    files.write_text(file, changed)


if __name__ == "__main__":
    sys.exit(guarded(main))
