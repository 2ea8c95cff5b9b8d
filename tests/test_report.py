"""The report from hand-made records: its figures were worked out by hand, not by the code under test."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import write_ptb
from test_figure3 import turning

from pipeline import ledger, params, paths, recording, report
from pipeline.errors import UserError
from pipeline.report import claims, reading, tables
from pipeline.report import layout as layouts
from pipeline.report.figures import COLOURS

PARAMS = params.load(paths.CODE / "params.yaml")
SEEDS = (1, 2, 3)
PRESENT = {"imdb": "f1", "ptb": "f1", "iwslt": "f1"}
DATA = {"imdb": "d1" * 32, "ptb": "d2" * 32, "iwslt": "d3" * 32}
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"
CORPUS = {"id": "sample-corpus", "text": "made up | not the <real> one"}
GLOVE = {"id": "no-glove", "text": "vectors drawn at random"}
ENVIRONMENT = {"device": "cpu", "device_name": "A Processor", "threads": 2, "hostname": "secret-host"}


def trial(task, model, seed):
    return PARAMS.trial("sample", task, model, seed)


def grid(*cells):
    return [trial(task, model, seed) for task, model in cells for seed in SEEDS]


def record(task, model, seed, test, valid=None, **changes):
    valid = valid or test
    made = {
        "schema": 1, "key": f"{seed:020x}", "scale": "sample", "task": task, "model": model, "seed": seed,
        "status": "done", "error": None,
        "command": f"python -m pipeline trial --scale sample --task {task} --model {model} --seed {seed}",
        "config": trial(task, model, seed).config,
        "code": {"commit": "c0ffee0123456789", "dirty": seed == 2, "fingerprint": "f1"},
        "data": {"hash": DATA[task], "source": {"route": "sample"}, "counts": {}, "floors": {}, "deviations": [CORPUS]},
        "environment": ENVIRONMENT, "parameters": 123456,
        "curve": [{"epoch": e, "valid": {name: v * (1 + 1 / e) for name, v in valid.items() if isinstance(v, float)}}
                  for e in (1, 2)],
        "selected_epoch": 2, "valid": valid, "test": test,
        "timing": {"epoch_s": 10.0 * seed, "total_s": 20.0 * seed, "items_per_s": 1.0, "exclusive": False},
        "peak_bytes": 1, "started_at": 1_764_000_000.0, "finished_at": 1_764_000_000.0 + seed,
    }  # fmt: skip
    return {**made, **changes}


def ended(task, model, seed, status, error):
    nothing = dict.fromkeys(("parameters", "selected_epoch", "valid", "test", "peak_bytes"))
    return {**record(task, model, seed, {}), **nothing, "status": status, "error": error, "curve": []}


def accuracy(model, seed, value, **changes):
    test = {"accuracy": value, "loss": 0.5, "reviews": 1000}
    return record("imdb", model, seed, test, {"accuracy": value - 1.0}, **changes)


def manifest(task, floors, deviations=(CORPUS,)):
    return {"hash": DATA[task], "source": {"route": "sample"}, "counts": {"train_tokens": 929589, "words": {"all": 7}},
            "floors": floors, "deviations": list(deviations)}  # fmt: skip


MANIFESTS = {
    "imdb": manifest("imdb", {"majority_accuracy": 50.0, "bag_of_words_accuracy": 83.5}),
    "ptb": manifest("ptb", {"unigram_perplexity": 312.46, "entropy_floor_perplexity": 40.0}),
    "iwslt": manifest("iwslt", {"source_copy_bleu": 0.5, "source_copy_signature": SIGNATURE,
                                "unigram_bits_per_character": 4.25}),
}  # fmt: skip
GRID = grid(("imdb", "lstm"), ("imdb", "qrnn"), ("imdb", "qrnn-k4"), ("ptb", "lstm"), ("ptb", "qrnn"),
            ("ptb", "qrnn-zoneout"), ("iwslt", "lstm"), ("iwslt", "qrnn"))  # fmt: skip
# lstm 80, 82, 87: mean 83, deviations -3, -1, 4, variance (9 + 1 + 16) / 2 = 13, standard deviation 3.6056.
# qrnn 90, 91, 92: mean 91, standard deviation 1. ptb qrnn 100, 104: mean 102, variance 4 + 4 = 8, deviation 2.8284.
RECORDS = [
    accuracy("lstm", 1, 80.0), accuracy("lstm", 2, 82.0), accuracy("lstm", 3, 87.0),
    accuracy("qrnn", 1, 90.0), accuracy("qrnn", 2, 91.0), accuracy("qrnn", 3, 92.0),
    accuracy("qrnn-k4", 1, 83.0),
    ended("imdb", "qrnn-k4", 2, "diverged", "loss nan at epoch 1, step 50"),
    ended("imdb", "qrnn-k4", 3, "failed", "out | of memory"),
    ended("ptb", "lstm", 1, "failed", "killed"),
    record("ptb", "qrnn", 1, {"perplexity": 100.0, "tokens": 9}, {"perplexity": 110.0}),
    record("ptb", "qrnn", 2, {"perplexity": 104.0, "tokens": 9}, {"perplexity": 114.0}),
    record("iwslt", "qrnn", 1, {"bleu": 3.14159, "signature": SIGNATURE, "bits_per_character": 2.5}),
]  # fmt: skip


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds the report of given records into a fresh folder; returns its text and tables."""
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))

    def run(records=RECORDS, manifests=MANIFESTS, wanted=GRID, scale="sample", present=PRESENT):
        report.build(scale, records, manifests, wanted, present)
        folder = paths.results(scale)
        return (folder / "report.md").read_text("utf-8"), json.loads((folder / "tables.json").read_bytes())

    return run


