"""The stack in nn.LSTM's place: both directions, packed and unbatched input, streaming, older checkpoints."""

import inspect
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from qrnn import QRNN, QRNNLayer, make_stack
from qrnn.models import Classifier, LanguageModel

FAMILIES = ("qrnn", "lstm")
POOLINGS = ("f", "fo", "ifo")
WIDTHS = (1, 2, 3, 6)

pytestmark = pytest.mark.usefixtures("one_seed_one_thread")


def close(got, expected, atol=1e-13):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def same_states(got, expected, atol=1e-13):
    for one, other in zip(got.layers, expected.layers, strict=True):
        for a, b in zip(one, other, strict=True):
            close(a, b, atol)


# Both directions


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_both_directions_are_two_layers_side_by_side(pooling, causal):
    """The second is a layer of its own over the row reversed within its own length."""
    options = {"kernel_size": 3, "pooling": pooling, "causal": causal}
    stack = QRNN(3, 4, bidirectional=True, **options).double()
    ahead, back = QRNNLayer(3, 4, **options).double(), QRNNLayer(3, 4, **options).double()
    ahead.load_state_dict(stack.layers[0].ahead.state_dict())
    back.load_state_dict(stack.layers[0].back.state_dict())
    x, lengths = torch.randn(6, 3, 3).double(), [6, 2, 4]
    output, state = stack(x, lengths=torch.tensor(lengths))
    (c, o), _ = stack(x, lengths=torch.tensor(lengths), split_last=True)
    assert output.shape == (6, 3, 8)
    close(c if o is None else o * c, output)
    for b, length in enumerate(lengths):
        row = x[:length, b : b + 1]
        (first, one), (second, other) = ahead(row), back(row.flip(0))
        close(output[:length, b : b + 1], torch.cat([first, second.flip(0)], -1))
        assert (output[length:, b] == 0).all()
        close(state.layers[0].h[b], torch.cat([one.h, other.h], -1)[0])
        close(state.layers[0].c[b], torch.cat([one.c, other.c], -1)[0])


@pytest.mark.parametrize("dense", [False, True])
def test_bidirectional_layers_stack_and_start_from_a_given_state(dense):
    stack, x = QRNN(3, 4, 3, bidirectional=True, dense=dense).double(), torch.randn(5, 2, 3).double()
    assert [stack.layer_input_size(layer) for layer in range(3)] == ([3, 11, 19] if dense else [3, 8, 8])
    output, state = stack(x)
    assert (output.shape, state.h.shape, state.c.shape) == ((5, 2, 8), (3, 2, 8), (3, 2, 8))
    continued, _ = stack(x, state.detach())
    one = stack.layers[0].back
    start = type(state.layers[0])(*(tensor.chunk(2, -1)[1] for tensor in state.layers[0]))
    read, _ = stack.layers[0](x, state.layers[0])
    close(read[..., 4:], one(x.flip(0), start)[0].flip(0))
    assert not torch.equal(continued, output)


def test_a_classifier_reads_both_directions_and_a_language_model_refuses_them():
    stack = QRNN(8, 4, 2, bidirectional=True)
    logits = Classifier(9, 8, stack)(torch.randint(1, 9, (6, 2)), torch.tensor([6, 3]))
    assert logits.shape == (2, 2)
    with pytest.raises(ValueError, match="stack: expected bidirectional=False, got True"):
        LanguageModel(9, 8, stack)
    with pytest.raises(ValueError, match="bidirectional: expected False for one step at a time, got True"):
        stack.step(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="mode: expected window or ungated with two directions, got 'step'"):
        stack.layers[0](torch.zeros(2, 8), mode="step")
    with pytest.raises(ValueError, match=r"bidirectional: expected False .*got True"):
        make_stack("lstm", 8, 4, 2, bidirectional=True)


# Packed and unbatched input


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("family", ["qrnn", "qrnn-both-ways", "lstm"])
def test_a_packed_sequence_is_rows_with_lengths(family, sort, given_state):
    both = {"bidirectional": True} if family == "qrnn-both-ways" else {}
    stack = make_stack(family.partition("-")[0], 3, 4, 2, batch_first=True, **both).double()
    x, lengths = torch.randn(6, 3, 3).double(), torch.tensor([6, 4, 1] if sort else [4, 1, 6])
    state = stack(torch.randn(3, 2, 3).double())[1] if given_state else None
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sort)
    output, after = stack(packed, state)
    expected, last = stack(x.transpose(0, 1), state, lengths)
    padded, steps = pad_packed_sequence(output, batch_first=True)
    close(padded, expected)
    assert torch.equal(steps, lengths)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    same_states(after, last)


