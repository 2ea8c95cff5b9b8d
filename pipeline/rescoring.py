"""Test figures computed anew from what a model made of the test set: the `outputs` of a trial's record.

None of the training's code takes part: accuracy and perplexity are counted here, BLEU is sacreBLEU's. What is averaged
over sampled masks (`perplexity_mc`) takes the weights and is not among them.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.processed import Processed

Record = dict[str, Any]
Rescored = tuple[str, float, float]
NEEDS_DATA = ("imdb", "iwslt")  # whose right answers are in the processed data alone


def rescore(record: Record, data: Processed | None) -> Rescored:
    """(name of the test figure, its value by the record's outputs, how much the two may differ, relatively).

    The value is no number where the outputs are not as many as the examples. `data` are the record's processed data;
    only the tasks that `NEEDS_DATA` names need some.
    """
    return _BY_TASK[record["task"]](record, data)


def right(outputs: str, data: Processed) -> np.ndarray:
    """Which reviews of the test set, one character of `outputs` each, bear their own label, (reviews,) bool."""
    return np.array(list(outputs)) == data.array("test.labels").astype(str)


def _accuracy(record: Record, data: Any) -> Rescored:
    outputs = record["outputs"]
    whole = len(outputs) == len(data.array("test.labels"))
    return "accuracy", 100 * float(right(outputs, data).mean()) if whole else math.nan, 1e-12


def _perplexity(record: Record, _data: Any) -> Rescored:
    outputs, tokens = record["outputs"], record["test"]["tokens"]
    rounding = len(outputs) * 0.5e-4 / tokens  # of the mean: a sentence's nats have four decimals
    return "perplexity", math.exp(math.fsum(outputs) / tokens), rounding + 1e-9


def _bleu(record: Record, data: Any) -> Rescored:
    import sacrebleu  # only where a translation is scored

    outputs, references = record["outputs"], data.lines("test.references")
    whole = len(outputs) == len(references)
    return "bleu", sacrebleu.corpus_bleu(outputs, [references], force=True).score if whole else math.nan, 1e-9


_BY_TASK: dict[str, Callable[[Record, Any], Rescored]] = {"imdb": _accuracy, "ptb": _perplexity, "iwslt": _bleu}
