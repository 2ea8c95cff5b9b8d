"""The ledger: one record a trial, written once and whole. Everything else (Tune, MLflow, tables) is a projection of it.

A trial's identity (`key`) is a hash of what its recipe sets off the defaults, the hash of its processed data and its
seed. A record also carries a fingerprint of the code that decides its number; see `standing`.
"""

import ast
import functools
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline import files, paths
from pipeline.errors import UserError
from pipeline.params import NAME, SCALES, Trial, off_default, trial_name

SCHEMA = 1
# Of pipeline/, besides the task's own file: what decides the number that a trial ends with.
DECISIVE = ("trial.py", "nbsvm.py", "checkpoint.py", "optimise.py", "machine.py", "processed.py", "tasks/base.py")
STATUSES = ("done", "diverged", "failed")
REQUIRED = ("schema", "key", "scale", "task", "model", "seed", "status", "error", "command", "config", "code", "data",
            "environment", "parameters", "curve", "selected_epoch", "valid", "test", "timing", "peak_bytes",
            "started_at", "finished_at")  # fmt: skip

Number = int | float
KINDS = {  # of a record's fields, and of fields in them
    "key": str, "command": str, "config": dict, "code": dict, "code.fingerprint": str, "data": dict, "data.hash": str,
    "environment": dict | None, "error": str | None, "parameters": int | None, "curve": list,
    "selected_epoch": int | None, "valid": dict | None, "test": dict | None, "timing": dict, "peak_bytes": int | None,
    "started_at": Number, "finished_at": Number,
}  # fmt: skip
KIND_NAMES = {str: "text", dict: "a mapping", list: "a list", int: "a whole number", float: "a number",
              types.NoneType: "null"}  # fmt: skip

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
    return _key(trial.cell.task, trial.cell.model, trial.config, data_hash, trial.seed)


def key_of(record: Record) -> str:
    """Identity of the trial that a record is of, by today's rule (its own `key` may be by an earlier one)."""
    return _key(record["task"], record["model"], record["config"], record["data"]["hash"], record["seed"])


def _key(task: str, model: str, config: dict[str, Any], data_hash: str, seed: int) -> str:
    parts = {"task": task, "model": model, "config": off_default(task, config), "data": data_hash, "seed": seed}
    return files.sha256_text(files.canonical_json(parts))[:20]


@functools.cache
def fingerprint(task: str) -> str:
    """Hash of the sources that decide a trial's number: qrnn/, the task's file, the loop.

    Taken once a process: what is imported then goes on running, whatever becomes of the files.
    """
    return sources_hash(*DECISIVE, f"tasks/{task}.py")


def sources_hash(*names: str) -> str:
    """Hash (20 hexadecimal digits) of the code of qrnn/ and of these files of pipeline/."""
    sources = [*sorted((paths.CODE / "qrnn").rglob("*.py")), *(paths.CODE / "pipeline" / name for name in names)]
    hashes = {path.relative_to(paths.CODE).as_posix(): _code_hash(path.read_bytes()) for path in sources}
    return files.sha256_text(files.canonical_json(hashes))[:20]


@functools.cache
def _code_hash(source: bytes) -> str:
    return files.sha256_text(files.canonical_json(_code(ast.parse(source))))


def _code(part: Any) -> Any:
    """A syntax tree as a JSON value, without what decides nothing: layout, comments, strings that stand alone.

    Empty fields are left out, since versions of Python differ in those they have.
    """
    if isinstance(part, list):
        return [_code(one) for one in part if not _stands_alone(one)]
    if isinstance(part, ast.AST):
        fields = {name: _code(value) for name, value in ast.iter_fields(part) if value not in (None, [])}
        return {type(part).__name__: fields}
    return repr(part)


def _stands_alone(part: Any) -> bool:
    """Whether it is a docstring, or another string that nothing takes."""
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)


def identity(trial: Trial, data_hash: str) -> Identity:
    return Identity(key(trial, data_hash), fingerprint(trial.cell.task))


def path(scale: str, task: str, model: str, seed: int) -> Path:
    return paths.ledger(scale) / task / model / f"seed-{seed}.json"


def path_of(trial: Trial) -> Path:
    return path(trial.cell.scale, trial.cell.task, trial.cell.model, trial.seed)


def name_of(record: Record) -> str:
    return trial_name(record["task"], record["model"], record["seed"])


def standing(trial: Trial, wanted: Identity | None) -> Standing:
    """Compares a trial with its record. At scale paper a record of other sources stands, and the report says so.

    With None `wanted`, for want of data, a record of any data and sources will do if it is of the trial's recipe.
    """
    file = path_of(trial)
    if not file.exists():
        return Standing.MISSING
    record = read(file)
    sources = record["code"]["fingerprint"]
    wanted = wanted or Identity(key(trial, record["data"]["hash"]), sources)
    if key_of(record) != wanted.key:
        return Standing.MISSING
    if trial.cell.scale != "paper" and sources != wanted.fingerprint:
        return Standing.MISSING
    return Standing(record["status"])


def write(record: Record) -> Path:
    """Writes a record atomically. One it replaces is kept under `superseded/`, by its key and time.

    Raises:
        UserError: the record is malformed, or cannot be written (nothing is half-written then).
    """
    _check(record, "record")
    file = _file(record)
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
    return read_sealed(file, "record", _check)


