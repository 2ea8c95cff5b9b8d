"""Stacks of both families behind one interface, and the choice between them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from qrnn import LSTM, QRNN, QRNNLayer, lstm, make_stack

FAMILIES = ("qrnn", "lstm")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stack_of(family, *sizes, **options):
    return make_stack(family, *sizes, **options).double()


def close(got, expected, atol=1e-13):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_an_lstm_stack_is_torchs_lstm():
    """With lengths too: torch's own packed sequence is the authority."""
    ours, theirs = stack_of("lstm", 3, 4, 2), nn.LSTM(3, 4, 2).double()
    theirs.load_state_dict(
        {
            name.replace("l0", f"l{index}"): tensor
            for index, layer in enumerate(ours.layers)
            for name, tensor in layer.state_dict().items()
        }
    )
    x, lengths = torch.randn(6, 3, 3).double(), torch.tensor([4, 6, 1])
    output, state = ours(x)
    expected, (h, c) = theirs(x)
    close(output, expected)
    close(torch.stack([layer.c for layer in state.layers]), c)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, (h, c) = theirs(packed)
    output, state = ours(x, lengths=lengths)
    close(output, nn.utils.rnn.pad_packed_sequence(expected)[0])
    close(torch.stack([layer.h for layer in state.layers]), h)
    close(torch.stack([layer.c for layer in state.layers]), c)