def model(made, task, name):
    return next(row for row in made["tables"][task]["models"] if row["model"] == name)


def section(text, number):
    return re.search(rf"^## Table {number}\..*?(?=^## )", text, re.M | re.S).group()


def row(text, number, label):
    """Cells of a table's row, without marks."""
    lines = [line for line in section(text, number).splitlines() if line.startswith("|") and label in line]
    assert len(lines) == 1, lines
    return [re.sub(r"<sup>.*?</sup>", "", cell).strip() for cell in re.split(r"(?<!\\)\|", lines[0])[1:-1]]


def test_a_cell_holds_mean_sample_deviation_and_values_by_seed(build):
    _, made = build()
    cell = model(made, "imdb", "lstm")["cells"]["test.accuracy"]
    assert cell == {"paper": {"value": 90.9, "printed": "90.9"}, "n": 3, "mean": 83.0, "std": pytest.approx(13**0.5),
                    "min": 80.0, "max": 87.0, "seeds": {"1": 80.0, "2": 82.0, "3": 87.0}}  # fmt: skip
    assert model(made, "imdb", "lstm")["cells"]["timing.epoch_s"]["mean"] == 20.0
    assert model(made, "ptb", "qrnn")["cells"]["test.perplexity"]["std"] == pytest.approx(8**0.5)
    assert model(made, "iwslt", "qrnn")["cells"]["test.bleu"]["std"] is None


def test_rows_stand_beside_the_papers_with_sensible_digits(build):
    text, _ = build()
    assert row(text, 1, "**Densely connected LSTM**") == [
        "**Densely connected LSTM**", "123k", "480", "20.0 ± 10.0", "90.9", "83.00 ± 3.61", "3 of 3"]  # fmt: skip
    assert row(text, 2, "**QRNN**") == [
        "**QRNN**", "18M", "123k", "82.9", "112.0 ± 2.8", "79.9", "102.0 ± 2.8", "2 of 3 (1 not run)"]  # fmt: skip
    assert row(text, 3, "**Character-level QRNN**") == [
        "**Character-level QRNN**", "123k", "1.0 h", "10.0 s", "19.41", "3.14", "2.500",
        "1 of 3 (2 not run)"]  # fmt: skip


def test_works_that_the_paper_cites_stand_as_cited(build):
    text, _ = build()
    assert row(text, 1, "NBSVM-bi")[1:] == ["", "—", "", "91.2", "", ""]
    assert row(text, 2, "Kim et al.")[1:] == ["19M", "", "—", "", "78.9", "", ""]
    assert row(text, 3, "Ranzato")[1:] == ["", "—", "", "20.2", "", "", ""]


def test_floors_are_rows_in_the_column_they_are_measured_by(build):
    text, _ = build()
    assert row(text, 1, "bag-of-words classifier")[1:] == ["", "", "", "", "83.50", ""]
    assert row(text, 2, "*Bound*: exact entropy of the source")[1:] == ["", "", "", "", "", "40.0", ""]
    assert row(text, 2, "*Floor*: unigram model")[6] == "312.5"
    assert row(text, 3, "copying the source")[5:7] == ["0.500", ""]
    assert row(text, 3, "unigram model")[5:7] == ["", "4.250"]


def test_floors_without_a_column_or_a_known_name_are_not_lost():
    floors = layouts.floors({"floors": {"dev": {"trigram_perplexity": 9.5}, "chance": 0.5, "note": "text"}})
    assert [(floor.label, floor.path, floor.value, floor.bound) for floor in floors] == [
        ("Trigram", "valid.perplexity", 9.5, False), ("Chance", "chance", 0.5, False)]  # fmt: skip


def test_missing_failed_and_diverged_trials_are_counted_and_named(build):
    text, made = build()
    assert made["grid"] == {"trials": 24, "done": 10, "diverged": 1, "failed": 2, "missing": 11}
    assert "24 trials: 10 done, 1 diverged, 2 failed, 11 missing." in text
    assert row(text, 1, "wider first filter")[-1] == "1 of 3 (1 diverged, 1 failed)"
    assert row(text, 2, "**LSTM**")[2:6] == ["failed", "85.7", "failed", "82.0"]
    assert row(text, 2, "**LSTM**")[-1] == "0 of 3 (1 failed, 2 not run)"
    assert row(text, 3, "**Character-level LSTM**")[5] == "not run"
    assert "- `imdb/qrnn-k4/seed-2` diverged: loss nan at epoch 1, step 50" in text
    assert r"- `imdb/qrnn-k4/seed-3` failed: out \| of memory" in text


