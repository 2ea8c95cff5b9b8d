"""Two models on one test set: intervals against hand-worked ones, figures against sacreBLEU's and trials' own."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from conftest import cli, write_iwslt

from pipeline import compare, ledger, paths, processed, trial
from pipeline.errors import UserError
from pipeline.params import load
from pipeline.processed import Processed
from pipeline.tasks.iwslt import Iwslt

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", ".", ","]


@pytest.fixture
def made(tmp_path: Path) -> Processed:
    """400 reviews, all labelled 1; a text of two sentences, of 3 and 2 tokens, and one more token; 40 translations."""
    random = np.random.default_rng(1)
    with processed.writing(tmp_path / "made") as writer:
        writer.array("test.labels", np.ones(400, np.int64))
        writer.array("test", np.array([1, 2, 0, 2, 0, 1], np.int32))
        writer.json("vocabulary", ["<eos>", "one", "two"])
        writer.lines("test.references", [" ".join(random.choice(WORDS, size=12)) for _ in range(40)])
    return Processed(tmp_path / "made")


def scored(task: str, outputs: Any, data: Processed) -> compare.Scored:
    return compare.scored({"task": task, "model": "qrnn", "seed": 1, "outputs": outputs}, data)


def whole(one: compare.Scored) -> float:
    return one.figure(one.examples.sum(0))


def test_interval_of_accuracy_is_that_of_paired_proportions(made: Processed) -> None:
    """Wald's: b = 40 reviews that only ours gets right, c = 20 that only theirs does; its standard error is
    sqrt(b + c - (b - c)^2 / n) / n.

    Of proportions that are not paired, 75 and 70 % of 400, the interval would reach 6.2 to either side, not 3.8.
    """
    ours = scored("imdb", "1" * 260 + "0" * 80 + "1" * 40 + "0" * 20, made)
    theirs = scored("imdb", "1" * 260 + "0" * 80 + "0" * 40 + "1" * 20, made)
    assert (whole(ours), whole(theirs)) == (75.0, 70.0)
    gap = compare.difference([ours], [theirs])
    reach = 100 * 1.96 * math.sqrt(60 - 20**2 / 400) / 400
    assert gap.value == 5.0
    # Proportions are multiples of 0.25.
    assert (gap.low, gap.high) == pytest.approx((5.0 - reach, 5.0 + reach), abs=0.15)
    assert compare.difference([ours], [theirs]) == gap


def test_examples_are_drawn_alike_for_both_models_and_every_seed(made: Processed) -> None:
    random = np.random.default_rng(2)
    a, b = (scored("imdb", "".join(random.choice(["0", "1"], size=400)), made) for _ in range(2))
    assert compare.difference([a], [a], resamples=99) == (0.0, 0.0, 0.0)
    assert compare.difference([a, b], [b, a], resamples=99) == (0.0, 0.0, 0.0)
    half = compare.difference([a, b], [b], resamples=999)
    assert half == pytest.approx([end / 2 for end in compare.difference([a], [b], resamples=999)])


def test_perplexity_is_of_the_tokens_that_were_drawn(made: Processed) -> None:
    found = scored("ptb", [3.0, 4.0, 5.0], made)
    assert whole(found) == pytest.approx(math.exp(12 / 6))
    assert found.figure(found.examples[[1, 1, 2]].sum(0)) == pytest.approx(math.exp(13 / 5))


def test_bleu_of_drawn_sentences_is_sacrebleus(made: Processed) -> None:
    """Some drawn corpora have no 4-gram right, so that the score is smoothed."""
    random, references = np.random.default_rng(3), made.lines("test.references")
    changed = [
        [word if random.random() < 0.6 else "cow" for word in line.split()][: 9 + k % 4]
        for k, line in enumerate(references)
    ]
    outputs = [" ".join(line) for line in changed]
    found = scored("iwslt", outputs, made)
    smoothed = 0
    for size in (1, 2, 3, 40):
        drawn = random.integers(40, size=size)
        expected = sacrebleu.corpus_bleu([outputs[k] for k in drawn], [[references[k] for k in drawn]])
        smoothed += expected.counts[-1] == 0
        assert found.figure(found.examples[drawn].sum(0)) == pytest.approx(expected.score, rel=1e-12)
    assert smoothed


@pytest.mark.parametrize(("task", "outputs"), [("imdb", "101"), ("ptb", [1.0, 2.0]), ("iwslt", ["a"])])
def test_outputs_of_another_number_are_refused(made: Processed, task: str, outputs: Any) -> None:
    with pytest.raises(UserError, match=rf"{task}/qrnn/seed-1: expected \d+ outputs, found {len(outputs)}"):
        scored(task, outputs, made)


@pytest.mark.parametrize("task", ["imdb", "ptb", "iwslt"])
def test_the_command_names_the_figures_of_the_records(data: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    references = Processed(paths.processed("sample", "iwslt")).lines("test.references")
    right = {"qrnn": 11, "lstm": 6}  # translations; models so small have no BLEU but 0
    with pytest.raises(UserError, match=f"sample {task}/qrnn: expected a finished trial .* found none"):
        compare.text(load(), "sample", task, "qrnn", "lstm")
    figures = []
    for model in ("qrnn", "lstm"):
        translations = [line if n < right[model] else "b" for n, line in enumerate(references)]
        monkeypatch.setattr(Iwslt, "translate", lambda *_, translations=translations: translations)
        record = trial.run(load().trial("sample", task, model, 1), device="cpu", report=lambda progress: None)
        figures.append(
            next(record["test"][name] for name in ("accuracy", "perplexity", "bleu") if name in record["test"])
        )
    assert figures[0] != figures[1]
    done = cli("compare", "--scale", "sample", "--task", task, "--model", "qrnn", "--other", "lstm")
    first, ours, theirs, gap = done.stdout.splitlines()
    assert first.startswith(f"{task}: test ")
    assert [float(line.split()[1]) for line in (ours, theirs)] == pytest.approx(figures, abs=2e-4, rel=1e-4)
    value, low, high = map(float, re.findall(r"[+-]\d+\.\d+", gap))
    assert value == pytest.approx(figures[0] - figures[1], abs=2e-3, rel=1e-3)
    assert low <= value <= high


def test_records_of_other_data_or_recipes_do_not_count(data: Path) -> None:
    record = trial.run(load().trial("sample", "imdb", "qrnn", 1), device="cpu", report=lambda progress: None)
    assert "difference     +0.0000" in compare.text(load(), "sample", "imdb", "qrnn", "qrnn")
    for change in ({"data": record["data"] | {"hash": "0" * 64}}, {"config": record["config"] | {"epochs": 99}}):
        ledger.write({**record, **change})
        with pytest.raises(UserError, match="sample imdb/qrnn: expected a finished trial"):
            compare.text(load(), "sample", "imdb", "qrnn", "qrnn")


def test_a_test_set_of_one_example_is_refused(root: Path) -> None:
    write_iwslt(paths.processed("sample", "iwslt"), pairs=1)
    trial.run(load().trial("sample", "iwslt", "qrnn", 1), device="cpu", report=lambda progress: None)
    with pytest.raises(UserError, match="sample iwslt: expected a test set of 2 examples or more to draw from, got 1"):
        compare.text(load(), "sample", "iwslt", "qrnn", "qrnn")
