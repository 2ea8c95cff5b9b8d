"""The paper's models: shapes, sizes, equation 8 by hand, and that each learns."""

import numpy as np
import pytest
import torch
from conftest import skip_without_bfloat16_lstm
from torch import nn

from qrnn import QRNN, make_stack
from qrnn.layer import reverse_steps
from qrnn.models import Classifier, LanguageModel, Seq2Seq
from qrnn.models.seq2seq import Memory, attend, pad_rows

FAMILIES = ("qrnn", "lstm")

pytestmark = pytest.mark.usefixtures("one_seed_one_thread")


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def seq2seq(family, *, vocabulary=12, size=32, layers=2, dense=False, context_layers="all", **options):
    wide = {"causal": False, "kernel_size": [3] + [2] * (layers - 1)} if family == "qrnn" else {}
    encoder = make_stack(family, 8, size, layers, dense=dense, **wide)
    decoder = make_stack(family, 8, size, layers, dense=dense, context_size=size, context_layers=context_layers)
    return Seq2Seq(vocabulary, None, 8, encoder, decoder, **options)


def fit(model, loss, steps, rate=0.01):
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
    return value.item()


@pytest.mark.parametrize(("family", "parameters"), [("qrnn", 17_729_040), ("lstm", 19_373_840)])
def test_medium_language_models_have_the_papers_size(family, parameters):
    """2 x 640 units, 10,000 words, untied: table 2 says 18M (17.7M by count) and 19.4M by count.

    Embedding and softmax: 10,000 * 640 * 2 + 10,000. A QRNN layer: 2 * 640 * 1,920 + 1,920. An LSTM layer:
    2 * 640 * 2,560 + 2 * 2,560.
    """
    layer = {"qrnn": 2 * 640 * 1_920 + 1_920, "lstm": 2 * 640 * 2_560 + 2 * 2_560}[family]
    assert parameters == 2 * 10_000 * 640 + 10_000 + 2 * layer
    with torch.device("meta"):
        model = LanguageModel(10_000, 640, make_stack(family, 640, 640, 2))
    assert model.parameter_count == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_overfits_a_batch_and_carries_its_state(family):
    model = LanguageModel(20, 16, make_stack(family, 16, 32, 2))
    tokens = torch.randint(20, (13, 4))

    def loss():
        logits, _ = model(tokens[:-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:].flatten())

    assert fit(model, loss, 60, 0.02) < 0.3
    whole, _ = model(tokens)
    first, state = model(tokens[:5])
    second, _ = model(tokens[5:], state.detach())
    close(torch.cat([first, second]), whole, 1e-5)


def test_tied_softmax_shares_the_embedding():
    stack = make_stack("qrnn", 16, 16, 1)
    tied, untied = (LanguageModel(20, 16, stack, tied=flag) for flag in (True, False))
    assert untied.parameter_count - tied.parameter_count == 20 * 16
    with pytest.raises(ValueError, match="tied: expected hidden_size = embedding_size = 16, got 8"):
        LanguageModel(20, 16, make_stack("qrnn", 16, 8, 1), tied=True)