def test_packed_shapes_and_states_are_nn_lstms():
    """Same call, same shapes: torch's own LSTM is the authority."""
    rows = [torch.randn(length, 3) for length in (2, 5, 3)]
    packed = pack_sequence(rows, enforce_sorted=False)
    output, state = QRNN(3, 4, 2)(packed)
    expected, (h, c) = nn.LSTM(3, 4, 2)(packed)
    assert output.data.shape == expected.data.shape
    for got, want in zip(output[1:], expected[1:], strict=True):
        assert torch.equal(got, want)
    assert (state.h.shape, state.c.shape) == (h.shape, c.shape)
    ends = torch.stack([row[-1] for row in torch.nn.utils.rnn.unpack_sequence(output)])
    assert torch.equal(state.h[-1], ends)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_input_without_a_batch_axis_is_one_row(family, batch_first):
    stack = make_stack(family, 3, 4, 2, batch_first=batch_first).double()
    x, axis = torch.randn(5, 3).double(), 0 if batch_first else 1
    output, state = stack(x)
    expected, last = stack(x.unsqueeze(axis))
    close(output, expected.squeeze(axis))
    assert (output.shape, state.h.shape) == ((5, 4), (2, 4))
    more, _ = stack(x, state)
    close(more, stack(x.unsqueeze(axis), last)[0].squeeze(axis))
    (c, o), _ = stack(x, split_last=True)
    close(c if o is None else c * o, output)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"bidirectional": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 0)])
def test_a_window_of_no_steps_or_no_rows_is_one(shape, options):
    """The state stays what it was; gradients are empty or zero."""
    stack = QRNN(3, 4, 2, kernel_size=3, **options)
    state = None
    if shape[1]:
        _, state = stack(torch.randn(5, shape[1], 3))
    x = torch.randn(*shape, 3, requires_grad=True)
    for split_last in (False,) if stack.bidirectional else (False, True):
        output, after = stack(x, state, split_last=split_last)
        output = output[0] if split_last else output
        assert output.shape == (*shape, stack.output_size)
        assert after.h.shape == after.c.shape == (2, shape[1], stack.output_size)
        if state is not None:
            for before, left in zip(state.layers, after.layers, strict=True):
                assert all(torch.equal(*pair) for pair in zip(before, left, strict=True))
    output.sum().backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in stack.parameters())
    assert x.grad.shape == x.shape


