"""The check of results against records finds what was made wrong by hand."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import cli
from test_figure3 import turning
from test_report import MANIFESTS, PRESENT, grid, record

from pipeline import files, ledger, measurements, paths, processed, report, rescoring, trial, verify
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.processed import Processed
from pipeline.report import speed
from pipeline.tasks.iwslt import Iwslt

VALIDATION = (120.0, 110.0, 115.0, 116.0, 117.0, 118.0)  # of the 6 epochs of scale sample


def perplexity(model: str, seed: int, test: float) -> dict[str, Any]:
    """A record whose second epoch is the best on validation."""
    curve = [{"epoch": epoch, "valid": {"perplexity": value}} for epoch, value in enumerate(VALIDATION, start=1)]
    made = record("ptb", model, seed, {"perplexity": test}, {"perplexity": 110.0})
    data = made["data"] | {"floors": MANIFESTS["ptb"]["floors"], "counts": {"test_tokens": 3}}
    return {**made, "curve": curve, "selected_epoch": 2, "data": data}


def measurement() -> dict[str, Any]:
    """The one of scale paper, as if it were of scale sample."""
    (file,) = (paths.CODE / "ledger/paper/speed").glob("amd-epyc-family-25-model-17-threads-2.json")
    return {**measurements.read(file), "scale": "sample"}


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Writes records and their report, has `spoil` change something, and gives what the check says."""
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    shutil.copy(paths.CODE / "params.yaml", tmp_path)

    def run(spoil: Callable[[], Any] = lambda: None, **changes: Any) -> list[str]:
        records = [perplexity("lstm", 1, 100.0), perplexity("lstm", 2, 104.0), perplexity("qrnn", 1, 90.0) | changes]
        for one in records:
            ledger.write(one)
        measurements.write(measurement())
        fast = [speed.summary(measurement(), measurement()["settings"])]
        report.build("sample", records, MANIFESTS, grid(("ptb", "lstm"), ("ptb", "qrnn")), PRESENT, fast)
        spoil()
        said: list[str] = []
        faults = verify.run("sample", said.append)
        assert faults == len(said) - 1
        return said

    return run


def change(name: str, edit: Callable[[Any], Any]) -> None:
    file = paths.results("sample") / name
    made = json.loads(file.read_bytes())
    edit(made)
    files.write_json(file, made)


def cell(made: dict[str, Any]) -> dict[str, Any]:
    """The LSTM's test perplexity: 100 and 104, so a mean of 102 and a standard deviation of sqrt(8)."""
    return next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "lstm")["cells"]["test.perplexity"]


def test_results_of_their_records_have_no_fault(checked: Callable[..., list[str]]) -> None:
    # Two models with parameters, validation and test perplexity.
    assert checked() == [
        "sample: 3 records (0 scored again from their outputs), 6 figures, 0 claims looked at; 0 faults"
    ]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"mean": 102.001}, "ptb/lstm test.perplexity: tables.json has mean 102.001, the records give 102.0"),
        ({"n": 3}, "ptb/lstm test.perplexity: tables.json has n 3, the records give 2"),
        ({"std": None}, "ptb/lstm test.perplexity: tables.json has std None, the records give 2.828"),
        (
            {"seeds": {"1": 100.0, "2": 99.0}},
            "ptb/lstm test.perplexity, seed 2: tables.json has 99.0, the record 104.0",
        ),
        (
            {"seeds": {"1": 100.0, "7": 104.0}},
            "ptb/lstm test.perplexity, seed 7: tables.json has 104.0, the record None",
        ),
    ],
)
def test_a_figure_that_the_records_do_not_give_is_named(
    checked: Callable[..., list[str]], edit: dict[str, Any], said: str
) -> None:
    assert checked(lambda: change("tables.json", lambda made: cell(made).update(edit)))[0].startswith(said)


def test_a_seed_that_was_left_out_is_named(checked: Callable[..., list[str]]) -> None:
    def drop(made: dict[str, Any]) -> None:
        row = next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "lstm")
        row["seeds"]["done"] = [1]

    said = "ptb/lstm: expected the seeds that ended well, [1, 2], in tables.json, found [1]"
    assert checked(lambda: change("tables.json", drop))[0] == said


