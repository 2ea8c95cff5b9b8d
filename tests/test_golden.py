"""Loss curves as they were: see `golden_curves`, which says what they are worth."""

import dataclasses
from collections.abc import Iterator

import golden_curves as golden
import pytest
import torch
from conftest import read_json

from pipeline import paths
from pipeline.params import load

PARAMS = load(paths.CODE / "params.yaml")
TRIALS = golden.trials(PARAMS)
AGAIN = f"if the change is meant: {golden.COMMAND}"


@pytest.fixture(scope="module", autouse=True)
def _corpora() -> Iterator[None]:
    here, there = golden.draws(), read_json(golden.FILE)["draws"]
    if here != there:
        pytest.skip(f"this torch draws other random numbers ({here}) than the one that made the curves ({there})")
    threads = torch.get_num_threads()
    with golden.corpora(PARAMS):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> dict[str, golden.Curve]:
    return read_json(golden.FILE)["curves"]


def test_every_cell_has_a_curve(expected: dict[str, golden.Curve]) -> None:
    assert list(expected) == list(TRIALS), AGAIN
    assert {len(curve["losses"]) for curve in expected.values()} == {golden.STEPS}


@pytest.mark.parametrize("name", TRIALS)
def test_losses_are_as_they_were(name: str, expected: dict[str, golden.Curve]) -> None:
    found = golden.differences(name, expected[name], golden.curve(TRIALS[name]))
    if found:
        more = [f"... and {len(found) - 3} more"] if len(found) > 3 else []
        pytest.fail("\n".join([*found[:3], *more, AGAIN]), pytrace=False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"learning_rate": 1.01 * trial.recipe.learning_rate}) for name, trial in TRIALS.items()),
        ("ptb/qrnn-zoneout", {"zoneout": 0.105}),
        ("ptb/qrnn", {"dropout": 0.105}),
        ("ptb/qrnn", {"window_inputs": "zero"}),
        ("ptb/lstm", {"epsilon": 1e-6}),
        ("iwslt/qrnn", {"extra_padding": "right"}),
        ("iwslt/qrnn", {"encoder_states": "c"}),
        ("imdb/qrnn-k4", {"kernel_size": (2, 4)}),
        ("imdb/qrnn", {"dense": False}),
    ],
)
def test_a_small_change_is_seen(name: str, changes: dict, expected: dict[str, golden.Curve]) -> None:
    trial = TRIALS[name]
    changed = dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, **changes))
    found = golden.differences(name, expected[name], golden.curve(changed))
    assert len(found) > 1  # not the validation alone


def test_a_difference_names_the_cell_the_step_and_both_numbers() -> None:
    old = {"data": "d", "losses": [2.0, 1.0, 0.5], "valid": 3.0}
    new = {"data": "d", "losses": [2.0 * (1 + 0.9e-5), 1.1, float("nan")], "valid": 3.3}
    assert golden.differences("ptb/qrnn", old, new) == [
        "ptb/qrnn step 2: expected 1.0, got 1.1 (off by 1.0e-01)",
        "ptb/qrnn step 3: expected 0.5, got nan (off by nan)",
        "ptb/qrnn validation perplexity: expected 3.0, got 3.3 (off by 1.0e-01)",
    ]
    (line,) = golden.differences("ptb/qrnn", old, {**old, "data": "e"})
    assert line == "ptb/qrnn: expected data d, got e: the generated corpus changed"
