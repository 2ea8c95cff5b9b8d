"""NBSVM: its equations on numbers worked by hand, and its way through trial and ledger."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import cli, made_with, write_params
from scipy.sparse import csr_matrix

from pipeline import grid, ledger, nbsvm, paths, trial
from pipeline.errors import UserError
from pipeline.params import NbsvmRecipe, load

MODEL = {"family": "nbsvm", "ngrams": 2, "alpha": 1.0, "cost": 1.0, "tolerance": 0.1, "beta": 0.25,
         "lowercase": False, "train_on_dev": True}  # fmt: skip


@pytest.fixture
def with_nbsvm(data: Path, values: dict) -> Path:
    values["imdb"]["sample"]["models"]["nbsvm-bi"] = dict(MODEL)
    write_params(data, values)
    return data


def run() -> ledger.Record:
    return trial.run(load().trial("sample", "imdb", "nbsvm-bi", 1), device="cpu", report=lambda progress: None)


def test_log_count_ratio_by_hand() -> None:
    features = csr_matrix(np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    # alpha 1: p = (3, 1, 2) of the two positive reviews, q = (1, 2, 2) of the negative one.
    expected = np.log([(3 / 6) / (1 / 5), (1 / 6) / (2 / 5), (2 / 6) / (2 / 5)])
    np.testing.assert_allclose(nbsvm.log_count_ratio(features, np.array([1, 1, 0]), 1.0), expected, rtol=1e-14)


def test_interpolation_by_hand() -> None:
    # mean magnitude of (1, -3) is 2: 0.75 * 2 + 0.25 * (1, -3)
    np.testing.assert_allclose(nbsvm.interpolated(np.array([1.0, -3.0]), 0.25), [1.75, 0.75], rtol=1e-15)
    np.testing.assert_array_equal(nbsvm.interpolated(np.array([1.0, -3.0]), 1.0), [1.0, -3.0])


def test_svm_by_hand() -> None:
    features, labels = csr_matrix([[1.0], [3.0]]), np.array([1, 0])
    # The derivative of w^2 / 2 + C (1 - w)^2 + C (1 + 3 w)^2 is 0 there; an intercept would change it.
    for cost in (1.0, 0.1):
        np.testing.assert_allclose(nbsvm.svm(features, labels, cost, 1e-9), [-4 * cost / (1 + 20 * cost)], rtol=1e-6)


def test_tolerance_that_is_not_reached_is_an_error() -> None:
    random = np.random.default_rng(0)
    features, labels = csr_matrix(random.normal(size=(50, 5))), random.integers(0, 2, 50)
    with pytest.raises(UserError, match="tolerance: expected the SVM to converge in 1000 passes, got 1e-300"):
        nbsvm.svm(features, labels, 1e3, 1e-300)


def test_grid_has_one_seed_of_it(with_nbsvm: Path, values: dict) -> None:
    values["seeds"]["sample"] = [3, 1, 2]
    write_params(with_nbsvm, values)
    trials = load().grid("sample", "imdb")
    assert [trial.seed for trial in trials if trial.cell.model == "nbsvm-bi"] == [3]
    assert len(trials) == 3 * 3 + 1


def test_it_is_a_fit_on_the_cpu_in_full_precision_whatever_is_asked_for(with_nbsvm: Path) -> None:
    wanted = load().trial("sample", "imdb", "nbsvm-bi", 1)
    record = trial.run(wanted, device="auto", precision="bfloat16", compile="default", report=lambda progress: None)
    environment = record["environment"]
    assert (environment["device"], environment["precision"], environment["compile"]) == ("cpu", "float32", "none")


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [("device", "cuda", "auto or cpu"), ("precision", "bfloat16", "auto or float32"), ("compile", "default", "none")],
)
def test_what_a_fit_cannot_do_is_refused_by_the_command(
    with_nbsvm: Path, option: str, given: str, expected: str
) -> None:
    asked = f"trial --scale sample --task imdb --model nbsvm-bi --seed 1 --{option} {given}"
    done = cli(*asked.split())
    assert done.returncode == 2
    named = f"--{option}: expected {expected} for imdb/nbsvm-bi/seed-1, a fit on the CPU, got {given}"
    assert done.stderr.strip() == f"error: {named}"
    assert ledger.records("sample") == []


def test_trial_is_an_ordinary_record(with_nbsvm: Path) -> None:
    record = run()
    assert ledger.read(ledger.path("sample", "imdb", "nbsvm-bi", 1)) == json.loads(json.dumps(record))
    assert record["status"] == "done"
    assert record["config"] == MODEL
    assert record["test"] == {"accuracy": 100.0, "reviews": 16}  # each review holds the word of its label
    assert (record["valid"], record["curve"], record["selected_epoch"]) == ({}, [], None)
    assert ledger.outcome(record) == "recorded  test: accuracy 100.00"  # no epoch was selected
    assert record["timing"]["total_s"] > 0
    assert record["timing"]["epoch_s"] is None
    (line,) = (line for line in grid.table(load(), "sample").splitlines() if line.startswith("imdb/nbsvm-bi/seed-1"))
    assert line.split()[1] == "done"
    assert grid.standing_of(load().trial("sample", "imdb", "nbsvm-bi", 1)) is ledger.Standing.DONE


def test_data_made_with_other_parameters_are_refused(with_nbsvm: Path) -> None:
    made_with(paths.processed("sample", "imdb"), **vars(load().task("sample", "imdb").preprocess) | {"split_seed": 9})
    with pytest.raises(UserError, match=r"expected data made with split_seed 1 \(params.yaml\), got split_seed 9"):
        run()


def test_number_of_weights_is_that_of_the_n_grams(with_nbsvm: Path) -> None:
    folder = paths.processed("sample", "imdb")
    documents = [np.split(np.load(folder / f"{split}.values.npy"), np.load(folder / f"{split}.offsets.npy")[1:-1])
                 for split in ("train", "dev")]  # fmt: skip
    reviews = [review.tolist() for part in documents for review in part]
    ngrams = {(word,) for review in reviews for word in review}
    ngrams |= {pair for review in reviews for pair in itertools.pairwise(review)}
    assert run()["parameters"] == len(ngrams)


def test_dev_held_out_gives_a_validation_accuracy(with_nbsvm: Path, values: dict) -> None:
    values["imdb"]["sample"]["models"]["nbsvm-bi"]["train_on_dev"] = False
    write_params(with_nbsvm, values)
    assert run()["valid"] == {"accuracy": 100.0, "reviews": 16}


def test_lowercase_takes_words_of_either_case_for_one() -> None:
    class Data:
        """Two reviews, `bad a` and `good A`."""

        def json(self, name: str) -> list[str]:
            return ["<pad>", "<unk>", "bad", "good", "a", "A"]

        def ragged(self, name: str) -> list[np.ndarray]:
            return [np.array([2, 4]), np.array([3, 5])]

        def array(self, name: str) -> np.ndarray:
            return np.array([0, 1])

    def weights(lowercase: bool) -> int:
        return nbsvm._fit(Data(), NbsvmRecipe(**{**MODEL, "lowercase": lowercase}), lambda doing: None)[1]

    assert weights(lowercase=False) == 4 + 2  # bad, good, a, A; two pairs
    assert weights(lowercase=True) == 3 + 2