def row_of(made: dict[str, Any], model: str) -> dict[str, Any]:
    return next(row for row in made["tables"]["ptb"]["models"] if row["model"] == model)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda made: row_of(made, "lstm")["stale"].update(recipe=[2]),
            "ptb/lstm: expected the seeds of another recipe, [], in tables.json, found [2]; `report` makes it anew",
        ),
        (
            lambda made: row_of(made, "qrnn")["stale"].update(data=[1]),
            "ptb/qrnn: expected the seeds of another data, [], in tables.json, found [1]; `report` makes it anew",
        ),
        (
            lambda made: made["tables"]["ptb"]["data"].update(hash="another"),
            "ptb: expected the data of a record or of those at hand in tables.json, found others",
        ),
        (
            lambda made: cell(made)["paper"].update(value=99.0),
            "ptb/lstm test.perplexity: expected the paper's figure {'value': 82.0, 'printed': '82.0'}, found",
        ),
        (
            lambda made: made["tables"]["ptb"]["cited"].pop(),
            "ptb: expected the figures of the cited works as published.json has them, found others",
        ),
    ],
    ids=["recipe", "data", "hash", "paper", "cited"],
)
def test_what_the_table_says_of_itself_is_not_believed(
    checked: Callable[..., list[str]], edit: Callable[[Any], Any], said: str
) -> None:
    assert any(line.startswith(said) for line in checked(lambda: change("tables.json", edit)))


def test_a_record_of_another_recipe_or_data_is_left_out_without_a_fault(checked: Callable[..., list[str]]) -> None:
    config = perplexity("qrnn", 1, 90.0)["config"]
    for changes in ({"config": config | {"hidden": 7}}, {"data": perplexity("qrnn", 1, 90.0)["data"] | {"hash": "e"}}):
        assert checked(**changes) == [
            "sample: 3 records (0 scored again from their outputs), 3 figures, 0 claims looked at; 0 faults"
        ]


def test_a_record_without_a_row_is_named(checked: Callable[..., list[str]]) -> None:
    def add() -> None:
        ledger.write(perplexity("qrnn", 1, 80.0) | {"model": "mine"})

    said = "ptb/mine, seed 1: expected a row for it in tables.json, found none; `report` makes it"
    assert checked(add)[0] == said


def test_floors_may_be_those_of_the_data_at_hand(checked: Callable[..., list[str]]) -> None:
    """A floor that is newer than the records is no part of the data's hash."""
    older = {"data": perplexity("qrnn", 1, 90.0)["data"] | {"floors": {}}}

    def at_hand(floors: dict[str, float]) -> list[str]:
        for model, seed in (("lstm", 1), ("lstm", 2), ("qrnn", 1)):
            ledger.write(perplexity(model, seed, 100.0) | older)
        files.write_json(paths.processed("sample", "ptb") / "manifest.json", MANIFESTS["ptb"] | {"floors": floors})
        made = json.loads((paths.results("sample") / "tables.json").read_bytes())
        return list(verify._floors(made, verify._records("sample")[0]))

    checked()
    assert at_hand(MANIFESTS["ptb"]["floors"]) == []
    assert at_hand({"unigram_perplexity": 1.0}) == [
        "ptb: expected the floors of its records or data in tables.json, found others"
    ]
    (paths.processed("sample", "ptb") / "manifest.json").unlink()  # in a clone without data
    made = json.loads((paths.results("sample") / "tables.json").read_bytes())
    assert list(verify._floors(made, verify._records("sample")[0])) == []


@pytest.mark.parametrize(
    "edit", [{"best": 109.0}, {"epoch": 3}, {"last": 110.0}, {"epochs": 7}], ids=lambda edit: next(iter(edit))
)
def test_a_course_of_validation_that_the_record_has_not_is_named(
    checked: Callable[..., list[str]], edit: dict[str, Any]
) -> None:
    def spoil(made: dict[str, Any]) -> None:
        row = next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "lstm")
        assert row["course"]["2"] == {"best": 110.0, "epoch": 2, "last": 118.0, "epochs": 6}
        row["course"]["2"].update(edit)

    said = "ptb/lstm, seed 2: expected the course of its validation, found another"
    assert checked(lambda: change("tables.json", spoil))[0] == said