def test_a_grid_of_which_nothing_ran_makes_a_report(build):
    text, made = build([], {})
    assert made["grid"]["missing"] == 24
    assert made["finished"] is None
    assert row(text, 1, "**Densely connected QRNN**")[3] == "not run"
    assert "None has ended yet." in text
    assert "![" not in text
    assert (paths.results("sample") / "figures").is_dir()


def test_products_in_less_than_float32_are_a_deviation(build):
    rounded = record("ptb", "qrnn", 1, {"perplexity": 90.0})
    rounded["environment"] = {**ENVIRONMENT, "precision": "bfloat16"}
    text, _ = build([rounded])
    assert "Deviation `precision`: matrix products in bfloat16 on" in text


def test_deviations_are_footnotes_on_the_cells_they_touch(build):
    with_glove = accuracy("qrnn", 1, 90.0)
    with_glove["data"]["deviations"] = [CORPUS, GLOVE]
    text, _ = build([accuracy("lstm", 1, 80.0), with_glove])
    lines = section(text, 1).splitlines()
    assert r"- <sup>a</sup> Deviation `sample-corpus`: made up \| not the &lt;real&gt; one" in lines
    assert "- <sup>b</sup> Deviation `imdb-max-tokens`: the first 300 tokens of a review only, of test too" in lines
    assert "- <sup>c</sup> Deviation `no-glove`: vectors drawn at random" in lines
    assert "80.00<sup>a,b</sup> |" in next(line for line in lines if "**Densely connected LSTM**" in line)
    assert "90.00<sup>a,b,c</sup> |" in next(line for line in lines if "**Densely connected QRNN**" in line)


def test_a_record_made_before_a_parameter_was_is_of_the_same_recipe(build):
    """The parameter has its default now, which is what was done then."""
    older = record("ptb", "qrnn", 1, {"perplexity": 90.0})
    older["config"] = {name: value for name, value in older["config"].items() if name != "betas"}
    assert older["config"] != trial("ptb", "qrnn", 1).config
    _, made = build([older])
    assert model(made, "ptb", "qrnn")["stale"] == {"sources": [], "recipe": [], "data": []}


def test_a_row_may_show_another_figure_of_a_models_trials(build):
    """The MC row has the perplexity over sampled masks; its trials are counted and plotted once, under their model."""
    config = trial("ptb", "lstm", 1).config
    made_of = [{**record("ptb", "lstm", seed, {"perplexity": 90.0 + seed, "perplexity_mc": 80.0 + seed, "tokens": 9}),
                "model": "lstm-variational", "config": config} for seed in (1, 2)]  # fmt: skip
    text, made = build(made_of, wanted=[])
    assert row(text, 2, "**Variational LSTM, MC")[-5:] == ["81.9", "91.5 ± 0.7", "79.7", "81.5 ± 0.7", "2 of 2"]
    assert row(text, 2, "**Variational LSTM (Gal")[-5:] == ["—", "91.5 ± 0.7", "—", "91.5 ± 0.7", "2 of 2"]
    assert made["grid"]["trials"] == made["grid"]["done"] == 2
    assert "another figure of the trials of `lstm-variational`" in section(text, 2)
    assert "- Variational LSTM, MC (Gal and Ghahramani, 2016): test probabilities averaged" in section(text, 2)
    drawn = (paths.results("sample") / "figures" / "curves-ptb.svg").read_bytes()
    assert b"Variational LSTM (Gal" in drawn
    assert b"Variational LSTM, MC" not in drawn


def test_a_trial_that_other_sources_began_is_marked_and_names_them(build):
    known = {"commit": "beef456789", "dirty": True, "fingerprint": "f0"}
    unknown = {"commit": None, "dirty": None, "fingerprint": "0123456789"}
    text, made = build([accuracy("lstm", 1, 80.0, earlier_code=[unknown, known]), accuracy("lstm", 3, 81.0)])
    assert model(made, "imdb", "lstm")["stale"] == {"sources": [1], "recipe": [], "data": []}
    assert text.count("`c0ffee01` after `sources 01234567, beef4567+` |") == 1
    assert text.count("| `c0ffee01` |") == 1