def read_sealed(file: Path, what: str, check: Callable[[Any, str], None]) -> dict[str, Any]:
    """The content of a JSON file that bears its own checksum, once `check` (content, file) has let it pass.

    Raises:
        UserError: no JSON, or a checksum that does not fit; and what `check` raises.
    """
    try:
        content = json.loads(file.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no readable {what}: {error}") from None
    check(content, str(file))
    stated, found = content.pop("checksum", None), checksum(content)
    if stated != found:
        raise UserError(f"{file}: expected checksum {found}, found {stated}: the {what} was altered")
    return content


def _no_number(text: str) -> Any:
    raise ValueError(f"expected finite numbers, got {text}")


def records(scale: str | None = None) -> list[Record]:
    """All records (of one scale), by scale, task, model, seed.

    Raises:
        UserError: one is malformed or altered, or does not lie where its trial's record belongs.
    """
    found = []
    for file in (
        file for name in ([scale] if scale else SCALES) for file in paths.ledger(name).glob("*/*/seed-*.json")
    ):
        record = read(file)
        if _file(record) != file:
            raise UserError(f"{file}: expected a record of this place, got that of {_file(record)}; move it away")
        found.append(record)
    return sorted(found, key=lambda r: (SCALES.index(r["scale"]), r["task"], r["model"], r["seed"]))


def outcome(record: Record) -> str:
    """One line on a finished trial."""
    if record["status"] != "done":
        return f"{record['status']}: {record['error']}"
    figures = "  ".join(f"{k} {v:.2f}" for k, v in record["test"].items() if isinstance(v, float))
    selected = "" if record["selected_epoch"] is None else f"  (epoch {record['selected_epoch']} selected)"
    return f"recorded  test: {figures}{selected}"


def checksum(record: Record) -> str:
    return files.sha256_text(files.canonical_json({k: v for k, v in record.items() if k != "checksum"}))


@dataclass(frozen=True)
class Intake:
    """How many records an import took in, found here already, and of those taken in how many replaced another."""

    new: int
    known: int
    replaced: int

    def __str__(self) -> str:
        aside = f" ({self.replaced} in place of others, kept under superseded/)" if self.replaced else ""
        return f"{self.new} records imported{aside}, {self.known} here already"


def take_in(folder: Path, replace: bool = False, required: bool = True) -> Intake:
    """Imports the records found below `folder`. All are checked before the first is written.

    A trial that is done here keeps its record: one that failed or diverged elsewhere counts as known, as does one that
    failed there and diverged here. With `replace` a done record takes the place of another, which is kept under
    `superseded/`.

    Raises:
        UserError: no such folder, no records in it though they are `required`, a malformed one, or two that are done
            and differ, in figures or in recipe or data.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to import records from")
    found = [read(file) for file in sorted(folder.rglob("seed-*.json")) if "superseded" not in file.parts]
    if not found and required:
        raise UserError(f"{folder}: no records (seed-<n>.json, speed/<machine>.json) found below it")
    found = _one_a_trial(found)
    new = [record for record in found if not _known(record, replace)]
    replaced = sum(_file(record).exists() for record in new)
    for record in new:
        write(record)
    return Intake(len(new), len(found) - len(new), replaced)


def _one_a_trial(found: list[Record]) -> list[Record]:
    """Of records of one trial the one that is done, else the latest; the same record twice counts once."""
    chosen: dict[Path, Record] = {}
    for record in sorted(found, key=lambda record: (record["status"] == "done", record["finished_at"])):
        other = chosen.get(_file(record))
        if other is not None and other != record and other["status"] == record["status"] == "done":
            raise UserError(f"{_file(record).name} of {record['task']}/{record['model']}: expected one finished record "
                            "of a trial below the folder, found two that differ")  # fmt: skip
        chosen[_file(record)] = record
    return list(chosen.values())


def _known(record: Record, replace: bool) -> bool:
    file = _file(record)
    if not file.exists():
        return False
    here = read(file)
    if here == record:
        return True
    if STATUSES.index(here["status"]) < STATUSES.index(record["status"]):
        return True
    if here["status"] == "done" and not replace:
        other = "differs" if key_of(here) == key_of(record) else "is of another recipe or other data"
        raise UserError(
            f"{file}: a finished record of the same trial is here and {other}; --replace takes the new one in and keeps"
            " this one under superseded/"
        )
    return False


def _file(record: Record) -> Path:
    return path(record["scale"], record["task"], record["model"], record["seed"])


def _supersede(file: Path) -> None:
    try:
        old = json.loads(file.read_bytes())
        scale, task, model = old["scale"], old["task"], old["model"]
        kept_as = f"{file.stem}-{old['key'][:12]}-{int(old['finished_at'])}.json"
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: expected a record to be replaced, found none ({error}); move it away") from None
    kept = paths.ledger(scale) / "superseded" / task / model
    target = kept / kept_as
    files.write_bytes(target, file.read_bytes())


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
    for name in ("task", "model"):  # both become names of folders
        if not isinstance(record[name], str) or not NAME.fullmatch(record[name]):
            raise UserError(f"{where}: {name}: expected small letters, digits and hyphens, got {record[name]!r}")
    require_kinds(record, KINDS, where)
    if record["status"] == "done":
        require_kinds(record, {"valid": dict, "test": dict}, where)
    for number, entry in enumerate(record["curve"]):
        require_kinds({"curve": entry}, {"curve": dict, "curve.epoch": int, "curve.valid": dict}, f"{where}[{number}]")
    if type(record["seed"]) is not int or record["seed"] < 0:
        raise UserError(f"{where}: seed: expected a whole number at least 0, got {record['seed']!r}")


def require_kinds(content: dict[str, Any], kinds: dict[str, Any], where: str) -> None:
    """Raises UserError unless each field is of its kind, a type or a union; a dot leads into a mapping."""
    for name, kind in kinds.items():
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            expected = " or ".join(KIND_NAMES[one] for one in typing.get_args(kind) or (kind,))
            raise UserError(f"{where}: {name}: expected {expected}, got {str(value)[:60]!r}")