def test_language_model_drops_embeddings_and_top_output():
    """With a stack that hands its input through, zeros before and after it can be told apart."""
    model = LanguageModel(5, 8, make_stack("qrnn", 8, 8, 1), dropout=0.5)
    seen = {}
    model.stack.register_forward_pre_hook(lambda module, inputs: seen.update(bottom=inputs[0]))
    model.output.register_forward_pre_hook(lambda module, inputs: seen.update(top=inputs[0]))
    tokens = torch.randint(5, (30, 20))
    model(tokens)
    for place in ("bottom", "top"):
        assert abs((seen[place] == 0).float().mean().item() - 0.5) < 0.05, place
    model.eval()(tokens)
    assert all((seen[place] != 0).all() for place in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_learns_what_a_bag_of_words_cannot(family):
    """The label is whether token 1 comes before token 2."""
    model = Classifier(9, 8, make_stack(family, 8, 16, 2, dense=True))
    rows, labels = [], []
    for index in range(24):
        row = torch.randint(3, 9, (4 + index % 5,)).tolist()
        label = index % 2
        row[1], row[3] = (1, 2) if label else (2, 1)
        rows.append(row)
        labels.append(label)
    tokens, lengths = pad_rows(rows, 0)
    target = torch.tensor(labels)
    assert fit(model, lambda: nn.functional.cross_entropy(model(tokens, lengths), target), 80) < 0.1
    assert model.embedding.weight[0].abs().sum() == 0
    alone = model(torch.tensor(rows[0]).unsqueeze(1), torch.tensor([len(rows[0])]))
    close(model(tokens, lengths)[:1], alone, 1e-5)


def test_a_classifier_reads_the_last_valid_state_and_shows_all_of_them():
    model = Classifier(9, 8, make_stack("qrnn", 8, 4, 2, pooling="f"), classes=3).double()
    tokens, lengths = torch.randint(1, 9, (6, 2)), torch.tensor([6, 3])
    states = model.states(tokens, lengths)
    assert states.shape == (6, 2, 4)
    last = torch.stack([states[5, 0], states[2, 1]])  # f-pooling: h is c
    close(model(tokens, lengths), model.output(last))


@pytest.mark.parametrize("readout", ["mean", "max"])
def test_a_classifier_may_read_all_states_by_hand(readout):
    """numpy over each row's own steps; a row of none gives 0."""
    model = Classifier(9, 8, make_stack("qrnn", 8, 4, 2), classes=3, readout=readout).double()
    tokens, lengths = torch.randint(1, 9, (6, 3)), torch.tensor([6, 3, 0])
    output, _ = model.stack(model.embedding(tokens), lengths=lengths)
    h = output.detach().numpy()
    read = np.stack([getattr(np, readout)(h[:6, 0], axis=0), getattr(np, readout)(h[:3, 1], axis=0), np.zeros(4)])
    close(model(tokens, lengths), model.output(torch.tensor(read)))


@pytest.mark.parametrize("states", ["h", "c"])
def test_equation_8_by_hand(states):
    """Scores c . h, softmax over the source steps that exist, k, and o * (W_k k + W_c c), in numpy.

    In h's place, and in that of eq. 7, may stand the encoder's c: its h before the output gate.
    """
    model = seq2seq("qrnn", size=4, encoder_states=states).double()
    source, lengths, target = torch.randint(12, (5, 2)), torch.tensor([5, 3]), torch.randint(12, (3, 2))
    backwards = reverse_steps(source, lengths)
    x = model.source_embedding(backwards)
    hidden, encoded = model.encoder(x, lengths=lengths)
    context = [getattr(layer, states) for layer in encoded.layers]
    if states == "c":
        (hidden, _), _ = model.encoder(x, lengths=lengths, split_last=True)
    (c, o), _ = model.decoder(model.target_embedding(target), context=context, split_last=True)
    h, c, o = (tensor.detach().numpy() for tensor in (hidden, c, o))
    w_k, w_c = (layer.weight.detach().numpy() for layer in (model.attended, model.direct))
    logits = model(source, lengths, target)
    for b, length in enumerate(lengths.tolist()):
        for t in range(3):
            scores = np.array([c[t, b] @ h[s, b] for s in range(length)])
            alpha = np.exp(scores) / np.exp(scores).sum()
            k = sum(a * h[s, b] for s, a in enumerate(alpha))
            expected = model.output(torch.tensor(o[t, b] * (w_k @ k + w_c @ c[t, b])))
            close(logits[t, b], expected)


@pytest.mark.parametrize(("attentional", "expected"), [("linear", lambda h: h), ("tanh", torch.tanh)])
def test_an_lstm_joins_context_and_state_without_a_gate(attentional, expected):
    """Eq. 8 less its output gate, or Luong et al. (2015), eq. 5, with attention by the layer's own function."""
    model = seq2seq("lstm", size=4, attentional=attentional).double()
    source, lengths, target = torch.randint(12, (5, 2)), torch.tensor([5, 3]), torch.randint(12, (3, 2))
    memory, state = model.encode(source, lengths)
    h, _ = model.decoder(model.target_embedding(target), state)
    joined = model.attended(attend(h, memory.keys, memory.mask)) + model.direct(h)
    close(model(source, lengths, target), model.output(expected(joined)))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_output_are_not_rounded_under_autocast(family):
    """Given what the stacks leave in bfloat16, the rest agrees with float64; bfloat16 itself would be 4e-3 off."""
    skip_without_bfloat16_lstm(family)
    model = seq2seq(family, size=64, vocabulary=50)
    source, lengths, target = torch.randint(50, (9, 2)), torch.tensor([9, 4]), torch.randint(50, (7, 2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory, state = model.encode(source, lengths)
        logits, _ = model.decode(target, memory, state)
        (c, o), _ = model.decoder(model.target_embedding(target), state, context=memory.context, split_last=True)
    assert memory.keys.dtype == logits.dtype == torch.float32
    model.double()
    h = model.attended(attend(c.double(), memory.keys.double(), memory.mask)) + model.direct(c.double())
    close(logits.double(), model.output(h if o is None else o.double() * h), 1e-5)


def test_attention_gives_no_weight_to_the_padding():
    queries, keys = torch.randn(3, 2, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    poisoned = keys.clone()
    poisoned[1, 2:] = 1e4
    assert torch.equal(attend(queries, keys, mask), attend(queries, poisoned, mask))
    close(attend(queries, keys, mask)[:, 1:], attend(queries[:, 1:], keys[1:, :2], mask[1:, :2]), 1e-6)


def test_each_row_is_reversed_within_its_length():
    tokens = torch.tensor([[1, 5], [2, 6], [3, 0], [4, 0]])
    assert reverse_steps(tokens, torch.tensor([4, 2])).t().tolist() == [[4, 3, 2, 1], [6, 5, 0, 0]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_seq2seq_rows_do_not_depend_on_padding_or_neighbours(family, dense):
    model = seq2seq(family, size=6, dense=dense).double()
    source, lengths, target = torch.randint(12, (6, 3)), torch.tensor([6, 2, 4]), torch.randint(12, (4, 3))
    logits = model(source, lengths, target)
    for b, length in enumerate(lengths.tolist()):
        alone = model(source[:length, b : b + 1], lengths[b : b + 1], target[:, b : b + 1])
        close(logits[:, b : b + 1], alone)
    other = source.clone()
    other[2:, 1] = (other[2:, 1] + 1) % 12
    assert torch.equal(model(other, lengths, target)[:, 1], logits[:, 1])


@pytest.mark.parametrize(
    ("family", "options"),
    [("qrnn", {}), ("qrnn", {"context_layers": "last", "encoder_states": "c"}), ("lstm", {})],
)
def test_decoding_step_by_step_gives_the_whole(family, options):
    model = seq2seq(family, size=6, **options).double()
    source, lengths, target = torch.randint(12, (6, 3)), torch.tensor([6, 2, 4]), torch.randint(12, (5, 3))
    whole = model(source, lengths, target)
    memory, state = model.encode(source, lengths)
    assert isinstance(memory, Memory)
    for t in range(5):
        logits, state = model.decode_step(target[t], memory, state)
        close(logits, whole[t])
    rows = torch.tensor([2, 0, 0])  # as a beam picks them
    memory, state = model.encode(source, lengths)
    state = None if state is None else state.index_select(rows)
    close(model.decode(target[:, rows], memory.index_select(rows), state)[0], whole[:, rows])
    changed = target.clone()
    changed[3:] = (changed[3:] + 1) % 12
    assert torch.equal(model(source, lengths, changed)[:3], whole[:3])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 4])
def test_hypotheses_of_one_source_share_its_memory(family, steps):
    """Three a source, side by side: as if each had a copy of the memory."""
    model = seq2seq(family, size=6).double()
    source, lengths, target = torch.randint(12, (6, 2)), torch.tensor([6, 3]), torch.randint(12, (steps, 6))
    memory, state = model.encode(source, lengths)
    copies = torch.tensor([0, 0, 0, 1, 1, 1])
    state = None if state is None else state.index_select(copies)
    shared, after = model.decode(target, memory, state)
    copied, expected = model.decode(target, memory.index_select(copies), state)
    close(shared, copied)
    close(after.layers[0].h, expected.layers[0].h)
    with pytest.raises(ValueError, match="target_in: expected a multiple of the memory's 2 rows, got 5"):
        model.decode(target[:, :5], memory, None)


def test_models_refuse_stacks_that_do_not_fit():
    fitting, narrow = make_stack("qrnn", 8, 4, 2, context_size=4), make_stack("qrnn", 8, 5, 2)
    with pytest.raises(ValueError, match="stack: expected input_size = embedding_size = 9, got 8"):
        Classifier(5, 9, fitting)
    with pytest.raises(ValueError, match="stack: expected batch_first=False, got True"):
        LanguageModel(5, 8, make_stack("lstm", 8, 4, 1, batch_first=True))
    both_ways = QRNN(8, 4, 2, bidirectional=True)
    with pytest.raises(ValueError, match="encoder: expected bidirectional=False, got True"):
        Seq2Seq(5, None, 8, both_ways, fitting)
    with pytest.raises(ValueError, match="decoder: expected bidirectional=False, got True"):
        Seq2Seq(5, None, 8, fitting, both_ways)
    with pytest.raises(ValueError, match="decoder: expected hidden_size = 5 as the encoder, got 4"):
        Seq2Seq(5, None, 8, narrow, fitting)
    with pytest.raises(ValueError, match="readout: expected last, mean or max, got 'first'"):
        Classifier(5, 8, fitting, readout="first")
    with pytest.raises(ValueError, match="encoder_states: expected h or c, got 'o'"):
        seq2seq("qrnn", encoder_states="o")
    with pytest.raises(ValueError, match="attentional: expected linear or tanh, got 'relu'"):
        seq2seq("lstm", attentional="relu")
    with pytest.raises(ValueError, match="attentional: expected linear with a decoder of QRNN"):
        seq2seq("qrnn", attentional="tanh")
    with pytest.raises(ValueError, match="encoder_states: expected h with an encoder of LSTM, got 'c'"):
        seq2seq("lstm", encoder_states="c")