def test_records_of_other_sources_recipes_or_data_are_marked(build):
    other_sources = accuracy("lstm", 1, 80.0, code={"commit": None, "dirty": False, "fingerprint": "f0"})
    other_recipe = accuracy("qrnn", 2, 80.0, config={"layers": 9})
    other_data = accuracy("qrnn-k4", 3, 80.0)
    other_data["data"]["hash"] = "ff" * 32
    text, made = build([other_sources, other_recipe, other_data])
    assert model(made, "imdb", "lstm")["stale"] == {"sources": [1], "recipe": [], "data": []}
    for label, cell in (
        ("LSTM**", "80.00<sup>† a,b</sup>"),
        ("QRNN**", "not run"),
        ("wider first filter**", "not run"),
    ):
        assert cell in next(line for line in section(text, 1).splitlines() if label in line)
    assert "left out of every mean and figure: qrnn seed 2" in text
    assert "left out of every mean and figure: qrnn-k4 seed 3" in text
    assert "<sup>†</sup> Made, or begun, by other sources than the present ones: lstm seed 1" in text
    assert "| imdb/lstm/seed-1 | done † |" in text
    assert json.loads(paths.metrics("sample").read_bytes())["imdb"].keys() == {"lstm"}
    drawn = (paths.results("sample") / "figures" / "curves-imdb.svg").read_bytes()
    assert [name for name in ("LSTM", "QRNN", "wider first filter") if name.encode() in drawn] == ["LSTM"]


def test_a_seed_that_nobody_asks_for_is_held_against_its_cells_recipe(build):
    other = accuracy("qrnn", 3, 80.0, config={"layers": 9})
    same = accuracy("qrnn", 2, 90.0)
    _, made = build([other, same], wanted=[trial("imdb", "qrnn", 1)])
    assert model(made, "imdb", "qrnn")["stale"]["recipe"] == [3]
    assert model(made, "imdb", "qrnn")["cells"]["test.accuracy"]["mean"] == 90.0


def test_precision_is_a_deviation_that_tells_what_it_touches(build):
    environment = {**ENVIRONMENT, "precision": "bfloat16"}
    text, _ = build(
        [accuracy("lstm", 1, 80.0, environment=environment), accuracy("qrnn", 1, 80.0, environment=environment)]
    )
    where = "in bfloat16 on A Processor, 2 threads"
    assert f"Deviation `precision`: matrix products {where}" in section(text, 1)
    assert f"Deviation `precision`: matrix products and the LSTM's state {where}" in section(text, 1)
    assert "single seed on a side the spread is not known. In the paper it is 0.5 above, on its own corpus" in text
    assert text.count("The two did not run in the same precision; see the deviations.") == 1
    bleu = {"bleu": 3.0, "signature": SIGNATURE, "bits_per_character": 2.5}
    text, _ = build([record("iwslt", model, 1, bleu, environment=environment) for model in ("lstm", "qrnn")])
    for state in ("", " and the LSTM's state"):
        exact = "(not attention's and the output layer's)"
        assert f"Deviation `precision`: matrix products {exact}{state} {where}" in section(text, 3)
    elsewhere = {**environment, "device_name": "Another Processor"}
    alike = (build(), build([accuracy("qrnn-k4", 1, 80.0, environment=environment),
                             accuracy("qrnn", 1, 80.0, environment=elsewhere)]))  # fmt: skip
    assert not any("same precision" in text for text, _ in alike)


def test_a_floor_of_test_data_beside_curves_of_validation_says_so(build):
    build()
    drawn = (paths.results("sample") / "figures" / "curves-ptb.svg").read_text()
    assert "Unigram model (test)" in drawn


def test_a_trial_that_failed_with_another_recipe_is_not_run_with_this_one(build):
    failed = {**ended("imdb", "qrnn", 2, "diverged", "loss nan"), "config": {"layers": 9}}
    text, made = build([failed], wanted=grid(("imdb", "qrnn")))
    assert model(made, "imdb", "qrnn")["seeds"] == {"done": [], "diverged": [], "failed": [], "missing": [1, 2, 3]}
    assert "- `imdb/qrnn/seed-2` diverged: loss nan" in text  # and it is not hidden
    assert "left out of every mean and figure: qrnn seed 2" in text


def test_records_that_no_cell_is_of_say_nothing_of_choices_recipes_or_devices(build):
    """Left out of the means: those of another recipe or other data, failed and diverged ones."""

    def bleu(seed, status="done", data=DATA["iwslt"], device="A Processor", **config):
        made = record("iwslt", "qrnn", seed, {"bleu": 3.0, "signature": device, "bits_per_character": 2.5},
                      status=status, environment={**ENVIRONMENT, "device_name": device})  # fmt: skip
        return {**made, "config": {**made["config"], **config}, "data": {**made["data"], "hash": data}}

    others = [bleu(1, device="Other", encoder_states="c"), bleu(3, data="ff" * 32, extra_padding="right"),
              bleu(4, "failed", target_margin=9), bleu(5, "diverged", context_layers="last")]  # fmt: skip
    text, made = build([*others, bleu(2)])
    said = text.partition("## Choices")[2].partition("\n## ")[0]
    for name, value in (("encoder_states", "h"), ("extra_padding", "left"), ("target_margin", "5"),
                        ("context_layers", "all")):  # fmt: skip
        assert f"| `{name}` | {value} |" in said
    assert model(made, "iwslt", "qrnn")["config"] == trial("iwslt", "qrnn", 2).config
    table = made["tables"]["iwslt"]
    assert table["devices"] == ["A Processor, 2 threads"]
    assert "Other" not in table["signatures"]
    assert "No trial stands in the tables yet." in build(others)[0]


