"""Measurements of speed, beside the records of trials: one file a machine, ledger/<scale>/speed/<machine>.json.

Like a record it is written whole, with a checksum, and read by the report alone. A new one of the same machine takes
the place of the old: Git has those of scale paper.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

from pipeline import files, ledger, paths
from pipeline.errors import UserError
from pipeline.params import SCALES, TASKS

SCHEMA = 1
REQUIRED = ("schema", "scale", "settings", "command", "code", "environment", "layer", "steps", "parts", "started_at",
            "finished_at")  # fmt: skip
SOURCES = ("figure4.py", "speed_layer.py", "profile.py")  # of pipeline/, besides what decides a trial

Measurement = dict[str, Any]


def name(environment: dict[str, Any]) -> str:
    """What a machine is called in names of files: by its device, and on a CPU by the threads."""
    threads = f" threads {environment['threads']}" if environment["device"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{environment['device_name']}{threads}".lower()).strip("-")


def path(scale: str, environment: dict[str, Any]) -> Path:
    return paths.ledger(scale) / "speed" / f"{name(environment)}.json"


@functools.cache
def fingerprint() -> str:
    """Hash of the sources that decide what is measured: those of the trials of all tasks, and the measuring ones."""
    return ledger.sources_hash(*SOURCES, *ledger.DECISIVE, *(f"tasks/{task}.py" for task in TASKS))


def stands(file: Path, settings: dict[str, Any]) -> bool:
    """Whether there is a measurement of these settings. At scale paper one of other sources stands, and is marked."""
    if not file.exists():
        return False
    found = read(file)
    return found["settings"] == settings and (found["scale"] == "paper" or not outdated(found))


def outdated(measurement: Measurement) -> bool:
    return measurement["code"]["fingerprint"] != fingerprint()


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
    try:
        measurement = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no readable measurement: {error}") from None
    _check(measurement, str(file))
    stated, found = measurement.pop("checksum", None), ledger.checksum(measurement)
    if stated != found:
        raise UserError(f"{file}: expected checksum {found}, found {stated}: the measurement was altered")
    return measurement


def all_of(scale: str) -> list[Measurement]:
    """The measurements of a scale, by machine."""
    return [read(file) for file in sorted((paths.ledger(scale) / "speed").glob("*.json"))]


def below(folder: Path) -> list[Measurement]:
    """The measurements found anywhere below a folder, such as another machine's ledger."""
    return [read(file) for file in sorted(folder.rglob("speed/*.json"))]


def take_in(found: list[Measurement]) -> int:
    """Writes those of them that are newer than what is here of their machine, or the first; returns how many."""
    newer = [one for one in found if _newer(one, path(one["scale"], one["environment"]))]
    for one in newer:
        write(one)
    return len(newer)


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
