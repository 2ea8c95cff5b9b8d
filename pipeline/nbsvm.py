"""NBSVM on uni- and bigrams (Wang and Manning, ACL 2012), fitted once: no epochs, no selection.

A review is the set f of its n-grams (binary). With p and q the numbers of positive and negative reviews that hold each
n-gram, each plus alpha, the log-count ratio is r = log((p / |p|_1) / (q / |q|_1)). A linear SVM with the squared hinge
loss is fitted to r * f, and its weights w are drawn towards their mean magnitude m = |w|_1 / |V|: w' = (1 - beta) m +
beta w. As in the authors' program (sidaw/nbsvm), the SVM has no intercept: one that is fitted beside w is out of
proportion to w'. The same data and recipe give the same weights; there is no seed.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import ledger, machine, recording
from pipeline.errors import UserError
from pipeline.params import NbsvmRecipe, Trial
from pipeline.processed import Processed
from pipeline.progress import Progress, Report, leave_note
from pipeline.tasks.base import Metrics, Outputs


def run(trial: Trial, where: machine.Machine, report: Report) -> ledger.Record:
    """Fits on the CPU, tests once, and writes the trial's record. Its curve is empty: there are no epochs.

    Without a held-out part (`train_on_dev`) the record's validation figures are empty too.

    Raises:
        UserError: data missing, altered or made with other parameters, scikit-learn missing, or the record cannot be
            written.
    """
    data = Processed.of(trial)
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
    outcome, weights, fit_s = _fit(data, trial.recipe, tell)
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
    return record


def log_count_ratio(features: Any, labels: np.ndarray, alpha: float) -> np.ndarray:
    """r of the module's text, (V,) float64, of binary features (n, V) sparse and labels (n,) of 0 and 1."""
    p, q = (alpha + np.asarray(features[labels == label].sum(axis=0)).ravel() for label in (1, 0))
    return np.log(p / p.sum()) - np.log(q / q.sum())


def interpolated(weights: np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta) * mean magnitude + beta * weights, (V,) float64."""
    return (1 - beta) * np.abs(weights).mean() + beta * weights


def svm(features: Any, labels: np.ndarray, cost: float, tolerance: float) -> np.ndarray:
    """Weights (V,) of the linear SVM without an intercept: |w|^2 / 2 + cost * the sum of squared hinge losses.

    Args:
        features: (n, V) sparse.
        labels: (n,) of 0 and 1.
        tolerance: of the dual's projected gradient, at which coordinate descent stops.

    Raises:
        UserError: that tolerance is not reached.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    # random_state: of the order in which coordinate descent visits the reviews
    model = LinearSVC(C=cost, tol=tolerance, dual=True, fit_intercept=False, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(features, labels).coef_[0]
        except ConvergenceWarning:
            expected = f"expected the SVM to converge in {model.max_iter} passes"
            raise UserError(f"tolerance: {expected}, got {tolerance:g}, which takes more") from None


def _fit(data: Processed, recipe: NbsvmRecipe, tell: Callable[[str], None]) -> tuple[dict[str, Any], int, float]:
    """Validation and test metrics and test outputs, number of weights, seconds of fitting."""
    try:
        from sklearn.feature_extraction.text import CountVectorizer
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
    weights = ratio * interpolated(
        svm(features.multiply(ratio).tocsr(), labels, recipe.cost, recipe.tolerance), recipe.beta
    )
    fit_s = time.monotonic() - begin

    def accuracy(split: str) -> tuple[Metrics, Outputs]:
        """Also the label that is given to each review, a digit each."""
        tell(split)
        given = (ngrams.transform(data.ragged(split)) @ weights > 0).astype(np.int64)
        right = int((given == data.array(f"{split}.labels")).sum())
        return {"accuracy": 100.0 * right / len(given), "reviews": len(given)}, "".join(map(str, given))

    valid = {} if recipe.train_on_dev else accuracy("dev")[0]
    test, outputs = accuracy("test")
    return {"valid": valid, "test": test, "outputs": outputs}, len(weights), fit_s
