"""Records: identity, atomic writing, tampering, supersession, import."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_json

from pipeline import ledger, paths
from pipeline.errors import UserError
from pipeline.ledger import Identity, Intake, Standing
from pipeline.params import load


def record(**changes) -> dict:
    base = dict.fromkeys(ledger.REQUIRED)
    return {**base, "schema": 1, "key": "k" * 20, "scale": "sample", "task": "ptb", "model": "qrnn", "seed": 1,
            "status": "done", "code": {"fingerprint": "f"}, "config": {}, "data": {"hash": "d"}, "curve": [],
            "command": "python", "timing": {}, "started_at": 4.0, "finished_at": 5.0, "valid": {},
            "test": {"perplexity": 9.5}, **changes}  # fmt: skip


def test_written_record_reads_back_and_is_sealed(root: Path) -> None:
    file = ledger.write(record())
    assert file == root / "ledger/sample/ptb/qrnn/seed-1.json"
    assert ledger.read(file) == record()
    file.write_text(file.read_text().replace("9.5", "7.5"))
    with pytest.raises(UserError, match="was altered"):
        ledger.read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "no readable record"), ("[]", "expected a record, got list"), ('{"schema": 1}', "missing: key")],
)
def test_malformed_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "seed-1.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        ledger.read(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": None}, "record: code: expected a mapping, got 'None'"),
        ({"code": {"commit": "c"}}, "record: code.fingerprint: expected text, got 'None'"),
        ({"data": {}}, "record: data.hash: expected text, got 'None'"),
        ({"finished_at": None}, "record: finished_at: expected a whole number or a number, got 'None'"),
        ({"environment": "cpu"}, "record: environment: expected a mapping or null, got 'cpu'"),
        ({"test": None}, "record: test: expected a mapping, got 'None'"),
        ({"curve": [{"epoch": 1, "valid": {}}, 2]}, r"record\[1\]: curve: expected a mapping, got '2'"),
        ({"curve": [{"epoch": 1}]}, r"record\[0\]: curve.valid: expected a mapping, got 'None'"),
    ],
)
def test_a_field_of_another_kind_is_named(root: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ledger.write(record(**changes))
    ledger.write(record(status="diverged", test=None, valid=None))


def test_a_number_that_is_none_is_no_record(root: Path) -> None:
    file = ledger.write(record())
    file.write_text(file.read_text().replace("9.5", "NaN"))
    with pytest.raises(UserError, match="no readable record: expected finite numbers, got NaN"):
        ledger.read(file)


def test_full_disk_leaves_nothing_half_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ledger.write(record())
    before = first.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"seed-1\.json: the record could not be written: No space left on device"):
        ledger.write(record(test={"perplexity": 1.0}))
    with pytest.raises(UserError, match="No space left"):
        ledger.write(record(seed=2))
    assert first.read_bytes() == before
    assert [path.name for path in first.parent.iterdir()] == ["seed-1.json"]


def test_replaced_record_is_kept_aside(root: Path) -> None:
    ledger.write(record())
    ledger.write(record(key="n" * 20))
    assert [r["key"] for r in ledger.records("sample")] == ["n" * 20]
    kept = list((root / "ledger/sample/superseded").rglob("*.json"))
    assert [read_json(path)["key"] for path in kept] == ["k" * 20]


def test_identity_depends_on_recipe_data_and_seed_alone() -> None:
    params = load()
    trial = params.trial("sample", "ptb", "qrnn", 1)
    key = ledger.key(trial, "d1")
    assert key == ledger.key(load().trial("sample", "ptb", "qrnn", 1), "d1")
    others = [
        ledger.key(trial, "d2"),
        ledger.key(params.trial("sample", "ptb", "qrnn", 2), "d1"),
        ledger.key(params.trial("sample", "ptb", "qrnn-zoneout", 1), "d1"),
    ]
    assert len({key, *others}) == 4


def test_a_parameter_at_its_default_is_no_part_of_the_identity(root: Path) -> None:
    """So a record made before the parameter was there stands; one made with another value of it does not."""
    trial = load().trial("paper", "ptb", "qrnn", 1)
    before = {name: value for name, value in trial.config.items() if name not in ("window_inputs", "betas")}
    wanted = ledger.identity(trial, "d")
    assert trial.config["window_inputs"] == "carry"
    ledger.write(record(scale="paper", config=before, code={"fingerprint": "then"}))
    assert ledger.standing(trial, wanted) is Standing.DONE
    ledger.write(record(scale="paper", config=before | {"window_inputs": "zero"}))
    assert ledger.standing(trial, wanted) is Standing.MISSING
    ledger.write(record(scale="paper", config=before | {"dropped_since": 1}))
    assert ledger.standing(trial, wanted) is Standing.MISSING
    del before["unroll"]  # has no default
    ledger.write(record(scale="paper", config=before))
    assert ledger.standing(trial, wanted) is Standing.MISSING


@pytest.mark.parametrize(
    ("scale", "changes", "sources", "expected"),
    [
        ("sample", {}, "same", Standing.DONE),
        ("sample", {}, "other", Standing.MISSING),
        ("paper", {}, "other", Standing.DONE),
        ("paper", {"hidden": 1}, "same", Standing.MISSING),
    ],
)
def test_standing(root: Path, scale: str, changes: dict, sources: str, expected: Standing) -> None:
    trial = load().trial(scale, "ptb", "qrnn", 1)
    wanted = Identity(ledger.key(trial, "d"), "same")
    assert ledger.standing(trial, wanted) is Standing.MISSING
    ledger.write(record(scale=scale, config=trial.config | changes, code={"fingerprint": sources}))
    assert ledger.standing(trial, wanted) is expected


def test_fingerprint_covers_the_task_and_not_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qrnn", "pipeline"):
        shutil.copytree(paths.CODE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "CODE", tmp_path)
    monkeypatch.setattr(ledger, "fingerprint", ledger.fingerprint.__wrapped__)  # without what this process remembers
    before = {task: ledger.fingerprint(task) for task in ("ptb", "imdb")}
    with (tmp_path / "pipeline/tasks/ptb.py").open("a") as file:
        file.write("changed = 1\n")
    assert ledger.fingerprint("ptb") != before["ptb"]
    assert ledger.fingerprint("imdb") == before["imdb"]
    with (tmp_path / "qrnn/__init__.py").open("a") as file:
        file.write("changed = 1\n")
    assert ledger.fingerprint("imdb") != before["imdb"]


@pytest.fixture
def hash_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The hash of sources that are this text alone."""
    (tmp_path / "qrnn").mkdir()
    monkeypatch.setattr(paths, "CODE", tmp_path)

    def found(text: str) -> str:
        (tmp_path / "qrnn/layer.py").write_text(text)
        return ledger.sources_hash()

    return found


