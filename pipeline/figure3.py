"""Figure 3 of the paper: the states of the last layer over one review of IMDB, step by step.

The caption quotes the review, so it can be found: one of the test set has all that is quoted. A trial's record has the
states over it, a byte each.
"""

import base64
import math
import string
from typing import Any

import numpy as np

from pipeline.processed import Ragged

GOOD, WEAK, BAD, RECOMMENDED = QUOTES = (
    "simply gorgeous",
    "main weakness is its story",
    "not exactly a bad story",
    "never played the game",
)
"""In the caption's words, as far as no tokeniser takes them apart, and in the review's order."""


def find(reviews: Ragged, vocabulary: list[str]) -> tuple[int, dict[str, tuple[int, int]]] | None:
    """The review that has all quotes: its number, and of each quote the first and the last step, all from 0.

    Case and punctuation at a word's ends do not count, so it is found in the tokens of any tokeniser. None where there
    is no such review, or more than one.
    """
    words = np.array([word.lower().strip(string.punctuation) for word in vocabulary], dtype=object)
    found = {quote: _places(reviews, words, quote.split()) for quote in QUOTES}
    having_all = set.intersection(*({*numbers.tolist()} for numbers, _ in found.values()))
    if len(having_all) != 1:
        return None
    (review,) = having_all
    spans = {}
    for quote, (numbers, steps) in found.items():
        first = int(steps[numbers == review][0])
        spans[quote] = first, first + len(quote.split()) - 1
    return review, spans


def _places(reviews: Ragged, words: np.ndarray, quote: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where a run of words begins: numbers of the reviews, and steps in them."""
    values, offsets = reviews.values, reviews.offsets
    hits = np.ones(max(0, len(values) - len(quote) + 1), dtype=bool)
    for offset, wanted in enumerate(quote):
        hits &= (words == wanted)[values[offset : offset + len(hits)]]
    starts = np.flatnonzero(hits)
    numbers = np.searchsorted(offsets, starts, side="right") - 1
    whole = starts + len(quote) <= offsets[numbers + 1]  # not into the next review
    return numbers[whole], (starts - offsets[numbers])[whole]


def pack(review: int, spans: dict[str, tuple[int, int]], states: np.ndarray) -> dict[str, Any]:
    """What a record has of states (T, m) float: each as a whole number of `unit`, from -127 to 127."""
    unit = float(np.abs(states).max()) / 127 or 1.0
    numbers = np.rint(states / unit).astype(np.int8)
    return {
        "review": review,
        "spans": {quote: list(span) for quote, span in spans.items()},
        "shape": list(states.shape),
        "unit": unit,
        "values": base64.b64encode(numbers.tobytes()).decode("ascii"),
    }


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The states (T, m) float64 that a record has, to half a `unit`."""
    return _numbers(packed) * packed["unit"]


def _numbers(packed: dict[str, Any]) -> np.ndarray:
    """(T, m) int64, in units."""
    numbers = np.frombuffer(base64.b64decode(packed["values"]), dtype=np.int8)
    return numbers.reshape(packed["shape"]).astype(np.int64)


def turns(packed: dict[str, Any]) -> dict[str, float]:
    """How like the state before the review turns (before "main weakness") the later ones are, by the cosine.

    fallen: the state after "not exactly a bad story", which the caption says resets most hidden states. recovered: that
    after "never played the game", by which they have recovered, it says.
    """
    states, spans = _numbers(packed), packed["spans"]
    before, fallen, recovered = (states[at] for at in (spans[WEAK][0] - 1, spans[BAD][1], spans[RECOMMENDED][1]))
    return {"fallen": _cosine(before, fallen), "recovered": _cosine(before, recovered)}


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    """Of whole numbers, whose sums are exact: the same bits on every machine."""
    squares = int((one * one).sum()) * int((two * two).sum())
    return int((one * two).sum()) / math.sqrt(squares) if squares else 0.0