def test_recipes_take_an_older_record_for_what_it_did(build):
    """A parameter at its default, which the older record lacks, is shared by both models."""
    older = record("iwslt", "qrnn", 1, {"bleu": 3.0})
    older["config"] = {name: value for name, value in older["config"].items() if name != "target_margin"}
    text, _ = build([older, record("iwslt", "lstm", 1, {"bleu": 3.0})])
    shared = next(line for line in section(text, 3).splitlines() if line.startswith("- All models: "))
    assert r"target\_margin 5" in shared
    assert text.count(r"target\_margin 5") == 1


@pytest.mark.parametrize(("scale", "said"), [("sample", True), ("small", True), ("paper", False)])
def test_a_scale_that_is_not_the_papers_says_so(build, scale, said):
    text, made = build([], {}, [], scale)
    assert ("for orientation only" in text) is said
    assert made["comparable"] is not said


def test_times_are_labelled_as_no_exclusive_measurement(build):
    text, _ = build()
    note = next(line for line in section(text, 1).splitlines() if line.startswith("- <sup>t</sup>"))
    assert "on A Processor, 2 threads. What ran beside a trial is not known, so these are no measurements" in note
    untimed, _ = build([accuracy("lstm", 1, 80.0, timing=recording.timing([], None))])
    assert "- <sup>t</sup>" not in section(untimed, 1)  # there is no time to say it of
    assert "Time / epoch (s), here<sup>t</sup>" in text
    assert "<sup>t</sup>" not in section(text, 2)


def test_bleu_stands_with_its_signature_and_a_second_one_is_noticed(build):
    text, _ = build()
    assert f"- BLEU signature: `{SIGNATURE}`" in section(text, 3)
    other = record("iwslt", "qrnn", 1, {"bleu": 3.0, "signature": "nrefs:1|tok:none", "bits_per_character": 2.5})
    assert "- BLEU signatures differ: " in section(build([other])[0], 3)


def test_provenance_has_a_row_for_each_trial(build):
    text, _ = build()
    provenance = text.partition("## Provenance")[2]
    assert provenance.count("[record](") == len(RECORDS)
    line = next(line for line in provenance.splitlines() if line.startswith("| imdb/lstm/seed-2 "))
    for part in ("done", "82.00 accuracy (%)", "2 of 2", "`c0ffee01+`", f"`{DATA['imdb'][:12]}`", f"`{2:020x}`",
                 "`python -m pipeline trial --scale sample --task imdb --model lstm --seed 2`",
                 "A Processor, 2 threads", "[record](../../ledger/sample/imdb/lstm/seed-2.json)"):  # fmt: skip
        assert part in line.split(" | ") or f"{part} |" in line
    link = paths.results("sample") / "../../ledger/sample/imdb/lstm/seed-2.json"
    assert link.resolve() == ledger.path("sample", "imdb", "lstm", 2)
    assert "secret-host" not in text


def test_the_reading_tells_where_validation_was_best_and_where_it_ended(build):
    """Epochs 1 and 2 of a record have twice and 1.5 times its validation figure: 1.5 (100 + 104) / 2 = 153."""
    text, _ = build([record("ptb", "qrnn", 1, {"perplexity": 100.0}), record("ptb", "qrnn", 2, {"perplexity": 104.0}),
                     accuracy("lstm", 1, 41.0)])  # fmt: skip
    assert "- Validation perplexity, best and last (epoch), means over seeds: QRNN 153.0 (2) and 153.0 (2)." in text
    assert (
        "- Validation accuracy (%), best and last (epoch), means over seeds: Densely connected LSTM 80.00 (1) and "
        in text
    )


def test_the_reading_is_computed(build):
    text, _ = build()
    said = text.partition("## Reading")[2].partition("## Table")[0]
    assert "Densely connected QRNN is 8.00 above Densely connected LSTM (better), n = 3" in said  # 91 - 83
    assert "the larger standard deviation of the two is 3.61, the gap lies beyond it." in said
    assert "In the paper it is 0.5 above, on its own corpus and budget." in said
    assert ("Densely connected LSTM and Densely connected QRNN, wider first filter do not beat the floor: bag-of-words "
            "classifier (83.50); Densely connected QRNN beats it.") in said  # fmt: skip
    assert "QRNN beats the floor: unigram model (312.5)." in said
    assert "Closest comes QRNN with 102.0." in said
    exact = {**MANIFESTS, "imdb": {**MANIFESTS["imdb"], "deviations": []}}
    for manifests, aside in ((exact, ""), (MANIFESTS, ", on other data (see the deviations)")):
        paper = [{**record, "scale": "paper"} for record in RECORDS]
        assert f"In the paper it is 0.5 above{aside}." in build(paper, manifests, scale="paper")[0]
    assert "Character-level QRNN beats the floor: copying the source (0.500)." in said


UNKNOWN = "with a single seed on a side the spread is not known."
WITHIN = "the larger standard deviation of the two is 7.07, the gap lies within it."


