"""Test figures computed anew from what a model made of the test set: the `outputs` of a trial's record.

None of the training's code takes part: accuracy and perplexity are counted here, BLEU is sacreBLEU's. What is averaged
over sampled masks (`perplexity_mc`) takes the weights and is not among them.
"""

import math
from typing import Any

import numpy as np

from pipeline.processed import Processed

NEEDS_DATA = ("imdb", "iwslt")  # whose right answers are in the processed data alone


def rescore(record: dict[str, Any], data: Processed | None) -> tuple[str, float, float]:
    """(name of the test figure, its value by the record's outputs, how much the two may differ, relatively).

    The value is no number where the outputs are not as many as the examples. `data` are the record's processed data;
    only the tasks that `NEEDS_DATA` names need some.
    """
    outputs = record["outputs"]
    if record["task"] == "ptb":
        tokens = record["test"]["tokens"]
        rounding = len(outputs) * 0.5e-4 / tokens  # of the mean: a sentence's nats have four decimals
        return "perplexity", math.exp(math.fsum(outputs) / tokens), rounding + 1e-9
    assert data is not None
    if record["task"] == "imdb":
        labels = data.array("test.labels")
        whole = len(outputs) == len(labels)
        right = np.array(list(outputs)) == labels.astype(str) if whole else np.array(math.nan)
        return "accuracy", 100 * float(right.mean()), 1e-12
    import sacrebleu  # only where a translation is scored

    references = data.lines("test.references")
    whole = len(outputs) == len(references)
    return "bleu", sacrebleu.corpus_bleu(outputs, [references], force=True).score if whole else math.nan, 1e-9