def test_turns_of_states_that_the_record_has_not_are_named(checked: Callable[..., list[str]]) -> None:
    def spoil(made: dict[str, Any]) -> None:
        row = next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "qrnn")
        row["turns"]["1"]["fallen"] = 0.0

    def leave_out(made: dict[str, Any]) -> None:
        next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "qrnn")["turns"].clear()

    said = "ptb/qrnn: expected the turns of its records' states, found others"
    for edit in (spoil, leave_out):
        assert checked(lambda edit=edit: change("tables.json", edit), states=turning())[0] == said
    assert checked(states=turning())[-1].endswith("; 0 faults")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda took: took["A Processor, 2 threads"]["seeds"].update({"2": 41.0}),
         "ptb/lstm time on A Processor, 2 threads, seed 2: tables.json has 41.0, the record 40.0"),
        (lambda took: took["A Processor, 2 threads"].update({"max": 50.0}),
         "ptb/lstm time on A Processor, 2 threads: tables.json has max 50.0, the records give 40.0"),
        (lambda took: took.update({"Another": took.pop("A Processor, 2 threads")}),
         "ptb/lstm: expected the devices of its records, ['A Processor, 2 threads'], found ['Another']"),
    ],
)  # fmt: skip
def test_a_time_that_the_records_do_not_give_is_named(
    checked: Callable[..., list[str]], spoil: Callable[[dict[str, Any]], Any], told: str
) -> None:
    """The LSTM's two seeds took 20 and 40 seconds."""

    def edit(made: dict[str, Any]) -> None:
        spoil(next(row for row in made["tables"]["ptb"]["models"] if row["model"] == "lstm")["took"])

    assert told in checked(lambda: change("tables.json", edit))


def test_tables_of_another_version_are_refused(checked: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=r"tables.json: expected schema 2, got 1, of another version; `report` makes"):
        checked(lambda: change("tables.json", lambda made: made.update({"schema": 1})))


def test_an_altered_record_is_named(checked: Callable[..., list[str]]) -> None:
    def alter() -> None:
        file = ledger.path("sample", "ptb", "lstm", 2)
        file.write_text(file.read_text().replace("104.0", "80.0"))

    assert any("seed-2.json: expected checksum" in line for line in checked(alter))


def test_a_record_in_anothers_place_is_named(checked: Callable[..., list[str]]) -> None:
    def copy() -> None:
        shutil.copy(ledger.path("sample", "ptb", "lstm", 2), ledger.path("sample", "ptb", "qrnn", 2))

    assert "expected a record of this place, found sample ptb/lstm/seed-2" in checked(copy)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"selected_epoch": 3}, "expected epoch 2 to be tested by its validation perplexity, found 3"),
        ({"valid": {"perplexity": 109.0}}, "expected the validation of epoch 2 in the record's result, found another"),
    ],
)
def test_an_epoch_that_validation_does_not_select_is_named(
    checked: Callable[..., list[str]], changes: dict[str, Any], said: str
) -> None:
    assert checked(**changes)[0] == f"ptb/qrnn/seed-1: {said}"


@pytest.mark.parametrize(
    ("values", "patience", "last"),
    [
        ([120.0, 110.0], None, 6),  # cut short
        ([], None, 6),
        ([120.0, 110.0, 115.0, 116.0, 90.0, 100.0], None, None),
        ([120.0, 110.0, 115.0, 116.0, 90.0, 100.0], 2, 4),  # trained beyond its patience, to a better epoch
        ([120.0, 110.0, 115.0, 116.0], 2, None),
        ([120.0, 110.0, 115.0], 2, 6),
        ([120.0, 110.0, 110.0, 90.0, 95.0, 96.0], 2, None),  # an equal one is none better
        ([120.0, 110.0, 109.0, 108.0, 107.0, 106.0, 105.0], 2, 6),  # more epochs than the recipe has
        ([120.0, 110.0, 109.0, 108.0, 107.0, 106.0, 107.0, 108.0], 2, 6),  # and out of patience after them
    ],
)
def test_a_curve_that_its_recipe_does_not_end_is_named(
    checked: Callable[..., list[str]], values: list[float], patience: int | None, last: int | None
) -> None:
    config = perplexity("qrnn", 1, 90.0)["config"] | {"epochs": 6, "patience": patience}
    curve = [{"epoch": epoch, "valid": {"perplexity": value}} for epoch, value in enumerate(values, start=1)]
    best = 1 + values.index(min(values)) if values else None
    valid = curve[best - 1]["valid"] if best else {}
    found = checked(config=config, curve=curve, selected_epoch=best, valid=valid)
    said = f"ptb/qrnn/seed-1: expected training to end with epoch {last} by its recipe, found {len(values)} epochs"
    assert (said in found) == (last is not None)
    assert any("to end with epoch" in line for line in found) == (last is not None)