@pytest.mark.parametrize("carried", [False, True])
def test_lstm_rows_of_unequal_length_are_those_of_a_packed_sequence(carried):
    """Gradients included; in float32 the steps beyond a row are exactly nothing."""

    def packed_run(layer, x, start, lengths):
        at_least_one = lengths.clamp(min=1)  # a packed sequence has no empty rows
        packed = nn.utils.rnn.pack_padded_sequence(x, at_least_one, enforce_sorted=False)
        packed, (_, c) = layer(packed, start)
        output, _ = nn.utils.rnn.pad_packed_sequence(packed, total_length=x.shape[0])
        empty = (lengths == 0).unsqueeze(-1)
        before = torch.zeros_like(c[0]) if start is None else start[1][0]
        return output.masked_fill(empty, 0.0), torch.where(empty, before, c[0])

    layer, x = nn.LSTM(3, 4).double(), torch.randn(6, 3, 3).double().requires_grad_()
    lengths, start = torch.tensor([4, 6, 0]), tuple(torch.randn(1, 3, 4).double() for _ in range(2))
    upstream = torch.randn(6, 3, 4).double(), torch.randn(3, 4).double()
    results = []
    for run in (lstm._run_frozen, packed_run):
        outputs = run(layer, x, start if carried else None, lengths)
        results.append((*outputs, *torch.autograd.grad(outputs, [x, *layer.parameters()], upstream)))
    for frozen, packed in zip(*results, strict=True):
        close(frozen, packed)
    layer, x, lengths = layer.float(), 100 * torch.randn(90, 3, 3), torch.tensor([4, 6, 0])
    _, few = lstm._run_frozen(layer, x[:7], None, lengths)
    output, many = lstm._run_frozen(layer, x, None, lengths)
    assert torch.equal(few, many)
    assert (many[2] == 0).all()
    assert (output[6:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_connections_concatenate_each_input_to_its_output(family):
    stack, x = stack_of(family, 3, 4, 3, dense=True), torch.randn(5, 2, 3).double()
    assert [stack.layer_input_size(index) for index in range(3)] == [3, 7, 11]
    read = x
    for layer in stack.layers:
        written = layer(read)[0]
        read = torch.cat([read, written], -1)
    output, _ = stack(x)
    assert output.shape == (5, 2, 4)
    close(output, written)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_windows_with_carried_state_equal_one(family, dense):
    stack, x = stack_of(family, 3, 4, 2, dense=dense), torch.randn(9, 2, 3).double()
    whole, last = stack(x)
    first, state = stack(x[:4])
    second, end = stack(x[4:], state.detach())
    close(torch.cat([first, second]), whole)
    for got, expected in zip(end.layers, last.layers, strict=True):
        for a, b in zip(got, expected, strict=True):
            close(a, b)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"causal": False, "kernel_size": [6, 3]}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_neither_on_its_padding_nor_on_its_neighbours(family, options):
    if family == "lstm" and "causal" in options:
        pytest.skip("an LSTM has no convolution")
    stack = stack_of(family, 3, 4, 2, **options)
    x, lengths = torch.randn(7, 4, 3).double().requires_grad_(), torch.tensor([5, 7, 1, 0])
    upstream = torch.randn(7, 4, 4).double()
    output, state = stack(x, lengths=lengths)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    for b, length in enumerate(lengths.tolist()):
        assert (output[length:, b] == 0).all()
        assert (gradient[length:, b] == 0).all()
        if length == 0:
            assert all((t[..., b, :] == 0).all() for layer in state.layers for t in (layer.h, layer.c))
            continue
        row = x.detach()[:length, b : b + 1].requires_grad_()
        alone, end = stack(row)
        close(output[:length, b : b + 1], alone)
        close(gradient[:length, b : b + 1], torch.autograd.grad(alone, row, upstream[:length, b : b + 1])[0])
        for layer, other in zip(state.layers, end.layers, strict=True):
            close(layer.h[b], other.h[0])
            close(layer.c[b], other.c[0])
    changed = x.detach().clone()
    changed[5:, 0] = 1e6
    assert torch.equal(stack(changed, lengths=lengths)[0], output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_sees_no_later_step(family):
    stack, x = stack_of(family, 3, 4, 3), torch.randn(6, 2, 3).double()
    changed = x.clone()
    changed[3] += 1
    assert torch.equal(stack(x)[0][:3], stack(changed)[0][:3])
    assert (stack(x)[0][3:] != stack(changed)[0][3:]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_state_reorders_detaches_and_moves(family):
    stack, x = stack_of(family, 3, 4, 2), torch.randn(5, 3, 3).double()
    _, state = stack(x)
    rows = torch.tensor([2, 0, 2, 1])
    more = torch.randn(2, 4, 3).double()
    picked, _ = stack(more, state.index_select(rows))
    _, other = stack(x[:, rows])
    close(picked, stack(more, other)[0])
    assert state.layers[0].c.requires_grad
    assert not any(t.requires_grad for layer in state.detach().layers for t in layer)
    assert type(state.detach().layers[0]) is type(state.layers[0])
    assert state.to(torch.float32).layers[1].h.dtype == torch.float32


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_first_only_swaps_axes(family, split):
    stack, x = stack_of(family, 3, 4, 2), torch.randn(5, 2, 3).double()
    output, _ = stack(x, split_last=split)
    stack.batch_first = True
    swapped, _ = stack(x.transpose(0, 1), split_last=split)
    if not split:
        output, swapped = (output,), (swapped,)
    for a, b in zip(output, swapped, strict=True):
        assert (a is None and b is None) or torch.equal(a.transpose(0, 1), b)


@pytest.mark.parametrize("family", FAMILIES)
def test_split_last_gives_the_ungated_output_and_its_gate(family):
    stack, x = stack_of(family, 3, 4, 2), torch.randn(5, 2, 3).double()
    output, state = stack(x)
    (c, o), other = stack(x, split_last=True)
    assert (o is None) == (family == "lstm")
    close(c if o is None else o * c, output)
    close(other.layers[-1].h, state.layers[-1].h)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_between_layers_in_training_only(family):
    stack, x = stack_of(family, 3, 4, 2, dropout=0.5), torch.randn(5, 2, 3).double()
    one = stack_of(family, 3, 4, 1, dropout=0.5)
    assert not torch.equal(stack(x)[0], stack(x)[0])
    assert torch.equal(one(x)[0], one(x)[0])
    stack.eval()
    assert torch.equal(stack(x)[0], stack(x)[0])


def test_a_decoder_starts_as_its_family_does():
    """QRNN: eq. 7, layer l is given layer l's last hidden state. LSTM: it begins in the encoder's last state."""
    x, y, lengths = torch.randn(5, 2, 3).double(), torch.randn(4, 2, 3).double(), torch.tensor([5, 3])
    encoder, decoder = (stack_of("qrnn", 3, 4, 2, context_size=size) for size in (None, 4))
    hidden, encoded = encoder(x, lengths=lengths)
    state, context = decoder.start(encoded)
    assert state is None
    close(context[1], torch.stack([hidden[4, 0], hidden[2, 1]]))
    by_hand = y
    for layer, h in zip(decoder.layers, context, strict=True):
        by_hand = layer(by_hand, context=h)[0]
    close(decoder(y, state, context=context)[0], by_hand)
    encoder, decoder = (stack_of("lstm", 3, 4, 2, context_size=size) for size in (None, 4))
    _, encoded = encoder(x)
    state, context = decoder.start(encoded)
    assert context is None
    first = decoder.layers[0](y, (encoded.layers[0].h[None], encoded.layers[0].c[None]))[0]
    by_hand = decoder.layers[1](first, (encoded.layers[1].h[None], encoded.layers[1].c[None]))[0]
    close(decoder(y, state, context=context)[0], by_hand)


def test_a_decoder_may_take_eq_7_in_its_last_layer_alone():
    """As in the code that the authors published: the layers below start from the encoder's last c of their own."""
    x, y, lengths = torch.randn(5, 2, 3).double(), torch.randn(4, 2, 3).double(), torch.tensor([5, 3])
    encoder, decoder = stack_of("qrnn", 3, 4, 3), stack_of("qrnn", 3, 4, 3, context_size=4, context_layers="last")
    assert [layer.context_weight is None for layer in decoder.layers] == [True, True, False]
    _, encoded = encoder(x, lengths=lengths)
    state, context = decoder.start(encoded)
    by_hand = y
    for layer, from_encoder in zip(decoder.layers, encoded.layers, strict=True):
        gates = torch.cat([torch.zeros_like(by_hand[:1]), by_hand[:-1]]) @ layer.weight[0] + by_hand @ layer.weight[1]
        gates = gates + layer.bias
        last = layer is decoder.layers[-1]
        if last:
            gates = gates + from_encoder.h @ layer.context_weight
        z, f, o = gates.chunk(3, dim=-1)
        c, outputs = torch.zeros_like(from_encoder.c) if last else from_encoder.c, []
        for t in range(4):
            c = f[t].sigmoid() * c + (1 - f[t].sigmoid()) * z[t].tanh()
            outputs.append(o[t].sigmoid() * c)
        by_hand = torch.stack(outputs)
    close(decoder(y, state, context=context)[0], by_hand)
    for t in range(4):
        step, state = decoder.step(y[t], state, context)
        close(step, by_hand[t])
    state, context = decoder.start(encoded)
    row = state.index_select(torch.tensor([1])).without_batch_axis()
    alone, _ = decoder(y[:, 1], row, context=[None, None, context[2][1]])
    close(alone, by_hand[:, 1])


def test_a_state_can_lose_its_inputs():
    """The window after it reads zeros for the steps before (eq. 2), and the c of the window before."""
    stack, x = stack_of("qrnn", 3, 4, 1, pooling="f"), torch.randn(6, 2, 3).double()
    _, state = stack(x[:4])
    output, _ = stack(x[4:], state.without_inputs())
    layer, c, before = stack.layers[0], state.c[0], torch.zeros(2, 3).double()
    for t, now in enumerate(x[4:]):
        z, f = (before @ layer.weight[0] + now @ layer.weight[1] + layer.bias).chunk(2, dim=-1)
        c, before = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh(), now
        close(output[t], c)
    _, state = stack_of("lstm", 3, 4, 1)(x)
    for kept, had in zip(state.without_inputs().layers[0], state.layers[0], strict=True):
        assert torch.equal(kept, had)


def test_make_stack_chooses_the_family_and_refuses_what_it_lacks():
    assert type(make_stack("qrnn", 3, 4, 2, kernel_size=[4, 2], zoneout=0.1)) is QRNN
    assert type(make_stack("lstm", 3, 4, 2, kernel_size=2, zoneout=0.0, pooling="fo", causal=True)) is LSTM
    for option, message in (
        ({"zoneout": 0.1}, r"zoneout: expected 0.0 \(the family 'lstm' has no such option\), got 0.1"),
        ({"kernel_size": 4}, "kernel_size: expected 2 .*got 4"),
        ({"causal": False}, "causal: expected True .*got False"),
        ({"colour": 1}, "colour: expected one of the options .*, zoneout.*, got an unknown name"),
    ):
        with pytest.raises(ValueError, match=message):
            make_stack("lstm", 3, 4, 2, **option)
    with pytest.raises(ValueError, match="family: expected one of qrnn, lstm, variational, got 'gru'"):
        make_stack("gru", 3, 4, 2)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qrnn", {"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
        ("lstm", {"hidden_size": 2.5}, "hidden_size: expected an integer of at least 1, got 2.5"),
        ("lstm", {"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ("qrnn", {"kernel_size": [2, 2, 2]}, r"kernel_size: expected one width or 2 \(num_layers\), got 3"),
        ("qrnn", {"context_layers": "first"}, "context_layers: expected all or last, got 'first'"),
        ("lstm", {"context_layers": "last"}, r"context_layers: expected 'all' .*no such option\), got 'last'"),
        ("lstm", {"context_size": 5}, "context_size: expected None or hidden_size = 4, got 5"),
    ],
)
def test_a_bad_constructor_argument_is_named(family, options, message):
    with pytest.raises(ValueError, match=message):
        make_stack(family, **{"input_size": 3, "hidden_size": 4, "num_layers": 2, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bad_input_is_named(family):
    stack, x = stack_of(family, 3, 4, 2), torch.randn(5, 2, 3).double()
    _, state = stack(x)

    def upper(**changes):
        return state._replace(layers=(state.layers[0], state.layers[1]._replace(**changes)))

    for arguments, message in (
        ({"x": x[..., :2]}, r"x: expected \(T, B, input_size = 3\), got \(5, 2, 2\)"),
        ({"x": x, "lengths": torch.tensor([1.0, 2.0])}, r"lengths: expected int64 .*got torch.float32"),
        (
            {"x": x, "lengths": torch.tensor([6, 2])},
            r"lengths: expected values in \[0, T\] = \[0, 5\], got 6",
        ),
        ({"x": x, "state": state._replace(layers=state.layers[:1])}, "state: expected 2 layers, got 1"),
        (
            {"x": x[:, :1], "state": state},
            r"state: expected c \(B, m\) = \(1, 4\) in each layer, got \(2, 4\)",
        ),
        ({"x": x, "state": upper(c=state.c[1, :1])}, r"expected c \(B, m\) = \(2, 4\) .*got \(1, 4\) in layer 1"),
        ({"x": x, "state": upper(h=state.h[1, :, :3])}, r"expected h \(B, m\) = \(2, 4\) .*got \(2, 3\) in layer 1"),
        ({"x": x, "state": state.h}, r"state: expected a qrnn.State or a tuple of tensors \(h, c\), got Tensor"),
        ({"x": x, "state": (state.h, state.c[:1])}, r"state: expected c \(L, B, m\) = \(2, B, 4\).*got \(1, 2, 4\)"),
        ({"x": x, "state": (state.h[:, 0], state.c[:, 0])}, r"state: expected c \(B, m\) = \(2, 4\) .*got \(4,\)"),
        ({"x": x[:, 0], "state": (state.h, state.c)}, r"state: expected c \(m,\) in each layer.*got \(2, 4\)"),
        ({"x": x, "context": (x[0], x[0])}, "context: expected None"),
        ({"x": x, "context": x[:2]}, "context: expected a sequence with a tensor for each layer, got a tensor"),
        (
            {"x": x[:, 0], "context": x[:2, 0]},
            "context: expected a sequence with a tensor for each layer, got a tensor",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            stack(**arguments)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"backend": "reference"}], ids=str)
def test_every_way_of_running_a_stack_calls_its_layers_hooks(options):
    """Pruning, weight norm and sharding act in them."""
    stack, x, called = stack_of("qrnn", 3, 4, 2, **options), torch.randn(5, 2, 3).double(), []
    single = [module for module in stack.layers.modules() if isinstance(module, QRNNLayer)]
    for layer in single:
        layer.register_forward_pre_hook(lambda module, arguments: called.append(module))
    ways = [lambda: stack(x), lambda: stack(x, split_last=True)]
    for way in ways if stack.bidirectional else [*ways, lambda: stack.step(x[0])]:
        called.clear()
        way()
        assert called == single


def test_the_reference_backend_gives_the_same_as_the_kernel():
    x = torch.randn(6, 2, 3).double()
    stack = stack_of("qrnn", 3, 4, 2, pooling="ifo")
    other = stack_of("qrnn", 3, 4, 2, pooling="ifo", backend="reference")
    other.load_state_dict(stack.state_dict())
    close(stack(x)[0], other(x)[0])


def test_importing_qrnn_pulls_in_nothing_heavy():
    """Not even numba: the kernels load with the first pooling."""
    heavy = ("ray", "mlflow", "dvc", "datasets", "numba", "pipeline")
    code = f"import sys, qrnn, qrnn.models; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
