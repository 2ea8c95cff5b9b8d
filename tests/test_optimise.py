"""One optimisation step against values worked by hand."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from pipeline import paths
from pipeline.optimise import Optimiser, initialise
from pipeline.params import Recipe, load


def recipe(**changes) -> Recipe:
    base = load(paths.CODE / "params.yaml").trial("paper", "ptb", "qrnn", 1).recipe
    return dataclasses.replace(base, **{"l2": 0.0, "clip_norm": None, "learning_rate": 0.1, **changes})


def stepped(chosen: Recipe, steps: int = 1) -> list[float]:
    """A weight (3, 4) after steps down a loss whose gradient is (8, 6), of norm 10 and not along the weight."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    optimiser = Optimiser(model, chosen)
    optimiser.start_epoch(1)
    for _ in range(steps):
        optimiser.step((model.weight * torch.tensor([[8.0, 6.0]])).sum())
    return model.weight.flatten().tolist()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimiser": "sgd"}, [3 - 0.8, 4 - 0.6]),
        ({"optimiser": "sgd", "clip_norm": 5.0}, [3 - 0.4, 4 - 0.3]),
        ({"optimiser": "sgd", "clip_norm": 20.0}, [3 - 0.8, 4 - 0.6]),  # rescaled only above the threshold
        # (4, 3) after the rescaling, and 0.1 * (3, 4) on top
        ({"optimiser": "sgd", "clip_norm": 5.0, "l2": 0.1, "l2_order": "after_clip"}, [3 - 0.43, 4 - 0.34]),
        # (8.3, 6.4) has norm sqrt(109.85), and is rescaled to 5
        (
            {"optimiser": "sgd", "clip_norm": 5.0, "l2": 0.1, "l2_order": "before_clip"},
            [3 - 4.15 / math.sqrt(109.85), 4 - 3.2 / math.sqrt(109.85)],
        ),
        # the mean square starts at 0: g / sqrt(0.1 g^2)
        ({"optimiser": "rmsprop", "alpha": 0.9}, [3 - 0.1 / math.sqrt(0.1), 4 - 0.1 / math.sqrt(0.1)]),
        ({"optimiser": "adam"}, [2.9, 3.9]),  # with bias correction the first step is the learning rate
    ],
)
def test_one_step(changes: dict, expected: list[float]) -> None:
    assert stepped(recipe(**changes)) == pytest.approx(expected, rel=1e-5)


def test_a_step_is_of_its_own_gradient_alone() -> None:
    assert stepped(recipe(optimiser="sgd"), steps=2) == pytest.approx([3 - 2 * 0.8, 4 - 2 * 0.6], rel=1e-5)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_fused_kernels_give_torchs_plain_steps(optimiser: str) -> None:
    """Against the same class of torch without fusing, over 20 steps with penalty and rescaling."""
    chosen = recipe(optimiser=optimiser, l2=0.01, clip_norm=1.0, learning_rate=0.01)
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    plain.load_state_dict(fused.state_dict())
    optimisers = Optimiser(fused, chosen), Optimiser(plain, chosen)
    kind = type(optimisers[0].optimiser)
    assert optimisers[0].optimiser.defaults["fused"]
    optimisers[1].optimiser = kind(plain.parameters(), **{**optimisers[1].optimiser.defaults, "fused": False})
    for _ in range(20):
        x = torch.randn(11, 7)
        for model, one in zip((fused, plain), optimisers, strict=True):
            one.step(model(x).square().sum())
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("epoch", "rate"), [(1, 1.0), (6, 1.0), (7, 0.95), (8, 0.9025), (72, 0.95**66)])
def test_schedule_of_the_paper(epoch: int, rate: float) -> None:
    """Section 3.2: 1 for six epochs, then decayed by 0.95 for each subsequent epoch, 72 in all."""
    chosen = load(paths.CODE / "params.yaml").trial("paper", "ptb", "qrnn", 1).recipe
    assert Optimiser(nn.Linear(1, 1), chosen).start_epoch(epoch) == pytest.approx(rate)


def test_initial_range() -> None:
    model = nn.Linear(100, 100)
    initialise(model, recipe(initial_range=0.05))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert 0.0495 < weights.abs().max().item() <= 0.05
    assert weights.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.05)  # of U(-r, r)