def test_a_test_text_that_was_cut_short_is_named(checked: Callable[..., list[str]]) -> None:
    outputs = {"outputs": [2.0, 2.0], "test": {"perplexity": math.exp(2.0), "tokens": 2}}
    assert checked(**outputs)[0] == "ptb/qrnn/seed-1: expected the 3 test tokens of its data, found 2"


def test_an_epoch_that_is_missing_from_a_curve_is_named(checked: Callable[..., list[str]]) -> None:
    curve = [{"epoch": epoch, "valid": {"perplexity": 110.0}} for epoch in (1, 3)]
    assert checked(curve=curve)[0] == "ptb/qrnn/seed-1: expected a curve of epochs 1, 2, ..., found [1, 3]"


def test_a_test_figure_that_the_outputs_do_not_give_is_named(checked: Callable[..., list[str]]) -> None:
    """Two sentences of 3 tokens in all: a perplexity of e^(6 / 3), recorded to four decimals of a sentence's nats."""
    outputs = {"outputs": [2.0, 4.0], "test": {"perplexity": math.exp(2.00002), "tokens": 3}}
    assert "3 records (1 scored again from their outputs)" in checked(**outputs)[0]
    outputs["test"]["perplexity"] = math.exp(2.0001)
    said = checked(**outputs)[0]
    assert said.startswith("ptb/qrnn/seed-1: the record has test perplexity 7.3897")
    assert said.endswith(f"its outputs give {math.exp(2.0)}")


@pytest.mark.parametrize(
    ("task", "outputs", "figure", "expected"),
    [
        ("imdb", "0110", "accuracy", 75.0),  # the third is wrong
        ("imdb", "010", "accuracy", math.nan),
        # All n-grams are right and 4 words stand for 5: only the brevity penalty, e^(1 - 5 / 4).
        ("iwslt", ["a b c d"], "bleu", 100 * math.exp(-0.25)),
        ("iwslt", ["a b c d", "e"], "bleu", math.nan),
    ],
)
def test_accuracy_and_bleu_by_hand(
    tmp_path: Path, task: str, outputs: str | list[str], figure: str, expected: float
) -> None:
    with processed.writing(tmp_path / "data") as writer:
        writer.array("test.labels", np.array([0, 1, 0, 0]))
        writer.lines("test.references", ["a b c d e"])
    got = rescoring.rescore({"task": task, "outputs": outputs}, Processed(tmp_path / "data"))
    assert got == (figure, pytest.approx(expected, rel=1e-9, nan_ok=True), pytest.approx(1e-9, abs=1e-9))


@pytest.mark.parametrize("task", ["imdb", "ptb", "iwslt"])
def test_a_trials_outputs_give_its_test_figure(data: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    references = Processed(paths.processed("sample", "iwslt")).lines("test.references")
    translations = [*references[:-1], "test b c d"]  # a model so small has no BLEU but 0
    monkeypatch.setattr(Iwslt, "translate", lambda self, model, split: translations)
    record = trial.run(load().trial("sample", task, "qrnn", 1), device="cpu", report=lambda progress: None)
    name, value, tolerance = rescoring.rescore(record, Processed(paths.processed("sample", task)))
    assert record["test"][name] == pytest.approx(value, rel=tolerance)
    examples = {"imdb": 16, "ptb": 34, "iwslt": 12}  # reviews; <eos> in 100 tokens, and what is after the last; pairs
    assert len(record["outputs"]) == examples[task]
    assert 0 < value < 100


def test_a_verdict_that_the_tables_do_not_give_is_named(
    checked: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = dict.fromkeys(("name", "claim", "place", "rule", "here", "paper"), "x")
    monkeypatch.setattr(verify.claims, "findings", lambda made: [{**words, "verdict": "undecided", "deviations": []}])
    assert "0 faults" in checked()[-1]
    said = checked(lambda: change("claims.json", lambda made: made[0].update(verdict="borne out")))
    assert said[0] == "claims.json: expected the verdicts that tables.json gives, found others"


def edit_text(name: str, old: str, new: str) -> None:
    file = paths.results("sample") / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda: edit_text("report.md", "102.0", "99.0"), "report.md: expected the text that tables.json"),
        (lambda: (paths.results("sample") / "report.md").unlink(), "report.md: expected the text that tables.json"),
        (lambda: edit_text("metrics.json", "102.0", "99.0"), "metrics.json: expected the figures of the records"),
        (
            lambda: change("tables.json", lambda made: made["tables"]["ptb"]["floors"].clear()),
            "ptb: expected the floors of its records or data in tables.json, found others",
        ),
        (
            lambda: change("tables.json", lambda made: made["speed"][0]["steps"]["imdb"].update(ratio=9.0)),
            "speed: expected the measurements of the ledger in tables.json, found others",
        ),
        (
            lambda: change("tables.json", lambda made: made["tables"]["ptb"]["floors"][0].update(bound=True)),
            "ptb: expected the floors of its records or data in tables.json, found others",
        ),
        (
            lambda: edit_text(
                "../../ledger/sample/speed/amd-epyc-family-25-model-17-threads-2.json", '"ratio_max"', '"ratio_may"'
            ),
            "expected checksum",
        ),
    ],
    ids=["report", "no-report", "metrics", "floors", "speed", "bound", "measurement"],
)
def test_what_was_changed_after_the_report_was_made_is_named(
    checked: Callable[..., list[str]], spoil: Callable[[], Any], said: str
) -> None:
    assert said in checked(spoil)[0]


