"""Measurements of speed, beside the records of trials: ledger/<scale>/speed/<machine>.json.

Like a record it is written whole, with a checksum. A new one of the same kind of machine takes the place of the old:
Git has those of scale paper.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

from pipeline import files, ledger, paths
from pipeline.errors import UserError
from pipeline.params import SCALES, TASKS, Params, off_default, plain
from pipeline.processed import read_manifest

SCHEMA = 1
REQUIRED = ("schema", "scale", "settings", "command", "code", "environment", "load_1min", "layer", "steps", "parts",
            "started_at", "finished_at")  # fmt: skip
SOURCES = ("figure4.py", "speed_layer.py", "profile.py")  # of pipeline/, besides what decides a trial
KINDS = {
    "settings": dict, "settings.data": dict, "settings.recipes": dict, "code": dict, "code.fingerprint": str,
    "environment": dict, "environment.device": str, "environment.device_name": str, "layer": dict, "layer.grid": list,
    "layer.others": list, "layer.steps": list, "steps": dict, "parts": dict, "started_at": ledger.Number,
    "finished_at": ledger.Number,
}  # fmt: skip
MODELS = ("lstm", "qrnn")  # of every task, whose training steps are compared
TIMES = ("times_s", "times_ms")  # fields with the times of single calls, behind the figures beside them
MACHINE = ("device_name", "threads", "cpus", "hostname", "torch")  # what another measurement on it has in common

Measurement = dict[str, Any]


def name(environment: dict[str, Any]) -> str:
    """What a kind of machine is called in names of files: by its device, and on a CPU by the threads."""
    threads = f" threads {environment['threads']}" if environment["device"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{environment['device_name']}{threads}".lower()).strip("-")


def path(scale: str, environment: dict[str, Any]) -> Path:
    return paths.ledger(scale) / "speed" / f"{name(environment)}.json"


def settings(params: Params, scale: str) -> dict[str, Any]:
    """What a measurement at a scale is of, by params.yaml: sizes, seed, recipes, hashes of the data (None: no data)."""
    recipes = {task: params.task(scale, task).recipes for task in TASKS}
    return plain({
        **dataclasses.asdict(params.speed(scale)),
        "seed": params.seeds(scale)[0],
        "recipes": {task: {model: dataclasses.asdict(found[model]) for model in MODELS if model in found}
                    for task, found in recipes.items()},
        "data": {task: _data_hash(scale, task) for task in TASKS},
    })  # fmt: skip


def _data_hash(scale: str, task: str) -> str | None:
    try:
        return read_manifest(paths.processed(scale, task))["hash"]
    except UserError:
        return None


@functools.cache
def fingerprint() -> str:
    """Hash of the sources that decide what is measured: those of the trials of all tasks, and the measuring ones."""
    return ledger.sources_hash(*SOURCES, *ledger.DECISIVE, *(f"tasks/{task}.py" for task in TASKS))


def stands(file: Path, wanted: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Whether there is a measurement of these settings on this machine.

    At scale paper one of other sources stands, and the report says so.
    """
    if not file.exists():
        return False
    found = read(file)
    here = all(found["environment"].get(field) == environment[field] for field in MACHINE)
    differs = differences(found, wanted)
    return here and "settings" not in differs and (found["scale"] == "paper" or not differs)


def differences(measurement: Measurement, wanted: dict[str, Any]) -> list[str]:
    """In what a measurement is not what would be made now: "sources", "settings". Data not here are let pass."""
    data = {task: found for task, found in measurement["settings"]["data"].items() if wanted["data"].get(task)}
    present = {task: found for task, found in wanted["data"].items() if found}
    alike = _off_default({**measurement["settings"], "data": data}) == _off_default({**wanted, "data": present})
    sources = measurement["code"]["fingerprint"] == fingerprint()
    return [*([] if sources else ["sources"]), *([] if alike else ["settings"])]


def _off_default(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with what recipes set off the defaults alone: a new parameter leaves old measurements standing."""
    recipes = {task: {model: off_default(task, recipe) for model, recipe in models.items()}
               for task, models in settings["recipes"].items()}  # fmt: skip
    return {**settings, "recipes": recipes}


def write(measurement: Measurement) -> Path:
    """Writes a measurement atomically.

    Raises:
        UserError: it is malformed, or cannot be written (nothing is half-written then).
    """
    measurement = json.loads(files.canonical_json(measurement))  # as it will be read: numbers as names become text
    _check(measurement, "measurement")
    file = path(measurement["scale"], measurement["environment"])
    try:
        files.write_json(file, {**measurement, "checksum": ledger.checksum(measurement)})
    except OSError as error:
        raise UserError(f"{file}: the measurement could not be written: {error.strerror or error}") from error
    return file


def read(file: Path) -> Measurement:
    """Reads and checks one measurement.

    Raises:
        UserError: no JSON, a field missing or of another meaning, or a checksum that does not fit.
    """
    return ledger.read_sealed(file, "measurement", _check)


def all_of(scale: str | None = None) -> list[Measurement]:
    """All measurements (of one scale), by kind of machine."""
    return [read(file) for name in ([scale] if scale else SCALES)
            for file in sorted((paths.ledger(name) / "speed").glob("*.json"))]  # fmt: skip


def below(folder: Path) -> tuple[list[Measurement], list[Measurement]]:
    """Measurements anywhere below a folder, such as another machine's ledger: those to be taken in, and the others.

    To be taken in is what is the first of its kind of machine here, or newer than what is here.
    """
    found = sorted(map(read, folder.rglob("speed/*.json")), key=lambda one: one["finished_at"])
    newest = {path(one["scale"], one["environment"]): one for one in found}
    newer = [one for file, one in newest.items() if _newer(one, file)]
    return newer, [one for one in found if one not in newer]


def _newer(measurement: Measurement, file: Path) -> bool:
    return not file.exists() or read(file)["finished_at"] < measurement["finished_at"]


def _check(measurement: Any, where: str) -> None:
    if not isinstance(measurement, dict):
        raise UserError(f"{where}: expected a measurement, got {type(measurement).__name__}")
    missing = [name for name in REQUIRED if name not in measurement]
    if missing:
        raise UserError(f"{where}: expected the fields of a measurement, missing: {', '.join(missing)}")
    if measurement["schema"] != SCHEMA:
        raise UserError(f"{where}: expected schema {SCHEMA}, got {measurement['schema']!r}")
    if measurement["scale"] not in SCALES:
        raise UserError(f"{where}: expected a scale of {', '.join(SCALES)}, got {measurement['scale']!r}")
    ledger.require_kinds(measurement, KINDS, where)
