"""NBSVM on uni- and bigrams (Wang and Manning, ACL 2012), fitted once: no epochs, no selection.

A review is the set f of its n-grams (binary). With p and q the numbers of positive and negative reviews that hold each
n-gram, each plus alpha, the log-count ratio is r = log((p / |p|_1) / (q / |q|_1)). A linear SVM with the squared hinge
loss is fitted to r * f, and its weights w are drawn towards their mean magnitude m = |w|_1 / |V|: w' = (1 - beta) m +
beta w.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline import ledger, machine, paths, recording
from pipeline.errors import UserError
from pipeline.params import NbsvmRecipe, Trial
from pipeline.processed import Processed
from pipeline.progress import Progress, Report, leave_note, remove_note


def run(trial: Trial, where: machine.Machine, report: Report) -> ledger.Record:
    """Fits on the CPU, tests once, and writes the trial's record. Its curve is empty: there are no epochs.

    Without a held-out part (`train_on_dev`) the record's validation figures are empty too.

    Raises:
        UserError: data missing or altered, scikit-learn missing, or the record cannot be written.
    """
    data = Processed(paths.processed(trial.cell.scale, trial.cell.task))
    identity = ledger.identity(trial, data.hash)
    description = recording.describe(trial, identity, data.manifest, where.options)
    begun, started_at = time.monotonic(), time.time()

    def tell(doing: str) -> None:
        progress = Progress(
            trial=trial.name, key=identity.key, epoch=1, epochs=1, step=1, steps=1, loss=math.nan, loss_unit="",
            elapsed_s=time.monotonic() - begun, left_s=0.0, entry=None, doing=doing,
        )  # fmt: skip
        leave_note(trial, progress)
        report(progress)

    machine.reset_peak(where.device)
    outcome, weights, fit_s = _fit(data, trial.recipe, trial.seed, tell)
    record = {
        **description,
        **outcome,
        "status": "done",
        "error": None,
        "environment": where.describe(),
        "parameters": weights,
        "curve": [],
        "selected_epoch": None,
        "timing": {**recording.timing([], "tokens"), "total_s": fit_s},
        "peak_bytes": machine.peak_bytes(where.device),
        "started_at": started_at,
        "finished_at": time.time(),
    }
    ledger.write(record)
    remove_note(trial)
    return record


def log_count_ratio(features: Any, labels: np.ndarray, alpha: float) -> np.ndarray:
    """r of the module's text, (V,) float64, of binary features (n, V) sparse and labels (n,) of 0 and 1."""
    p, q = (alpha + np.asarray(features[labels == label].sum(axis=0)).ravel() for label in (1, 0))
    return np.log(p / p.sum()) - np.log(q / q.sum())


def interpolated(weights: np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta) * mean magnitude + beta * weights, (V,) float64."""
    return (1 - beta) * np.abs(weights).mean() + beta * weights


def _fit(
    data: Processed, recipe: NbsvmRecipe, seed: int, tell: Callable[[str], None]
) -> tuple[dict[str, Any], int, float]:
    """Validation and test metrics, number of weights, seconds of fitting."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.svm import LinearSVC
    except ImportError:
        raise UserError("family nbsvm: expected scikit-learn to be installed (the extra `pipeline`)") from None

    words = np.array([word.lower() if recipe.lowercase else word for word in data.json("vocabulary")], dtype=object)
    splits = ("train", "dev") if recipe.train_on_dev else ("train",)
    documents: list[np.ndarray] = [review for split in splits for review in data.ragged(split)]
    labels = np.concatenate([data.array(f"{split}.labels") for split in splits])
    begin = time.monotonic()
    tell(f"n-grams of {len(documents):,} reviews")
    ngrams = CountVectorizer(
        preprocessor=words.__getitem__, tokenizer=list, token_pattern=None, lowercase=False,
        ngram_range=(1, recipe.ngrams), binary=True, dtype=np.float64,
    )  # fmt: skip
    features = ngrams.fit_transform(documents)
    ratio = log_count_ratio(features, labels, recipe.alpha)
    tell(f"fit of {len(ratio):,} weights")
    # random_state: of the order in which liblinear's coordinate descent visits the reviews
    svm = LinearSVC(C=recipe.cost, random_state=seed).fit(features.multiply(ratio).tocsr(), labels)
    weights = ratio * interpolated(svm.coef_[0], recipe.beta)
    fit_s = time.monotonic() - begin

    def accuracy(split: str) -> dict[str, Any]:
        tell(split)
        found: Sequence[bool] = ngrams.transform(data.ragged(split)) @ weights + svm.intercept_[0] > 0
        right = int((found == data.array(f"{split}.labels")).sum())
        return {"accuracy": 100.0 * right / len(found), "reviews": len(found)}

    valid = {} if recipe.train_on_dev else accuracy("dev")
    return {"valid": valid, "test": accuracy("test")}, len(weights) + 1, fit_s