STEPS = {  # by hand: the LSTM's steps take 3 and 1.5 times the QRNN's, all of them 9 / 5
    "times_ms": {"lstm": [3.0, 6.0], "qrnn": [1.0, 4.0]},
    "ms": {"lstm": {"median": 4.5, "p10": 3.3, "p90": 5.7}, "qrnn": {"median": 2.5, "p10": 1.3, "p90": 3.7}},
    "ratio": 1.8,
    "ratios": {"median": 2.25, "p10": 1.65, "p90": 2.85},
}
CALLS = {  # by hand: single calls take 2, 2 and 1.5 times as long, the medians 6 and 3
    "times_s": {"lstm": [2.0, 6.0, 9.0], "qrnn": [1.0, 3.0, 6.0]},
    "lstm_s": 6.0,
    "qrnn_s": 3.0,
    "ratio": 2.0,
    "ratio_min": 1.5,
    "ratio_max": 2.0,
}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda _: None, []),
        (lambda made: made["steps"]["imdb"].update(ratio=2.0), ["imdb"]),
        (lambda made: made["steps"]["imdb"]["ratios"].update(p10=1.6), ["imdb"]),
        (lambda made: made["steps"]["imdb"]["ms"]["qrnn"].update(median=1.0), ["imdb"]),
        (lambda made: made["layer"]["grid"][0]["training"].update(ratio_min=1.9), ["batch 8, T = 32, training"]),
        (lambda made: made["layer"]["others"][0]["inference"].update(lstm_s=2.0), ["batch 20, T = 105, inference"]),
        (lambda made: made["layer"]["steps"][0].update(ratio_max=3.0), ["one step, batch 1"]),
    ],
)
def test_ratios_that_single_times_do_not_give_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], Any], said: list[str]
) -> None:
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    made = measurement()
    made["steps"]["imdb"].update(copy.deepcopy(STEPS))
    for found in (*made["layer"]["grid"], *made["layer"]["others"]):
        found.update(inference=dict(CALLS), training=dict(CALLS))
    made["layer"]["steps"] = [{**step, **CALLS} for step in made["layer"]["steps"]]
    edit(made)
    measurements.write(made)
    fast = speed.summary(made, made["settings"])
    assert "times" not in str(fast)  # the report's tables have the figures alone
    faults = list(verify._speed("sample", {"speed": [fast]}))
    expected = "expected the figures that its single times give, found others"
    assert faults == [f"speed, {fast['name']}: {where}: {expected}" for where in said]


def test_the_command_ends_with_1_where_there_are_faults(checked: Callable[..., list[str]]) -> None:
    checked()
    assert cli("verify", "--scale", "sample").returncode == 0
    change("tables.json", lambda made: cell(made).update(mean=1.0))
    assert cli("verify", "--scale", "sample").returncode == 1


def test_results_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"tables.json: expected the results of this scale, found none"):
        verify.run("sample")
