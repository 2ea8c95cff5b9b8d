"""Two models on one test set, example by example: what their difference would be on other examples of its kind.

Seeds say what another training would give, and the report's verdicts rest on them. This says what another test set
would give: examples (reviews, sentences, pairs) are drawn anew with replacement, the same for both models, and both
figures are computed of those drawn. That is the paired bootstrap; Koehn (2004) has it for BLEU. Sentences of PTB are
drawn as if they were independent; neighbours are of one article and share the carried state, so that its interval is
rather too narrow. Nothing is trained: it reads the `outputs` of the records and the processed data.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from pipeline import ledger
from pipeline.errors import UserError
from pipeline.params import Params
from pipeline.processed import Processed
from pipeline.rescoring import right

Record = dict[str, Any]
RESAMPLES = 9999
CONFIDENCE = 0.95
_AT_ONCE = 50  # resamples: the places of 25,000 reviews take 30 MB


class Scored(NamedTuple):
    """A test figure by examples: `figure` gives it of the sum of any of the rows of `examples`, (examples, k)."""

    metric: str
    examples: np.ndarray
    figure: Callable[[np.ndarray], float]


class Difference(NamedTuple):
    """The difference of two means over seeds, and its interval over examples."""

    value: float
    low: float
    high: float


def text(params: Params, scale: str, task: str, model: str, other: str) -> str:
    """Each model's figure, the mean over the seeds that have outputs, their difference and its interval.

    Raises:
        UserError: no such cell, no processed data at hand, a model without a record of them that has outputs, or a test
            set of one example.
    """
    trial = params.trial(scale, task, model, params.seeds(scale)[0])
    data = Processed.of(trial)
    by_seed = [_of_seeds(params, scale, task, name, data) for name in (model, other)]
    ours, theirs = (list(found.values()) for found in by_seed)
    examples = len(ours[0].examples)
    if examples < 2:
        raise UserError(f"{scale} {task}: expected a test set of 2 examples or more to draw from, got {examples}")
    gap = difference(ours, theirs)
    lines = [f"{task}: test {ours[0].metric} on the same {examples:,} examples"]
    for name, found in zip((model, other), by_seed, strict=True):
        seeds = f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
        mean = _mean(list(found.values()), np.ones(examples, dtype=np.int64))
        lines.append(f"{name:<14} {mean:.4f}  ({seeds})")
    interval = f"{CONFIDENCE:.0%} interval over examples {gap.low:+.4f} to {gap.high:+.4f}"
    lines.append(f"{'difference':<14} {gap.value:+.4f}  ({interval}; paired bootstrap, {RESAMPLES:,} resamples)")
    return "\n".join(lines)


def difference(ours: Sequence[Scored], theirs: Sequence[Scored], resamples: int = RESAMPLES) -> Difference:
    """By how much the mean of one model's figures, a figure a seed, is above that of another's on the same examples.

    The percentile interval of the paired bootstrap; which examples are drawn is the same at every call.
    """
    everything = np.arange(len(ours[0].examples))

    def gap(drawn: np.ndarray) -> float:
        """The difference on the examples of these places."""
        times = np.bincount(drawn, minlength=len(everything))
        return _mean(ours, times) - _mean(theirs, times)

    found = stats.bootstrap(
        (everything,),
        gap,
        n_resamples=resamples,
        batch=_AT_ONCE,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(gap(everything), float(found.low), float(found.high))


def _mean(scores: Sequence[Scored], times: np.ndarray) -> float:
    """The mean of figures of examples that count so many times each, (examples,) int64."""
    return math.fsum(one.figure(times @ one.examples) for one in scores) / len(scores)


def _of_seeds(params: Params, scale: str, task: str, model: str, data: Processed) -> dict[int, Scored]:
    """The seeds of a model that are done on these data by the recipe of params.yaml, and have outputs."""
    found = {}
    for seed in params.seeds(scale):
        trial = params.trial(scale, task, model, seed)
        file = ledger.path_of(trial)
        record = ledger.read(file) if file.exists() else {}
        if record and ledger.key_of(record) == ledger.key(trial, data.hash) and record.get("outputs"):
            found[seed] = scored(record, data)
    if not found:
        raise UserError(
            f"{scale} {task}/{model}: expected a finished trial on the data at hand with outputs, found none"
        )
    return found


def scored(record: Record, data: Processed) -> Scored:
    """A record's test figure by examples.

    Raises:
        UserError: the outputs are not as many as the examples.
    """
    return _BY_TASK[record["task"]](record, data)


def _accuracy(record: Record, data: Processed) -> Scored:
    answers = right(_outputs(record, len(data.array("test.labels"))), data)
    return Scored("accuracy", np.column_stack([answers, np.ones(len(answers))]), lambda sums: 100 * sums[0] / sums[1])


def _perplexity(record: Record, data: Processed) -> Scored:
    """By nats and tokens of sentences; what is after the last <eos> is one too."""
    ends = np.asarray(data.array("test")) == data.json("vocabulary").index("<eos>")
    starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
    tokens = np.diff(starts, append=len(ends))
    examples = np.column_stack([_outputs(record, len(tokens)), tokens])
    return Scored("perplexity", examples, lambda sums: math.exp(sums[0] / sums[1]))


def _bleu(record: Record, data: Processed) -> Scored:
    """By what BLEU sums over a corpus: n-grams that match, n-grams, and both lengths."""
    from sacrebleu.metrics import BLEU  # only where translations are scored

    metric = BLEU(effective_order=True)  # asked for at single sentences; their counts are the same without
    references = data.lines("test.references")
    pairs = zip(_outputs(record, len(references)), references, strict=True)
    found = [metric.sentence_score(output, [reference]) for output, reference in pairs]

    def figure(sums: np.ndarray) -> float:
        matching, all_of_them, lengths = np.split(sums, [metric.max_ngram_order, 2 * metric.max_ngram_order])
        return BLEU.compute_bleu(list(matching), list(all_of_them), *lengths, metric.smooth_method).score

    return Scored("bleu", np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found]), figure)


def _outputs(record: Record, examples: int) -> Any:
    if len(record["outputs"]) != examples:
        raise UserError(f"{ledger.name_of(record)}: expected {examples} outputs, found {len(record['outputs'])}")
    return record["outputs"]


# Apart from `rescoring`, where BLEU is sacreBLEU's own of the whole corpus and perplexity needs no data.
_BY_TASK = {"imdb": _accuracy, "ptb": _perplexity, "iwslt": _bleu}