def test_what_does_not_fit_is_named():
    stack, x = QRNN(3, 4, 2), torch.randn(5, 2, 3)
    _, state = stack(x)
    packed = pack_padded_sequence(x, torch.tensor([5, 2]))
    for call, message in (
        (lambda: stack(x[0, 0]), r"x: expected \(T, B, input_size = 3\), got \(3,\)"),
        (lambda: stack(x[:, 0, :2]), r"x: expected \(T, input_size = 3\) of one row, got \(5, 2\)"),
        (lambda: stack(x[:, 0], state), r"state: expected c \(m,\) in each layer.*got \(2, 4\)"),
        (lambda: stack(x[:, 0], lengths=torch.tensor([5])), "lengths: expected None for x without a batch axis"),
        (lambda: stack(packed, lengths=torch.tensor([5, 2])), "lengths: expected None with a PackedSequence"),
        (lambda: stack(packed, split_last=True), "split_last: expected False with a PackedSequence"),
        (lambda: stack(packed, state.index_select(torch.tensor([0]))), r"state: expected c \(B, m\) = \(2, 4\)"),
        (lambda: stack.step(x), r"x: expected \(B, input_size = 3\) at a step, got \(5, 2, 3\)"),
        (lambda: stack.step(x[0, :1], state), r"state: expected c \(B, m\) = \(1, 4\) in each layer, got \(2, 4\)"),
        (lambda: QRNN(3, 4, causal=False).step(x[0]), "causal: expected True for one step at a time, got False"),
        (lambda: QRNN(3, 4, context_size=2).step(x[0]), r"context: expected \(B, context_size\).*got None"),
        (lambda: QRNN(3, 4, context_size=0), "context_size: expected an integer of at least 1, got 0"),
        (lambda: QRNN(3, 4, bidirectional=True, context_layers="last"), "context_layers: expected all with bidirect"),
        (lambda: stack.load_state_dict(nn.LSTM(3, 4).state_dict()), r'Missing key.*"layers.0.weight"'),
        (lambda: stack.load_state_dict(QRNN(3, 5, 2).state_dict()), r"size mismatch for layers.0.weight.*\[2, 3, 15\]"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
            call()


# nn.LSTM's calls


@pytest.mark.parametrize(
    ("family", "options"),
    [("qrnn", {}), ("qrnn", {"kernel_size": 3, "dense": True}), ("qrnn", {"bidirectional": True}), ("lstm", {}),
     ("lstm", {"dense": True})],
    ids=str,
)  # fmt: skip
def test_a_state_may_be_h_and_c(family, options):
    """As of rows whose last inputs were zeros; of a batch, of a packed one, of one row, of one step."""
    stack, x = make_stack(family, 3, 4, 2, **options).double(), torch.randn(5, 2, 3).double()
    _, state = stack(x)
    pair, begun = (state.h, state.c), state.without_inputs()
    output, after = stack(x, pair)
    expected, last = stack(x, begun)
    close(output, expected)
    same_states(after, last)
    same_states(stack.initial_state(*pair), begun)
    packed = pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False)
    close(stack(packed, pair)[0].data, stack(packed, begun)[0].data)
    row = begun.index_select(torch.tensor([1])).without_batch_axis()
    close(stack(x[:, 1], (state.h[:, 1], state.c[:, 1]))[0], stack(x[:, 1], row)[0])
    if not stack.bidirectional:
        close(stack.step(x[0], pair)[0], stack.step(x[0], begun)[0])
    zeros = torch.zeros_like(state.c)
    assert torch.equal(stack(x, (zeros, zeros))[0], stack(x)[0])


def test_h_and_c_are_as_torchs_lstm_takes_them():
    ours, theirs = make_stack("lstm", 3, 4, 1).double(), nn.LSTM(3, 4).double()
    theirs.load_state_dict(ours.layers[0].state_dict())
    x, h, c = torch.randn(5, 2, 3).double(), *torch.randn(2, 1, 2, 4).double()
    output, state = ours(x, (h, c))
    expected, (last_h, last_c) = theirs(x, (h, c))
    for got, want in ((output, expected), (state.h, last_h), (state.c, last_c)):
        close(got, want)


@pytest.mark.parametrize("family", [*FAMILIES, "variational"])
def test_a_stack_has_what_code_for_torchs_lstm_asks_of_it(family):
    stack = make_stack(family, 3, 4, 2, bias=False, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in stack.parameters()} == {(torch.float64, "meta")}
    assert (stack.bias, stack.bidirectional, stack.batch_first, stack.dropout) == (False, False, False, 0.0)
    stack = make_stack(family, 3, 4, 2)
    assert stack.bias
    stack.flatten_parameters()
    before = {name: parameter.clone() for name, parameter in stack.named_parameters()}
    stack.reset_parameters()
    assert all((parameter != before[name]).any() for name, parameter in stack.named_parameters())


@pytest.mark.parametrize("family", [*FAMILIES, "variational"])
def test_dropout_may_be_set_later(family):
    stack, x = make_stack(family, 3, 4, 2).double(), torch.ones(5, 2, 3).double()
    assert torch.equal(stack(x)[0], stack(x)[0])
    stack.dropout = 0.5
    assert not torch.equal(stack(x)[0], stack(x)[0])
    stack.between[0].p = 0.25
    assert stack.dropout == 0.25
    stack.dropout = 0.0
    assert torch.equal(stack(x)[0], stack(x)[0])
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got 1"):
        stack.dropout = 1
    assert stack.dropout == 0


def test_layers_may_share_their_weights():
    stack, x = QRNN(4, 4, 2, kernel_size=3).double(), torch.randn(5, 2, 4).double()
    stack.layers[1] = stack.layers[0]
    _, state = stack(x)
    close(stack(x, (state.h, state.c))[0], stack(x, state.without_inputs())[0])
    assert stack.arguments["kernel_size"] == [3, 3]


def test_both_directions_draw_their_parameters_anew():
    stack = QRNN(3, 4, bidirectional=True)
    before = {name: parameter.clone() for name, parameter in stack.named_parameters()}
    stack.reset_parameters()
    assert all((parameter != before[name]).any() for name, parameter in stack.named_parameters())


# Streaming


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_steps_give_what_the_whole_sequence_gives(pooling, k, dtype, atol):
    stack = QRNN(3, 4, 2, kernel_size=k, pooling=pooling, dense=True, context_size=5).to(dtype)
    x, context = torch.randn(9, 2, 3, dtype=dtype), [torch.randn(2, 5, dtype=dtype) for _ in range(2)]
    whole, last = stack(x, context=context)
    outputs, state = [], None
    for x_t in x[:7]:
        output, state = stack.step(x_t, state, context)
        outputs.append(output)
    close(torch.stack(outputs), whole[:7], atol)
    rest, after = stack(x[7:], state, context=context)  # a window may follow steps, and steps a window
    close(rest, whole[7:], atol)
    same_states(after, last, atol)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"zoneout": 0.5}, {"context_size": 5}], ids=str)