CODE = """\
'''What it is for.'''
SIZE = 2  # units
def f(x):
    "Doubles."
    return x * SIZE
"""


@pytest.mark.parametrize(
    "edited",
    [
        CODE.replace("What it is for", "What it was for"),
        CODE.replace("  # units", "\n# of h\n"),
        CODE.replace('    "Doubles."\n', ""),
        CODE.replace("(x)", "(\n    x,\n)"),
        CODE + '"A string that nothing takes."\n',
    ],
)
def test_what_is_said_about_the_code_is_not_hashed(hash_of: Callable[[str], str], edited: str) -> None:
    assert edited != CODE
    assert hash_of(edited) == hash_of(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2", "3"),
        ("2", "2.0"),
        ("x *", "x +"),
        ("SIZE =", "SIZE: int ="),
        ("(x)", "(x, /)"),
        ('"Doubles."', 'print("Doubles.")'),
    ],
)
def test_every_change_of_the_code_is_hashed(hash_of: Callable[[str], str], old: str, new: str) -> None:
    assert old in CODE
    assert hash_of(CODE.replace(old, new)) != hash_of(CODE)


def test_import_takes_records_in_once_and_refuses_conflicts(root: Path, tmp_path_factory) -> None:
    there = tmp_path_factory.mktemp("elsewhere") / "ledger"
    ledger.write(record())
    ledger.write(record(seed=2))
    (root / "ledger").rename(there)
    assert ledger.take_in(there) == Intake(2, 0, 0)
    assert ledger.take_in(there) == Intake(0, 2, 0)
    ledger.write(record(seed=2, test={"perplexity": 1.0}))
    with pytest.raises(UserError, match=r"seed-2\.json: a finished record of the same trial is here and differs"):
        ledger.take_in(there)
    assert ledger.take_in(there, replace=True) == Intake(1, 1, 1)
    assert [r["test"]["perplexity"] for r in ledger.records("sample")] == [9.5, 9.5]
    kept = list((root / "ledger" / "sample" / "superseded").rglob("seed-2-*.json"))
    assert [json.loads(file.read_bytes())["test"] for file in kept] == [{"perplexity": 1.0}]


