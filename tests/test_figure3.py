"""Figure 3: the review is found by what the paper quotes of it; its states, and how they turn, by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import figure3, processed, trial
from pipeline.params import load
from pipeline.processed import Processed
from pipeline.tasks import task_class

# Words of our own around the quotes.
REVIEW = [
    *("All", "in", "all", "simply", "gorgeous", "."),
    *("Main", "weakness", "is", "its", "story", "."),
    *("Not", "exactly", "a", "bad", "story", ",", "but", "if", "you", "never", "played", "the", "game"),
]
SPANS = {
    "simply gorgeous": (3, 4),
    "main weakness is its story": (6, 10),
    "not exactly a bad story": (12, 16),
    "never played the game": (21, 24),
}


def text(*reviews: list[str]) -> tuple[processed.Ragged, list[str]]:
    vocabulary = ["<pad>", "<unk>", *dict.fromkeys(word for review in reviews for word in review)]
    ids = [[vocabulary.index(word) for word in review] for review in reviews]
    offsets = np.cumsum([0, *map(len, ids)])
    return processed.Ragged(np.array([index for row in ids for index in row], np.int32), offsets), vocabulary


def test_the_review_is_found_by_its_quotes_in_any_tokens() -> None:
    other = ["a", "bad", "story", "never", "played", "the", "game"]
    assert figure3.find(*text(other, REVIEW, other)) == (1, SPANS)
    glued = " ".join(REVIEW).replace(" .", ".").replace(" ,", ",").split()
    found = figure3.find(*text(other, other, glued))
    assert found is not None
    assert (found[0], found[1]["never played the game"]) == (2, (18, 21))
    found = figure3.find(*text(other, REVIEW[3:], other))  # from its first word to its last
    assert found == (1, {quote: (first - 3, last - 3) for quote, (first, last) in SPANS.items()})


@pytest.mark.parametrize("reviews", [(REVIEW, REVIEW), (REVIEW[:-1], ["game"]), (["a"],), ()])
def test_no_review_or_more_than_one_is_none(reviews: tuple[list[str], ...]) -> None:
    assert figure3.find(*text(*reviews)) is None


def test_states_come_back_to_half_a_unit() -> None:
    states = np.random.default_rng(1).uniform(-3, 3, (25, 8))
    packed = figure3.pack(7, SPANS, states)
    assert packed["review"] == 7
    assert packed["unit"] == np.abs(states).max() / 127
    np.testing.assert_allclose(figure3.unpack(packed), states, atol=packed["unit"] / 2)
    assert not figure3.unpack(figure3.pack(7, SPANS, np.zeros((25, 8)))).any()


def turning() -> dict[str, Any]:
    """Two units: (1, 0) before the weakness, step 5; (-1, 0) after the bad story, 16; (1, 1) at the end, 24."""
    states = np.full((25, 2), 0.5)
    states[5], states[16], states[24] = (1, 0), (-1, 0), (1, 1)
    return figure3.pack(1, SPANS, states)


def test_turns_by_hand() -> None:
    assert figure3.turns(turning()) == {"fallen": -1.0, "recovered": pytest.approx(math.sqrt(0.5))}


@pytest.mark.parametrize("family", ["qrnn", "lstm"])
def test_a_trials_states_are_those_of_its_model_step_by_step(tmp_path: Path, family: str) -> None:
    """A QRNN's c, an LSTM's h; the review is the second of three."""
    reviews, vocabulary = text(["bad", "story"], REVIEW, ["simply", "gorgeous"])
    with processed.writing(tmp_path / "data") as writer:
        writer.array("test.values", reviews.values)
        writer.array("test.offsets", reviews.offsets)
        writer.json("vocabulary", vocabulary)
    recipe = load().trial("sample", "imdb", family, 1).recipe
    task = task_class("imdb")(Processed(tmp_path / "data"), recipe, torch.device("cpu"))
    model = task.model().eval()
    packed = task.states(model)
    assert packed is not None
    assert (packed["review"], packed["shape"]) == (1, [25, recipe.hidden])
    state, expected = None, []
    with torch.no_grad():
        for token in reviews[1]:
            _, state = model.stack.step(model.embedding(torch.tensor([int(token)])), state)
            expected.append(getattr(state.layers[-1], "c" if family == "qrnn" else "h")[0].numpy())
    np.testing.assert_allclose(figure3.unpack(packed), expected, atol=packed["unit"] / 2 + 1e-6)


def test_a_test_set_without_the_review_has_no_states(data: Path) -> None:
    record = trial.run(load().trial("sample", "imdb", "qrnn", 1), device="cpu", report=lambda progress: None)
    assert record["states"] is None
