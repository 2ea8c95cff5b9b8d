"""Convolution over time and one layer: equations 1, 2 and 7, causality, carried state."""

import math

import numpy as np
import pytest
import torch

from qrnn import QRNNLayer
from qrnn.conv import conv_over_time, next_tail

POOLINGS = ("f", "fo", "ifo")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolve(x, w, left):
    """sum over j of x_{t - left + j} w_j with zeros outside x, in numpy: x (T, B, n), w (k, n, m)."""
    steps = x.shape[0]
    y = np.zeros((*x.shape[:2], w.shape[2]))
    for t in range(steps):
        for j in range(w.shape[0]):
            if 0 <= t - left + j < steps:
                y[t] += x[t - left + j] @ w[j]
    return y


def layer_of(*args, **options):
    return QRNNLayer(*args, **options).double()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_masked_convolution_by_hand_and_against_torchs(k):
    x, w, b = torch.randn(5, 2, 3).double(), torch.randn(k, 3, 4).double(), torch.randn(4).double()
    y = conv_over_time(x, w, b)
    np.testing.assert_allclose(y.numpy(), convolve(x.numpy(), w.numpy(), k - 1) + b.numpy(), atol=1e-13)
    padded = torch.nn.functional.pad(x.permute(1, 2, 0), (k - 1, 0))
    other = torch.nn.functional.conv1d(padded, w.permute(2, 1, 0), b).permute(2, 0, 1)
    torch.testing.assert_close(y, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_unmasked_convolution_pads_the_extra_step_on_the_left(k):
    x, w = torch.randn(5, 2, 3).double(), torch.randn(k, 3, 4).double()
    expected = convolve(x.numpy(), w.numpy(), {1: 0, 2: 1, 3: 1, 4: 2, 6: 3}[k])
    np.testing.assert_allclose(conv_over_time(x, w, causal=False).numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_the_extra_step_can_be_on_the_right(k):
    """By hand, and as torch's convolution of the input padded on both sides."""
    x, w = torch.randn(5, 2, 3).double(), torch.randn(k, 3, 4).double()
    left = {1: 0, 2: 0, 3: 1, 4: 1, 6: 2}[k]
    y = conv_over_time(x, w, causal=False, extra_padding="right")
    np.testing.assert_allclose(y.numpy(), convolve(x.numpy(), w.numpy(), left), atol=1e-13)
    padded = torch.nn.functional.pad(x.permute(1, 2, 0), (left, k - 1 - left))
    other = torch.nn.functional.conv1d(padded, w.permute(2, 1, 0)).permute(2, 0, 1)
    torch.testing.assert_close(y, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("causal", "side"), [(True, "left"), (False, "left"), (False, "right")])
def test_convolution_gradients(k, causal, side):
    leaves = [torch.randn(s).double().requires_grad_() for s in ((4, 2, 3), (k, 3, 5), (5,))]
    tail = torch.randn(k - 1, 2, 3).double().requires_grad_() if causal and k > 1 else None
    inputs = leaves if tail is None else [*leaves, tail]

    def run(x, w, b, tail=None):
        return conv_over_time(x, w, b, tail=tail, causal=causal, extra_padding=side)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_convolution_takes_expanded_gradients_and_casts_under_autocast():
    x, w = torch.randn(4, 2, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    conv_over_time(x, w).sum().backward()
    of_the_next, of_its_own = w.detach().sum(-1)  # x[t] is in the sums of steps t + 1, which the last has not, and t
    expected = of_its_own + of_the_next * torch.tensor([1.0, 1.0, 1.0, 0.0]).view(4, 1, 1)
    torch.testing.assert_close(x.grad, expected.expand(4, 2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_over_time(x, w)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), conv_over_time(x, w), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(4, 2, 7), {}, r"x: expected \(T, B, n = 3\).*got \(4, 2, 7\)"),
        (
            torch.zeros(4, 2, 3),
            {"tail": torch.zeros(2, 2, 3)},
            r"tail: expected \(k - 1, B, n\) = \(1, 2, 3\), got",
        ),
        (torch.zeros(4, 2, 3), {"extra_padding": "both"}, "extra_padding: expected left or right, got 'both'"),
        (torch.zeros(4, 2, 3), {"extra_padding": "right"}, "extra_padding: expected left with causal=True"),
        (
            torch.zeros(4, 2, 3),
            {"tail": torch.zeros(1, 2, 3), "causal": False},
            "tail: expected None with causal=False",
        ),
    ],
)
def test_convolution_names_a_bad_argument(x, options, message):
    with pytest.raises(ValueError, match=message):
        conv_over_time(x, torch.zeros(2, 3, 5), **options)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_next_tail_is_the_last_inputs_of_each_row(k):
    x, tail = torch.randn(4, 3, 2), torch.randn(k - 1, 3, 2)
    whole = torch.cat([tail, x])
    assert torch.equal(next_tail(x, tail, k), whole[4:])
    assert torch.equal(next_tail(x, None, k), torch.cat([torch.zeros_like(tail), x])[4:])
    rows = next_tail(x, tail, k, torch.tensor([0, 4, 2]))
    for b, length in enumerate((0, 4, 2)):
        assert torch.equal(rows[:, b], whole[length : length + k - 1, b])


def test_equations_1_and_4_by_hand():
    """Z, F, O as masked convolutions, then fo-pooling: all in numpy, biases zero as in the paper."""
    layer, x = layer_of(3, 4, kernel_size=3, bias=False), torch.randn(6, 2, 3).double()
    w = layer.weight.detach().numpy()
    z, f, o = (convolve(x.numpy(), w[:, :, g * 4 : (g + 1) * 4], 2) for g in range(3))
    z, f, o = np.tanh(z), sigmoid(f), sigmoid(o)
    c, h = np.zeros((2, 4)), np.zeros((6, 2, 4))
    for t in range(6):
        c = f[t] * c + (1 - f[t]) * z[t]
        h[t] = o[t] * c
    output, state = layer(x)
    np.testing.assert_allclose(output.detach().numpy(), h, atol=1e-13)
    np.testing.assert_allclose(state.c.detach().numpy(), c, atol=1e-13)
    np.testing.assert_allclose(state.h.detach().numpy(), h[-1], atol=1e-13)


def test_equation_2_is_the_lstm_like_special_case_and_equation_5_by_hand():
    """k = 2: each gate is W^1 x_{t-1} + W^2 x_t; columns lie in the order z, f, i, o."""
    layer, x = layer_of(2, 3, kernel_size=2, pooling="ifo"), torch.randn(4, 1, 2).double()
    first, second, bias = (t.detach().numpy() for t in (*layer.weight, layer.bias))
    c, previous = np.zeros((1, 3)), np.zeros((1, 2))
    output, _ = layer(x)
    for t, current in enumerate(x.numpy()):
        gates = previous @ first + current @ second + bias
        z, f, i, o = np.tanh(gates[:, :3]), *(sigmoid(gates[:, 3 * g : 3 * g + 3]) for g in (1, 2, 3))
        c = f * c + i * z
        np.testing.assert_allclose(output[t].detach().numpy(), o * c, atol=1e-13)
        previous = current


def test_parameters_start_uniform_within_the_root_of_their_fan_in():
    layer = QRNNLayer(50, 40, kernel_size=2, context_size=30)
    for parameter, fan_in in ((layer.weight, 2 * 50), (layer.bias, 2 * 50), (layer.context_weight, 30)):
        bound = 1 / math.sqrt(fan_in)
        assert 0.95 * bound < parameter.max().item() <= bound
        assert -bound <= parameter.min().item() < -0.95 * bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # of U(-bound, bound)


def test_equation_7_adds_the_projected_context_at_every_step():
    layer, x, context = (
        layer_of(2, 3, context_size=5),
        torch.randn(4, 2, 2).double(),
        torch.randn(2, 5).double(),
    )
    w, v = layer.weight.detach().numpy(), layer.context_weight.detach().numpy()
    gates = convolve(x.numpy(), w, 1) + layer.bias.detach().numpy() + context.numpy() @ v
    z, f, o = np.tanh(gates[..., :3]), sigmoid(gates[..., 3:6]), sigmoid(gates[..., 6:])
    c = np.zeros((2, 3))
    output, _ = layer(x, context=context)
    for t in range(4):
        c = f[t] * c + (1 - f[t]) * z[t]
        np.testing.assert_allclose(output[t].detach().numpy(), o[t] * c, atol=1e-13)
    with pytest.raises(ValueError, match=r"context: expected \(B, context_size\).*got None"):
        layer(x)
    with pytest.raises(ValueError, match="context: expected None"):
        layer_of(2, 3)(x, context=context)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_masked_layer_sees_no_later_step_and_an_unmasked_one_does(pooling, k):
    x = torch.randn(9, 2, 3).double()
    changed = x.clone()
    changed[4] += 1
    layer = layer_of(3, 4, kernel_size=k, pooling=pooling)
    before, after = layer(x)[0], layer(changed)[0]
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).all()
    layer.causal = False
    before, after = layer(x)[0], layer(changed)[0]
    first = 4 - (k - 1) // 2  # the extra step of an even filter is on the left
    assert torch.equal(before[:first], after[:first])
    assert (before[first] != after[first]).all()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_two_windows_with_carried_state_equal_one(pooling, k):
    layer, x = layer_of(3, 4, kernel_size=k, pooling=pooling), torch.randn(9, 2, 3).double()
    whole, last = layer(x)
    for cut in (1, 4, 8):
        first, state = layer(x[:cut])
        second, end = layer(x[cut:], state)
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-14)
        for got, expected in zip(end, last, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_depends_neither_on_its_padding_nor_on_its_neighbours(pooling, causal, k):
    """Outputs, state and gradients of a padded row are those of the row alone."""
    layer = layer_of(3, 4, kernel_size=k, pooling=pooling, causal=causal)
    x, lengths = torch.randn(8, 3, 3).double().requires_grad_(), torch.tensor([5, 8, 1])
    upstream = torch.randn(8, 3, 4).double()
    output, state = layer(x, lengths=lengths)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    for b, length in enumerate(lengths.tolist()):
        row = x.detach()[:length, b : b + 1].requires_grad_()
        alone, end = layer(row)
        torch.testing.assert_close(output[:length, b : b + 1], alone, rtol=0, atol=1e-14)
        assert (output[length:, b] == 0).all()
        (expected,) = torch.autograd.grad(alone, row, upstream[:length, b : b + 1])
        torch.testing.assert_close(gradient[:length, b : b + 1], expected, rtol=0, atol=1e-14)
        assert (gradient[length:, b] == 0).all()
        for got, want in zip(state, end, strict=True):
            torch.testing.assert_close(got[..., b : b + 1, :], want, rtol=0, atol=1e-14)


def test_a_row_of_no_steps_keeps_its_state():
    layer = layer_of(3, 4, kernel_size=3)
    _, before = layer(torch.randn(5, 2, 3).double())
    output, after = layer(torch.randn(4, 2, 3).double(), before, lengths=torch.tensor([0, 4]))
    assert (output[:, 0] == 0).all()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[..., 0, :], new[..., 0, :])
        assert not torch.equal(old[..., 1, :], new[..., 1, :])


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 0, 5])])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_ungated_state_times_gate_is_the_output(pooling, lengths):
    layer, x = layer_of(3, 4, pooling=pooling), torch.randn(5, 3, 3).double()
    output, state = layer(x, lengths=lengths)
    (c, o), other = layer.forward_ungated(x, lengths=lengths)
    assert (o is None) == (pooling == "f")
    torch.testing.assert_close(c if o is None else o * c, output, rtol=0, atol=1e-14)
    for got, want in zip(other, state, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_ungated_and_whole_leave_the_same_state_of_a_row_of_no_steps(pooling):
    """Its h, under autocast too, where c has another dtype."""
    layer, x, lengths = QRNNLayer(3, 4, pooling=pooling), torch.randn(5, 2, 3), torch.tensor([0, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, before = layer(x)
        before = before._replace(h=before.h + 1)
        _, expected = layer(x, before, lengths)
        _, got = layer.forward_ungated(x, before, lengths)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)
    assert torch.equal(got.h[0], before.h[0])


def test_zoneout_acts_in_training_only():
    layer, x = layer_of(3, 4, zoneout=0.5), torch.randn(5, 2, 3).double()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    plain = layer_of(3, 4)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scaled_zoneout_is_that_of_the_authors_library_by_hand(pooling):
    """There the gate weighs the new candidate, c = g z + (1 - g) c, and evaluation multiplies g by 1 - p."""
    layer = layer_of(3, 4, pooling=pooling, zoneout=0.3, zoneout_evaluation="scaled").eval()
    x, w, bias = torch.randn(5, 2, 3).double(), layer.weight.detach().numpy(), layer.bias.detach().numpy()
    parts = np.split(convolve(x.numpy(), w, 1) + bias, len(pooling) + 1, axis=-1)
    z, g = np.tanh(parts[0]), (1 - sigmoid(parts[1])) * (1 - 0.3)
    i = sigmoid(parts[2]) if pooling == "ifo" else g
    o = sigmoid(parts[-1]) if "o" in pooling else np.ones_like(z)
    c, state = np.zeros((2, 4)), None
    output, last = layer(x)
    (ungated, _), _ = layer.forward_ungated(x)
    for t in range(5):
        c = i[t] * z[t] + (1 - g[t]) * c
        np.testing.assert_allclose(output[t].detach().numpy(), o[t] * c, atol=1e-14)
        np.testing.assert_allclose(ungated[t].detach().numpy(), c, atol=1e-14)
        y, state = layer.step(x[t], state)
        np.testing.assert_allclose(y.detach().numpy(), o[t] * c, atol=1e-14)
    np.testing.assert_allclose(last.c.detach().numpy(), c, atol=1e-14)


def test_scaled_zoneout_holds_at_shut_and_open_gates():
    """c = (1 - p)(1 - f) tanh(50) from zero, p = 1/4: 3/4 at f = 0, 3/8 at f = 1/2, 0 at f = 1; finite gradients."""
    for gate, expected in ((-1e3, 0.75), (0.0, 0.375), (1e3, 0.0)):
        layer = layer_of(1, 1, kernel_size=1, pooling="f", zoneout=0.25, zoneout_evaluation="scaled").eval()
        layer.bias.data = torch.tensor([50.0, gate], dtype=torch.float64)
        output, _ = layer(torch.zeros(1, 1, 1).double())
        assert output.item() == pytest.approx(expected, abs=1e-15)
        output.backward()
        assert layer.bias.grad.isfinite().all()


def test_scaled_zoneout_leaves_training_as_it_is():
    x, layers = (
        torch.randn(5, 2, 3).double(),
        [layer_of(3, 4, zoneout=0.5, zoneout_evaluation=e) for e in ("none", "scaled")],
    )
    layers[1].load_state_dict(layers[0].state_dict())
    outputs = []
    for layer in layers:
        torch.manual_seed(1)
        outputs.append(layer(x)[0])
    assert torch.equal(*outputs)


def test_autocast_trains_and_keeps_the_state_in_float32():
    layer, plain, x = QRNNLayer(8, 16), QRNNLayer(8, 16, backend="reference"), torch.randn(12, 3, 8)
    plain.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = layer(x)
        again, _ = layer(x, state)
    assert (output.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)
    again.float().sum().backward()
    exact = torch.autograd.grad(plain(x, plain(x)[1])[0].sum(), plain.weight)[0]
    torch.testing.assert_close(layer.weight.grad, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())
    torch.testing.assert_close(output.float(), layer(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size: expected an integer of at least 1, got 0"),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1, got 0"),
        ({"pooling": "of"}, "pooling: expected one of f, fo, ifo, got 'of'"),
        ({"zoneout": 1}, r"zoneout: expected a probability in \[0, 1\), got 1"),
        ({"zoneout_evaluation": "mean"}, "zoneout_evaluation: expected none or scaled, got 'mean'"),
        ({"extra_padding": "right"}, "extra_padding: expected left with causal=True"),
        ({"backend": "gpu"}, "backend: expected auto or one of reference, numba, numba_cuda, got 'gpu'"),
    ],
)
def test_a_bad_constructor_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        QRNNLayer(**{"input_size": 2, "hidden_size": 3, **options})


def test_a_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x: expected \(T, B, input_size = 2\), got \(4, 2\)"):
        QRNNLayer(2, 3)(torch.zeros(4, 2))
    layer, x = QRNNLayer(2, 3), torch.zeros(4, 1, 2)
    context = QRNNLayer(2, 3, context_size=5)
    _, state = layer(x)
    wider = state._replace(c=state.c.double())
    for call, message in (
        (lambda: layer(x.double()), "x: expected dtype torch.float32, as the weights, got torch.float64"),
        (lambda: layer.step(x[0].double()), "x: expected dtype torch.float32, as the weights, got torch.float64"),
        (lambda: layer.step(x), r"x: expected \(B, input_size = 2\) at a step, got \(4, 1, 2\)"),
        (lambda: layer(x, mode="windows"), "mode: expected window, ungated or step, got 'windows'"),
        (lambda: layer(x[0], lengths=torch.ones(1), mode="step"), "lengths: expected None for one step at a time"),
        (lambda: layer(x, lengths=[4]), r"lengths: expected an int64 tensor of shape \(B,\), got list"),
        (lambda: layer(x, wider), "initial: expected dtype torch.float32, got torch.float64"),
        (lambda: layer.step(x[0], wider), "initial: expected dtype torch.float32, got torch.float64"),
        (lambda: context(x, context=torch.zeros(5)), r"context: expected \(B, context_size\) = \(1, 5\), got \(5,\)"),
        (lambda: context(x, context=torch.zeros(4, 1, 5)), r"context: expected .* \(1, 5\), got \(4, 1, 5\)"),
        (lambda: context.step(x[0], context=torch.zeros(1, 4)), r"context: expected .* \(1, 5\), got \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_in_the_padding_is_in_no_output_and_no_gradient(causal, backend):
    layer = QRNNLayer(4, 5, causal=causal, backend=backend)
    x, lengths = torch.randn(5, 2, 4), torch.tensor([3, 5])
    results = []
    for padding in (0.0, math.nan):
        layer.zero_grad()
        padded = x.clone()
        padded[3:, 0] = padding
        output, state = layer(padded, lengths=lengths)
        output.sum().backward()
        results.append([output, *state, *(parameter.grad.clone() for parameter in layer.parameters())])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean)


def test_a_float64_layer_stays_so_under_autocast():
    """As nn.Linear does; `step` is one matrix product, which did all along."""
    layer, x = layer_of(3, 4), torch.randn(5, 2, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        output, state = layer(x)
        _, after = layer.step(x[0], state)
    assert {output.dtype, state.c.dtype, after.c.dtype} == {torch.float64}


def test_a_layer_runs_on_the_meta_device():
    output, state = QRNNLayer(4, 5).to("meta")(torch.zeros(6, 3, 4, device="meta"))
    assert (output.shape, state.c.shape) == ((6, 3, 5), (3, 5))