def test_import_never_trades_a_done_record_for_a_lesser_one(root: Path, tmp_path_factory) -> None:
    there = tmp_path_factory.mktemp("elsewhere") / "ledger"
    ledger.write(record(status="failed"))
    ledger.write(record(seed=2, config={"hidden": 1}))
    (root / "ledger").rename(there)
    ledger.write(record())
    kept = record(seed=2)
    ledger.write(kept)
    with pytest.raises(
        UserError, match=r"seed-2.json: a finished record .* is of another recipe or other data; --repl"
    ):
        ledger.take_in(there)
    assert [r["config"] for r in ledger.records("sample")][1] == kept["config"]
    taken = str(ledger.take_in(there, replace=True))
    assert taken == "1 records imported (1 in place of others, kept under superseded/), 1 here already"
    assert [r["status"] for r in ledger.records("sample")] == ["done", "done"]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_import_of_two_records_of_a_trial_takes_the_one_that_is_done(root: Path, tmp_path: Path, order: tuple) -> None:
    """Whichever is found last; two that are done and differ are refused."""

    def left_on(machine: str, one: dict) -> None:
        file = tmp_path / "back" / machine / "seed-1.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**one, "checksum": ledger.checksum(one)}))

    left_on(order[0], record())
    left_on(order[1], record(status="failed", finished_at=9.0))
    assert ledger.take_in(tmp_path / "back") == Intake(1, 0, 0)
    assert [r["status"] for r in ledger.records("sample")] == ["done"]
    left_on(order[1], record(test={"perplexity": 1.0}))
    with pytest.raises(UserError, match=r"seed-1\.json of ptb/qrnn: expected one finished record of a trial below the"):
        ledger.take_in(tmp_path / "back", replace=True)


def test_what_is_no_record_is_not_replaced(root: Path) -> None:
    file = ledger.write(record())
    file.write_text("{")
    with pytest.raises(UserError, match=r"seed-1\.json: expected a record to be replaced, found none .*; move it away"):
        ledger.write(record())
    assert file.read_text() == "{"


@pytest.mark.parametrize(
    ("field", "value"),
    [("task", "../../escaped"), ("model", "a/b"), ("model", ""), ("seed", -1), ("seed", "1"), ("seed", True)],
)
def test_names_that_would_leave_the_ledger_are_refused(root: Path, field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{field}: expected"):
        ledger.write(record(**{field: value}))
    assert list(root.rglob("*.json")) == []


def test_import_trades_neither_done_for_failed_of_another_recipe_nor_diverged_for_failed(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    there = tmp_path_factory.mktemp("elsewhere") / "ledger"
    ledger.write(record(status="failed", config={"hidden": 1}))
    ledger.write(record(seed=2, status="failed"))
    (root / "ledger").rename(there)
    ledger.write(record())
    ledger.write(record(seed=2, status="diverged"))
    assert ledger.take_in(there) == Intake(0, 2, 0)
    assert [r["status"] for r in ledger.records("sample")] == ["done", "diverged"]


def test_a_record_beside_its_place_is_named(root: Path) -> None:
    file = ledger.write(record())
    shutil.copy(file, file.with_name("seed-1-before.json"))
    with pytest.raises(
        UserError, match=r"seed-1-before\.json: expected a record of this place, got that of .*seed-1\.json"
    ):
        ledger.records("sample")


def test_import_checks_all_before_taking_one(root: Path, tmp_path_factory) -> None:
    there = tmp_path_factory.mktemp("elsewhere") / "ledger"
    ledger.write(record())
    bad = ledger.write(record(seed=2))
    bad.write_text(bad.read_text().replace("9.5", "7.5"))
    (root / "ledger").rename(there)
    with pytest.raises(UserError, match="was altered"):
        ledger.take_in(there)
    assert ledger.records("sample") == []
    with pytest.raises(UserError, match="no records"):
        ledger.take_in(root)