@pytest.mark.parametrize(
    ("metric", "ours", "theirs", "expected"),
    [
        ("accuracy", {1: 83.0, 2: 85.0}, {1: 80.0, 2: 90.0}, f"is 1.00 below B (worse), n = 2; {WITHIN}"),
        ("accuracy", {1: 84.0}, {1: 80.0, 2: 90.0}, f"is 1.00 below B (worse), n = 1 and 2; {UNKNOWN}"),
        ("accuracy", {1: 80.0}, {1: 80.0}, f"equals B, n = 1; {UNKNOWN}"),
        ("perplexity", {1: 84.0}, {1: 85.5}, f"is 1.50 below B (better), n = 1; {UNKNOWN}"),
    ],
    ids=["within", "one seed", "equal", "lower is better"],
)
def test_a_comparison_says_no_more_than_the_seeds_allow(metric, ours, theirs, expected):
    path = f"test.{metric}"
    rows = [{"label": label, "cells": {path: {"paper": None, **tables.summary(figures)}}}
            for label, figures in (("A", ours), ("B", theirs))]  # fmt: skip
    assert reading.compare(*rows, layouts.Column(path)) == f"A {expected}"


def test_a_model_better_than_the_bound_is_pointed_out(build):
    text, _ = build([record("ptb", "qrnn", 1, {"perplexity": 39.0})])
    assert "QRNN (39.0) is better than the bound allows" in text
    nearer = record("ptb", "lstm", 1, {"perplexity": 40.5})
    assert (
        "QRNN (39.0) is better than the bound allows"
        in build([record("ptb", "qrnn", 1, {"perplexity": 39.0}), nearer])[0]
    )


def test_the_report_prints_what_tables_json_holds(build):
    text, made = build()
    checked = 0
    for table in made["tables"].values():
        layout = layouts.LAYOUTS[next(task for task, t in made["tables"].items() if t is table)]
        for row_ in table["models"]:
            if not any(row_["seeds"].values()):
                continue  # the paper's alone, tested below
            cells = row(text, table["number"], f"**{row_['label']}**")
            printed = iter(cells[1:])
            for column in table["columns"]:
                cell = row_["cells"][column["path"]]
                if column["paper"]:
                    assert next(printed) == (cell["paper"]["printed"] if cell["paper"] else "—")
                value = next(printed)
                if cell["n"]:
                    figures = re.fullmatch(r"([\d.]+)(k?)(?: ± ([\d.]+))?(?: s)?", value)
                    scale, places = 1000 if figures[2] else 1, len(figures[1].partition(".")[2])
                    assert float(figures[1]) * scale == pytest.approx(cell["mean"], abs=0.51 * scale / 10**places)
                    if figures[3]:
                        assert float(figures[3]) == pytest.approx(cell["std"], abs=0.51 / 10**places)
                    checked += 1
        assert layout.title == table["title"]
    assert checked == 3 * 3 + 3 + 4  # columns by models with a result


def test_rows_that_a_scale_asks_no_trials_of_stand_as_cited(build):
    """Only scale paper asks for the LSTMs of other works; nothing of them is not run elsewhere."""
    text, _ = build()
    assert row(text, 2, "LSTM (Zaremba") == ["LSTM (Zaremba et al., 2014)", "20M", "", "86.2", "", "82.7", "", ""]
    assert row(text, 2, "Variational LSTM, MC")[1:] == ["20M", "", "81.9", "", "79.7", "", ""]
    assert "Variational LSTM (Gal" not in section(text, 2)  # the paper has no figure of it either
    assert "Variational LSTM, MC" not in section(text, 2).replace("| Variational LSTM, MC", "")
    assert "0 of 0" not in text
    asked = [PARAMS.trial("paper", "ptb", "lstm-variational", 1)]
    text, _ = build([], wanted=asked)
    assert row(text, 2, "**Variational LSTM, MC")[-2:] == ["not run", "0 of 1 (1 not run)"]
    assert "- Variational LSTM, MC (Gal and Ghahramani, 2016): test probabilities averaged" in section(text, 2)


def test_every_table_has_as_many_cells_in_each_row(build):
    text, _ = build()
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 6  # three results, what they took, choices, provenance
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_metrics_file_holds_numbers_only(build):
    build()
    metrics = json.loads(paths.metrics("sample").read_bytes())
    assert metrics["imdb"]["lstm"]["test"]["accuracy"] == {"n": 3, "mean": 83.0, "std": pytest.approx(13**0.5)}
    assert metrics["imdb"]["lstm"]["test"].keys() == {"accuracy", "loss"}  # and not how many reviews there were
    assert metrics["imdb"]["qrnn-k4"]["trials"] == {"done": 1, "diverged": 1, "failed": 1}
    assert metrics["imdb"]["qrnn-k4"]["valid"] == {"accuracy": {"n": 1, "mean": 82.0}}
    assert metrics["ptb"]["lstm"] == {"trials": {"done": 0, "diverged": 0, "failed": 1}, "test": {}, "valid": {}}
    assert metrics["iwslt"]["qrnn"]["test"].keys() == {"bleu", "bits_per_character"}