def test_a_step_is_differentiable_and_unbatched_too(options):
    stack, x = QRNN(3, 4, 2, **options).double().eval(), torch.randn(6, 3).double().requires_grad_()
    context = [torch.randn(5).double() for _ in range(2)] if "context_size" in options else None
    whole, _ = stack(x, context=context)
    outputs, state = [], None
    for x_t in x:
        output, state = stack.step(x_t, state, context)
        outputs.append(output)
    close(torch.stack(outputs), whole)
    leaves = [x, *stack.parameters()]
    upstream = torch.randn(6, 4).double()
    expected = torch.autograd.grad(whole, leaves, upstream)
    for got, want in zip(torch.autograd.grad(torch.stack(outputs), leaves, upstream), expected, strict=True):
        close(got, want, 1e-12)


def test_steps_of_other_kinds():
    """An LSTM steps too; zoneout acts on steps in training; under autocast the state stays float32."""
    lstm, x = make_stack("lstm", 3, 4, 2).double(), torch.randn(4, 2, 3).double()
    state = None
    for x_t in x:
        output, state = lstm.step(x_t, state)
    close(output, lstm(x)[0][-1])
    zoned = QRNN(3, 4, zoneout=0.5).double()
    _, state = zoned(x)
    assert not torch.equal(zoned.step(x[0], state)[0], zoned.step(x[0], state)[0])
    stack = QRNN(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = stack.step(x[0].float())
        output, state = stack.step(x[1].float(), state)
    assert (output.dtype, state.c.dtype) == (torch.bfloat16, torch.float32)
    close(output.float(), stack(x[:2].float())[0][1], 0.02)


# Weights in files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3, "kernel_size": [4, 2, 1], "pooling": "ifo", "dense": True, "zoneout": 0.1, "dropout": 0.2},
        {"bidirectional": True, "causal": False, "bias": False, "batch_first": True, "context_size": 2},
        {"causal": False, "extra_padding": "right", "zoneout": 0.1, "zoneout_evaluation": "scaled"},
        {"num_layers": 2, "context_size": 2, "context_layers": "last"},
    ],
    ids=["plain", "dense", "both-ways", "unmasked", "context"],
)
def test_a_file_gives_back_the_stack(tmp_path, options):
    assert QRNN(3, 4).arguments.keys() == inspect.signature(QRNN).parameters.keys() - {"device", "dtype"}
    stack = QRNN(3, 4, **options).double()
    stack.save_pretrained(tmp_path / "layer.safetensors")
    other = QRNN.from_pretrained(tmp_path / "layer.safetensors")
    assert other.arguments == stack.arguments
    assert {name: other.arguments[name] for name in options} == options
    assert other.arguments == QRNN(**stack.arguments).arguments
    for (name, tensor), (other_name, got) in zip(stack.named_parameters(), other.named_parameters(), strict=True):
        assert (name, tensor.dtype, got.requires_grad) == (other_name, got.dtype, True)
        assert torch.equal(tensor, got)
    assert [file.name for file in tmp_path.iterdir()] == ["layer.safetensors"]
    narrower = QRNN.from_pretrained(tmp_path / "layer.safetensors", device="meta", dtype=torch.float32)
    assert {(p.dtype, p.device.type) for p in narrower.parameters()} == {(torch.float32, "meta")}
    changed = QRNN.from_pretrained(tmp_path / "layer.safetensors", backend="reference", dropout=0.5)
    assert (changed.layers[0].state_dict().keys(), changed.dropout) == (stack.layers[0].state_dict().keys(), 0.5)
    assert changed.arguments["backend"] == "reference"


