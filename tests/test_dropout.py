"""Dropout against its definition, and the random masks that it shares with zoneout."""

import math

import pytest
import torch
from torch import nn

import qrnn
from qrnn.dropout import Dropout, chosen
from qrnn.models import Classifier, LanguageModel, Seq2Seq

CPU = torch.device("cpu")


def test_masks_follow_torchs_seed_and_their_elements_are_independent():
    shape, p = torch.Size((101, 7, 301)), 0.3
    torch.manual_seed(5)
    first = chosen(shape, p, CPU).double()
    second = chosen(shape, p, CPU).double()
    torch.manual_seed(5)
    assert torch.equal(first, chosen(shape, p, CPU).double())
    deviation = math.sqrt(p * (1 - p) / shape.numel())
    assert abs(first.mean().item() - p) < 5 * deviation
    for other in (
        second,
        first.roll(1, 2),
        first.roll(2, 2),
        first.roll(3, 2),
        first.roll(1, 1),
        first.roll(1, 0),
    ):
        assert abs((first * other).mean().item() - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / shape.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_an_element_is_zero_or_divided_by_what_is_kept(dtype, p):
    torch.manual_seed(1)
    x = torch.randn(50, 40, 31).to(dtype).requires_grad_()
    y = Dropout(p)(x)
    kept = y != 0
    assert y.dtype == dtype
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / x.numel())
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y[kept].double(), x[kept].double() / (1 - p), rtol=rounding, atol=0)
    upstream = torch.randn(x.shape).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    expected = torch.where(kept, upstream.double() / (1 - p), 0.0)
    torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=0)


def test_nothing_is_dropped_in_evaluation_or_with_probability_0():
    x = torch.randn(3, 2, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_under_torch_compile_the_rate_and_the_factor_stay():
    torch.manual_seed(2)
    x = torch.ones(100, 20, 50)
    y = torch.compile(Dropout(0.25), fullgraph=True)(x)
    assert abs((y == 0).double().mean().item() - 0.25) < 0.01
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_a_probability_next_to_0_or_1_still_drops_and_keeps(p):
    """One in 2^16 elements, or all but one: the nearest that 16 bits have."""
    dropped = Dropout(p)(torch.ones(2**20)) == 0
    assert min(p, 1 - p) < min(dropped.sum().item(), (~dropped).sum().item()) / 2**20 < 1e-4


def test_a_probability_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got 1\.0"):
        Dropout(1.0)


def test_no_model_draws_its_masks_element_by_element():
    stacks = [qrnn.QRNN(4, 8, 2, dropout=0.5), qrnn.LSTM(4, 8, 2, dropout=0.5)]
    made = [of(9, 4, stack, dropout=0.5) for stack in stacks for of in (Classifier, LanguageModel)]
    made += [Seq2Seq(9, None, 4, stack, stack, dropout=0.5) for stack in stacks[1:]]
    made += [Seq2Seq(9, None, 4, stacks[0], qrnn.QRNN(4, 8, 2, dropout=0.5, context_size=8), dropout=0.5)]
    assert not [part for model in made for part in model.modules() if isinstance(part, nn.Dropout)]