def test_a_model_of_every_task_has_one_colour_in_every_figure(build):
    colours = {name: {value.lower() for value in COLOURS} for name in ("lstm", "qrnn")}
    for task, test in (("imdb", {"accuracy": 80.0}), ("ptb", {"perplexity": 90.0}),
                       ("iwslt", {"bleu": 3.0, "signature": SIGNATURE, "bits_per_character": 2.5})):  # fmt: skip
        for name, known in colours.items():
            build([record(task, name, 1, test)])
            drawn = (paths.results("sample") / "figures" / f"curves-{task}.svg").read_text().lower()
            known &= set(re.findall("stroke: (#[0-9a-f]{6})", drawn))
    assert [len(known) for known in colours.values()] == [1, 1]
    assert colours["lstm"] != colours["qrnn"]


def test_figures_are_the_same_bytes_twice_and_show_every_model_and_floor(build, monkeypatch):
    text, _ = build()
    file = paths.results("sample") / "figures" / "curves-imdb.svg"
    first = file.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    build()
    assert file.read_bytes() == first
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "![IMDB: sentiment classification: validation by epoch](figures/curves-imdb.svg)" in text
    assert b"dc:date" not in first
    for written in (b"Densely connected LSTM", b"wider first filter", b"Majority class", b"Bag-of-words classifier"):
        assert written in first  # matplotlib leaves each text as a comment beside its outlines
    build([accuracy("lstm", 1, 70.0)])
    assert file.read_bytes() != first


def test_what_the_trials_took(build):
    """Of seed n 20 n seconds: (20 + 40 + 60) / 3 = 40 s for three, 30 s for two, 20 s for one; 340 s in all.

    Missing of rows with a trial: PTB's QRNN 1 (30 s), IWSLT's 2 (20 s each); of others PTB's LSTM 2, two rows of 3.
    """
    text, made = build()
    assert model(made, "imdb", "lstm")["took"]["A Processor, 2 threads"]["mean"] == pytest.approx(40.0)
    found = re.search(r"^## What the trials took.*?(?=^## )", text, re.M | re.S).group()
    assert "| imdb/lstm | A Processor, 2 threads | 3 | 0.7 (0.3 to 1.0) | 2.0 |" in found
    assert "| imdb/qrnn-k4 | A Processor, 2 threads | 1 | 0.3 | 0.3 |" in found
    assert "ptb/lstm" not in found  # failed and missing
    assert "- In all: 10 trials, 5.7 minutes (0.1 h)." in found
    assert (
        "- Missing: 3 trials more of these rows would take 1.2 minutes (0.0 h) at their row's mean, of two devices the"
        " slower; 8 trials are missing of rows of which none has ended. `python -m pipeline cost --scale sample`"
    ) in found


def test_of_two_devices_each_has_its_line_and_the_slower_tells_of_the_missing(build):
    slow = {"epoch_s": 1.0, "total_s": 7200.0, "items_per_s": 1.0, "exclusive": False}
    fast = {"device": "cuda", "device_name": "A GPU", "threads": 2}
    records = [accuracy("lstm", 1, 80.0, timing=slow), accuracy("lstm", 2, 81.0, environment=fast)]
    text, _ = build(records, wanted=grid(("imdb", "lstm")))
    found = re.search(r"^## What the trials took.*?(?=^## )", text, re.M | re.S).group()
    assert "| imdb/lstm | A GPU | 1 | 0.7 | 0.7 |\n| imdb/lstm | A Processor, 2 threads | 1 | 120 | 120 |" in found
    assert "- Missing: 1 trial more of these rows would take 120 minutes (2.0 h)" in found
    text, _ = build([accuracy("lstm", seed, 80.0) for seed in SEEDS], wanted=grid(("imdb", "lstm")))
    assert "- No trial is missing." in text