def test_a_file_has_the_stack_as_it_is_when_written(tmp_path):
    stack = QRNN(3, 4, 2, dropout=0.1, zoneout=0.1)
    stack.dropout, stack.batch_first = 0.3, True
    stack.layers[0].zoneout = 0.2
    with pytest.raises(ValueError, match=r"zoneout: expected one value in all layers, got 0.2, 0.1"):
        stack.save_pretrained(tmp_path / "layer.safetensors")
    assert list(tmp_path.iterdir()) == []
    stack.layers[1].zoneout = 0.2
    stack.save_pretrained(tmp_path / "layer.safetensors")
    got = QRNN.from_pretrained(tmp_path / "layer.safetensors")
    assert (got.dropout, got.between[0].p, got.batch_first, got.layers[1].zoneout) == (0.3, 0.3, True, 0.2)


def test_a_file_is_readable_as_the_users_umask_says(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            QRNN(3, 4).save_pretrained(tmp_path / "layer.safetensors")
        finally:
            os.umask(before)
        assert (tmp_path / "layer.safetensors").stat().st_mode & 0o777 == mode


def test_a_file_that_is_not_ours_is_named(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"x.safetensors: expected a safetensors file, got"):
        QRNN.from_pretrained(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"expected a file of format 'qrnn.QRNN/1', got format 'none'"):
        QRNN.from_pretrained(file)
    QRNN(3, 4).save_pretrained(file)
    with pytest.raises(ValueError, match=r"(?s)x.safetensors: expected the tensors of its arguments.*layers.0.weight"):
        QRNN.from_pretrained(file, hidden_size=5)
    with pytest.raises(FileNotFoundError):
        QRNN.from_pretrained(tmp_path / "none.safetensors")


def older(x, linears, hidden, window, gate, current_first):
    """A stack of that layout as a loop in numpy: their gate weighs the new candidate, c = f z + (1 - f) c."""

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    for linear in linears:
        weight, bias = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        outputs, c, previous = np.zeros((*x.shape[:2], hidden)), np.zeros((x.shape[1], hidden)), np.zeros_like(x[0])
        for t, current in enumerate(x):
            inputs = [current, previous] if current_first else [previous, current]
            y = (np.concatenate(inputs, -1) if window == 2 else current) @ weight.T + bias
            f = sigmoid(y[:, hidden : 2 * hidden])
            c = f * np.tanh(y[:, :hidden]) + (1 - f) * c
            outputs[t] = sigmoid(y[:, 2 * hidden :]) * c if gate else c
            previous = current
        x = outputs
    return x


@pytest.mark.parametrize("current_first", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("window", [1, 2])
def test_an_older_checkpoint_gives_the_same_output(window, gate, current_first):
    sizes = [(3, 4), (4, 4)]
    linears = [nn.Linear(window * n, (2 + gate) * m).double() for n, m in sizes]
    state_dict = {
        f"layers.{layer}.linear.{name}": tensor
        for layer, linear in enumerate(linears)
        for name, tensor in linear.state_dict().items()
    }
    stack = QRNN.from_salesforce(state_dict, 3, 4, current_first=current_first, dropout=0.1).eval()
    assert (stack.dropout, stack.arguments["kernel_size"]) == (0.1, [window] * 2)
    x = torch.randn(6, 2, 3).double()
    expected = older(x.numpy(), linears, 4, window, gate, current_first)
    np.testing.assert_allclose(stack(x)[0].detach().numpy(), expected, rtol=0, atol=1e-14)


def test_a_checkpoint_of_another_layout_is_named():
    good = {"layers.0.linear.weight": torch.zeros(12, 6), "layers.0.linear.bias": torch.zeros(12)}
    QRNN.from_salesforce(good, 3, 4)
    for state_dict, message in (
        (nn.LSTM(3, 4).state_dict(), "state_dict: expected layers.0.linear.weight.*got bias_hh_l0"),
        ({}, "state_dict: expected layers.0.linear.weight.*got nothing"),
        (
            {**good, "layers.0.linear.weight": torch.zeros(12, 9)},
            r"layers.0.linear: expected .*\(12, 6\).*got \(12, 9\)",
        ),
        (
            {**good, "layers.1.linear.weight": torch.zeros(8, 4), "layers.1.linear.bias": torch.zeros(8)},
            "expected an output gate in all layers or in none, got fo, f",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            QRNN.from_salesforce(state_dict, 3, 4)
