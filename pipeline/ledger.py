"""The ledger: one record a trial, written once and whole. Everything else (Tune, MLflow, tables) is a projection of it.

A trial's identity (`key`) is a hash of its resolved recipe, the hash of its processed data and its seed. A record also
carries a fingerprint of the sources that decide its number; see `standing`.
"""

import json
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline import files, paths
from pipeline.errors import UserError
from pipeline.params import SCALES, Trial

SCHEMA = 1
STATUSES = ("done", "diverged", "failed")
REQUIRED = ("schema", "key", "scale", "task", "model", "seed", "status", "error", "command", "config", "code", "data",
            "environment", "parameters", "curve", "selected_epoch", "valid", "test", "timing", "peak_bytes",
            "started_at", "finished_at")  # fmt: skip

Record = dict[str, Any]


class Standing(Enum):
    """How a trial stands against the ledger."""

    MISSING = "missing"  # no record, or one of another recipe, of other data or (not at scale paper) of other sources
    DONE = "done"
    DIVERGED = "diverged"
    FAILED = "failed"


@dataclass(frozen=True)
class Identity:
    """What a record must agree with to stand for a trial."""

    key: str
    fingerprint: str


def key(trial: Trial, data_hash: str) -> str:
    """Identity of a trial, 20 hexadecimal digits."""
    cell = trial.cell
    parts = {"task": cell.task, "model": cell.model, "config": trial.config, "data": data_hash, "seed": trial.seed}
    return files.sha256_text(files.canonical_json(parts))[:20]


def fingerprint(task: str) -> str:
    """Hash (20 hexadecimal digits) of the sources that decide a trial's number: qrnn/, the task's file, the loop."""
    sources = [
        *sorted((paths.CODE / "qrnn").rglob("*.py")),
        *(
            paths.CODE / "pipeline" / name
            for name in ("trial.py", "checkpoint.py", "optimise.py", "tasks/base.py", f"tasks/{task}.py")
        ),
    ]
    hashes = {path.relative_to(paths.CODE).as_posix(): files.sha256_file(path) for path in sources}
    return files.sha256_text(files.canonical_json(hashes))[:20]


def identity(trial: Trial, data_hash: str) -> Identity:
    return Identity(key(trial, data_hash), fingerprint(trial.cell.task))


def path(scale: str, task: str, model: str, seed: int) -> Path:
    return paths.ledger(scale) / task / model / f"seed-{seed}.json"


def path_of(trial: Trial) -> Path:
    return path(trial.cell.scale, trial.cell.task, trial.cell.model, trial.seed)


def standing(trial: Trial, wanted: Identity) -> Standing:
    """Compares a trial with its record. At scale paper a record of other sources stands, and the report says so."""
    file = path_of(trial)
    if not file.exists():
        return Standing.MISSING
    record = read(file)
    if record["key"] != wanted.key:
        return Standing.MISSING
    if trial.cell.scale != "paper" and record["code"]["fingerprint"] != wanted.fingerprint:
        return Standing.MISSING
    return Standing(record["status"])


def write(record: Record) -> Path:
    """Writes a record atomically. One it replaces is kept under `superseded/`, by its key and time.

    Raises:
        UserError: the record is malformed, or cannot be written (nothing is half-written then).
    """
    _check(record, "record")
    file = path(record["scale"], record["task"], record["model"], record["seed"])
    sealed = {**record, "checksum": checksum(record)}
    try:
        if file.exists():
            _supersede(file)
        files.write_json(file, sealed)
    except OSError as error:
        raise UserError(f"{file}: the record could not be written: {error.strerror or error}") from error
    return file


def read(file: Path) -> Record:
    """Reads and checks one record.

    Raises:
        UserError: no JSON, a field missing or of another meaning, or a checksum that does not fit.
    """
    try:
        record = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no readable record: {error}") from None
    _check(record, str(file))
    stated = record.pop("checksum", None)
    if stated != checksum(record):
        raise UserError(f"{file}: expected checksum {checksum(record)}, found {stated}: the record was altered")
    return record


def records(scale: str | None = None) -> list[Record]:
    """All records (of one scale), by scale, task, model, seed."""
    found = [read(file) for name in ([scale] if scale else SCALES)
             for file in paths.ledger(name).glob("*/*/seed-*.json") if file.parts[-3] != "superseded"]  # fmt: skip
    return sorted(found, key=lambda r: (SCALES.index(r["scale"]), r["task"], r["model"], r["seed"]))


def outcome(record: Record) -> str:
    """One line on a finished trial."""
    if record["status"] != "done":
        return f"{record['status']}: {record['error']}"
    figures = "  ".join(f"{k} {v:.2f}" for k, v in record["test"].items() if isinstance(v, float))
    return f"recorded  test: {figures}  (epoch {record['selected_epoch']} selected)"


def checksum(record: Record) -> str:
    return files.sha256_text(files.canonical_json({k: v for k, v in record.items() if k != "checksum"}))


def take_in(folder: Path) -> tuple[int, int]:
    """Imports the records found below `folder`; returns how many were new and how many were there already.

    All are checked before the first is written. A record that differs from one of the same key already here is refused.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to import records from")
    found = [read(file) for file in sorted(folder.rglob("seed-*.json")) if "superseded" not in file.parts]
    if not found:
        raise UserError(f"{folder}: no records (seed-<n>.json) found below it")
    new = [record for record in found if not _present(record)]
    for record in new:
        write(record)
    return len(new), len(found) - len(new)


def _present(record: Record) -> bool:
    file = path(record["scale"], record["task"], record["model"], record["seed"])
    if not file.exists():
        return False
    here = read(file)
    if here == record:
        return True
    if here["key"] == record["key"] and here["status"] == record["status"] == "done":
        raise UserError(f"{file}: a finished record of the same trial is here and differs; remove one of the two")
    return False


def _supersede(file: Path) -> None:
    old = json.loads(file.read_bytes())
    scale, task, model = old["scale"], old["task"], old["model"]
    kept = paths.ledger(scale) / "superseded" / task / model
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / f"{file.stem}-{old['key'][:12]}-{int(old['finished_at'])}.json"
    if not target.exists():
        os.link(file, target)


def _check(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a record, got {type(record).__name__}")
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        raise UserError(f"{where}: expected the fields of a record, missing: {', '.join(missing)}")
    if record["schema"] != SCHEMA:
        raise UserError(f"{where}: expected schema {SCHEMA}, got {record['schema']!r}")
    if record["status"] not in STATUSES:
        raise UserError(f"{where}: expected a status of {', '.join(STATUSES)}, got {record['status']!r}")
    if record["scale"] not in SCALES:
        raise UserError(f"{where}: expected a scale of {', '.join(SCALES)}, got {record['scale']!r}")