def test_states_over_the_papers_review_are_drawn_and_told(build):
    """A panel for the first seed of each model that has some; cosines of (1, 0) to (-1, 0) and to (1, 1)."""
    states = turning()
    records = [accuracy("lstm", 1, 80.0), accuracy("qrnn", 1, 90.0),
               *(accuracy("qrnn", seed, 90.0, states=states) for seed in (2, 3))]  # fmt: skip
    text, made = build(records)
    assert model(made, "imdb", "qrnn")["turns"]["3"] == pytest.approx({"fallen": -1.0, "recovered": 0.5**0.5})
    assert model(made, "imdb", "lstm")["turns"] == {}
    found = re.search(r"^## Figure 3\..*?(?=^## )", text, re.M | re.S).group()
    assert "-1.00 after *not exactly a bad story*, 0.71 after *never played the game* (seed 2); -1.00" in found
    assert "](figures/states.svg)" in found
    drawn = (paths.results("sample") / "figures" / "states.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn.count("<image") == 2  # one panel and the scale of colours
    text, _ = build()
    assert "## Figure 3." not in text
    assert not (paths.results("sample") / "figures" / "states.svg").exists()


def test_a_figure_without_a_curve_is_taken_away(build):
    build()
    text, _ = build([])
    assert not (paths.results("sample") / "figures" / "curves-imdb.svg").exists()
    assert "curves-imdb.svg" not in text


def test_a_model_and_a_task_that_the_paper_lacks_have_rows(build):
    fifth = {**accuracy("lstm", 1, 81.0), "model": "gru"}
    fourth = {**record("ptb", "lstm", 1, {"accuracy": 66.0, "items": 3}), "task": "parsing"}
    text, made = build([fifth, fourth])
    assert row(text, 1, "**gru**") == ["**gru**", "123k", "—", "10.0", "—", "81.00", "1 of 1"]
    assert model(made, "parsing", "lstm")["cells"]["test.accuracy"]["mean"] == 66.0
    assert "## parsing" in text


def test_records_of_another_scale_are_left_out(build):
    _, made = build([accuracy("lstm", 1, 80.0), accuracy("lstm", 2, 10.0, scale="small")])
    assert model(made, "imdb", "lstm")["cells"]["test.accuracy"]["seeds"] == {"1": 80.0}


def test_write_reads_ledger_manifests_and_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    ledger.write(accuracy("lstm", 1, 80.0))
    write_ptb(paths.processed("sample", "ptb"))
    path = report.write(PARAMS, "sample")
    assert path == paths.results("sample") / "report.md"
    made = json.loads((path.parent / "tables.json").read_bytes())
    seeds = model(made, "imdb", "lstm")["seeds"]
    assert seeds == {"done": [1], "diverged": [], "failed": [], "missing": [2]}
    assert model(made, "imdb", "lstm")["stale"]["sources"] == [1]  # "f1" is not the fingerprint of the sources
    (floor,) = made["tables"]["ptb"]["floors"]  # PTB has no record here, so it is the manifest's
    assert floor["cells"]["test.perplexity"]["value"] == 3.0


def test_every_claim_stands_in_the_report_at_the_papers_scale(build):
    wanted = [PARAMS.trial("paper", "imdb", name, 1) for name in ("lstm", "qrnn")]
    done = [accuracy(one.cell.model, 1, value, scale="paper", config=one.config)
            for one, value in zip(wanted, (90.5, 91.0), strict=True)]  # fmt: skip
    text, _ = build(done, wanted=wanted, scale="paper")
    kept = json.loads((paths.results("paper") / "claims.json").read_bytes())
    assert [one["name"] for one in kept] == [claim.name for claim in claims.CLAIMS]
    first = next(line for line in text.splitlines() if line.startswith(f"| {claims.CLAIMS[0].text} |"))
    assert first.split(" | ")[2:4] == ["91.4 against 90.9", "91.00 (n = 1) against 90.50 (n = 1)"]
    rule = "interval of the difference; the worse one not short of the paper's"
    assert first.split(" | ")[4:6] == [rule, "**undecided**"]
    text, _ = build()
    assert "## Claims" not in text
    assert json.loads((paths.results("sample") / "claims.json").read_bytes()) == []


def test_a_folder_that_cannot_be_written_is_named(build, tmp_path):
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match=r"results/sample: the report could not be written"):
        build()


@pytest.mark.parametrize(
    ("path", "mean", "std", "expected"),
    [
        ("test.accuracy", 91.4, None, "91.40"),
        ("test.perplexity", 78.34, 0.26, "78.3 ± 0.3"),
        ("test.perplexity", 9.876, 0.02, "9.88 ± 0.02"),
        ("test.bleu", 19.408, 0.12, "19.41 ± 0.12"),
        ("test.bits_per_character", 1.23456, None, "1.235"),
        ("timing.epoch_s", 151.6, 2.2, "152 ± 2"),
        ("timing.epoch_s", 0.1234, None, "0.123"),
        ("parameters", 17729040, None, "17.7M"),
        ("parameters", 0, None, "0"),
        ("test.perplexity", 1e12, None, "1.00e+12"),
    ],
)
def test_digits(path, mean, std, expected):
    assert layouts.Column(path).text(mean, std) == expected


def test_long_times_are_printed_in_hours():
    column = layouts.LAYOUTS["iwslt"].column("timing.epoch_s")
    assert column.text(3599.0) == "3599 s"
    assert column.text(15120.0, 360.0) == "4.20 ± 0.10 h"


def test_the_published_figures_agree_with_how_they_are_printed():
    checked = 0
    for table in layouts.published()["tables"].values():
        for cells in [*(row["figures"] for row in table["cited"]), *(m["figures"] for m in table["models"].values())]:
            for figure in cells.values():
                number, unit = re.fullmatch(r"([\d.]+)(M| h)?", figure["printed"]).groups()
                assert figure["value"] == pytest.approx(float(number) * {"M": 1e6, " h": 3600, None: 1}[unit])
                checked += 1
    assert checked == 5 + 3 * 2 + 11 + 9 + 2 + 4
