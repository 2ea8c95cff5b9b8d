"""Word vectors out of a task's own training text: word2vec's continuous bag of words with negative sampling (Mikolov
et al., 2013), in one thread.

The same bytes on every machine, which a library with BLAS does not promise: sums run in a fixed order in float32, the
sigmoid comes out of a table that is rounded coarser than what mathematical libraries differ by, and random numbers are
whole ones.
"""

import numpy as np
from numba import njit

WINDOW = 5  # words at most on either side of the word that is guessed; each time drawn from 1 to this
NEGATIVES = 5  # words drawn against it
EPOCHS = 5
SEED = 1  # one for all trials, as the data are
RATE = 0.05  # at the beginning; falls to RATE / 10,000 with the words read
FREQUENT = 1e-3  # share of the text from which on occurrences of a word are left out at random
NOISE_POWER = 0.75  # of a word's count, for the draw of negatives
NOISE_SLOTS = 1 << 20
SIGMOID_LIMIT, SIGMOID_STEPS, SIGMOID_GRAIN = 6, 1 << 7, 1 << 20


def train(
    documents: list[np.ndarray], words: int, dimensions: int, epochs: int = EPOCHS, seed: int = SEED
) -> np.ndarray:
    """Vectors (words, dimensions) float32 of the words in `documents`; rows 0 and 1 (padding, unknown) stay zero.

    Args:
        documents: word ids, (n,) whole numbers below `words` each; those below 2 are passed over.
        epochs: passes over the documents.
    """
    kept = [document[document > 1] for document in documents]
    text = np.concatenate(kept).astype(np.int64)
    ends = np.cumsum([len(document) for document in kept])
    counts = np.bincount(text, minlength=words)
    random = np.random.Generator(np.random.PCG64(seed))
    vectors = ((random.random((words, dimensions)) - 0.5) / dimensions).astype(np.float32)
    vectors[:2] = 0
    outputs = np.zeros_like(vectors)
    state = np.array([seed], dtype=np.uint64)
    total = epochs * len(text)
    for epoch in range(epochs):
        _pass(text, ends, _kept(counts), _noise(counts), _sigmoid(), vectors, outputs, state, epoch * len(text), total)
    return vectors


def _kept(counts: np.ndarray) -> np.ndarray:
    """Chance that an occurrence is read, of 65,536: sqrt(t / f) + t / f of a word with the share f of the text."""
    ratio = FREQUENT * counts.sum() / np.maximum(counts, 1)
    return np.rint(np.minimum(np.sqrt(ratio) + ratio, 1.0) * (1 << 16)).astype(np.int64)


def _noise(counts: np.ndarray) -> np.ndarray:
    """Words (NOISE_SLOTS,), each in as many slots as its share of count ** 0.75; by whole numbers."""
    weights = np.rint(16 * counts**NOISE_POWER).astype(np.int64)
    ends = weights.cumsum() * NOISE_SLOTS // weights.sum()
    return np.repeat(np.arange(len(counts)), np.diff(ends, prepend=0))


def _sigmoid() -> np.ndarray:
    """The sigmoid at the middles of SIGMOID_STEPS intervals to one, from -SIGMOID_LIMIT to SIGMOID_LIMIT; float32."""
    x = (np.arange(2 * SIGMOID_LIMIT * SIGMOID_STEPS) + 0.5) / SIGMOID_STEPS - SIGMOID_LIMIT
    return (np.rint(SIGMOID_GRAIN / (1 + np.exp(-x))) / SIGMOID_GRAIN).astype(np.float32)


@njit(cache=True)
def _draw(state, below):
    """A whole number from 0 to below - 1; the generator of Java and POSIX (drand48) on 64 bits."""
    state[0] = state[0] * np.uint64(25214903917) + np.uint64(11)
    return np.int64((state[0] >> np.uint64(16)) % np.uint64(below))


@njit(cache=True)
def _pass(text, ends, kept, noise, sigmoid, vectors, outputs, state, done, total):
    """One pass; changes vectors, outputs and state."""
    sentence = np.empty(len(text), dtype=np.int64)
    mean, error = np.empty(vectors.shape[1], dtype=np.float32), np.empty(vectors.shape[1], dtype=np.float32)
    start = 0
    for end in ends:
        rate = np.float32(RATE * max(1.0 - (done + start) / total, 1e-4))
        length = 0
        for place in range(start, end):
            if _draw(state, 1 << 16) < kept[text[place]]:
                sentence[length] = text[place]
                length += 1
        for place in range(length):
            _guess(sentence[:length], place, noise, sigmoid, vectors, outputs, state, rate, mean, error)
        start = end


@njit(cache=True)
def _guess(sentence, place, noise, sigmoid, vectors, outputs, state, rate, mean, error):
    """One step of gradient descent: the word at `place` and words of noise, out of the mean of those around it."""
    width = 1 + _draw(state, WINDOW)
    first, last = max(place - width, 0), min(place + width, len(sentence) - 1)
    if first == last:
        return
    mean[:] = 0
    error[:] = 0
    for other in range(first, last + 1):
        if other != place:
            mean += vectors[sentence[other]]
    mean *= np.float32(1.0) / np.float32(last - first)
    for draw in range(NEGATIVES + 1):
        word = sentence[place] if draw == 0 else noise[_draw(state, len(noise))]
        if draw > 0 and word == sentence[place]:
            continue
        output = outputs[word]
        score = np.float32(0)
        for i in range(len(mean)):
            score += mean[i] * output[i]
        slot = int((score + SIGMOID_LIMIT) * SIGMOID_STEPS)
        chance = sigmoid[min(max(slot, 0), len(sigmoid) - 1)]
        gain = (np.float32(1 if draw == 0 else 0) - chance) * rate
        for i in range(len(mean)):
            error[i] += gain * output[i]
            output[i] += gain * mean[i]
    for other in range(first, last + 1):
        if other != place:
            vectors[sentence[other]] += error
