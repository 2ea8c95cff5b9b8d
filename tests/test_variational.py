"""The variational LSTM: torch's LSTM and LSTMCell are the authority; its noise is held over time, and counted."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import pipeline.tasks.ptb as ptb_task
from pipeline import paths, trial
from pipeline.params import load
from pipeline.processed import Processed
from qrnn import LSTM, VariationalLSTM, make_stack
from qrnn.models import LanguageModel
from qrnn.models.language_model import WordDropout
from qrnn.recurrence import by_steps, with_gradient
from qrnn.variational import HeldDropout, VariationalLayer, sampled_masks


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["by_steps", "with_gradient"])
def stepwise(monkeypatch, request):
    """The step loop runs also where nn.LSTM's kernels could, by the definition or with the gradient written out."""
    monkeypatch.setattr(VariationalLayer, "fused", False)
    if request.param == "by_steps":
        monkeypatch.setattr("qrnn.variational.with_gradient", by_steps)


def close(got, expected, atol=1e-13):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def variational(*sizes, **options):
    return make_stack("variational", *sizes, **options).double()


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def cell_of(layer):
    """torch's LSTMCell with the layer's weights."""
    cell = nn.LSTMCell(layer.input_size, layer.hidden_size).double()
    cell.load_state_dict({name.removesuffix("_l0"): tensor for name, tensor in layer.state_dict().items()})
    return cell


# Without noise


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_without_noise_the_step_loop_is_torchs_lstm(stepwise, bias, carried):
    """Output, state and every gradient under random upstream gradients."""
    ours, theirs = variational(3, 4, 2, bias=bias), nn.LSTM(3, 4, 2, bias=bias).double()
    theirs.load_state_dict({name.replace("l0", f"l{index}"): tensor for index, layer in enumerate(ours.layers)
                            for name, tensor in layer.state_dict().items()})  # fmt: skip
    inputs = [normal(6, 3, 3), normal(2, 3, 4), normal(2, 3, 4)]
    upstream, results = [normal(6, 3, 4), normal(2, 3, 4), normal(2, 3, 4)], []
    for stack in (ours, theirs):
        x, h, c = (tensor.clone().requires_grad_() for tensor in inputs)
        if stack is theirs:
            output, (last_h, last_c) = stack(x, (h, c) if carried else None)
        else:
            _, state = stack(x)
            before = type(state)(tuple(type(layer)(h[k], c[k]) for k, layer in enumerate(state.layers)))
            output, state = stack(x, before if carried else None)
            last_h, last_c = state.h, state.c
        wanted = [x, *stack.parameters(), *([h, c] if carried else [])]
        results.append([output, last_h, last_c, *torch.autograd.grad([output, last_h, last_c], wanted, upstream)])
    assert len(results[0]) == len(results[1])
    for got, expected in zip(*results, strict=True):
        close(got, expected)


@pytest.mark.parametrize("options", [{}, {"dense": True}], ids=str)
def test_the_step_loop_keeps_the_stacks_conventions(stepwise, options):
    """Lengths, windows, packed and unbatched rows, single steps: as the LSTM stack, which has the same weights."""
    ours, theirs = variational(3, 4, 2, **options), make_stack("lstm", 3, 4, 2, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x, lengths = normal(7, 4, 3), torch.tensor([5, 7, 1, 0])
    for arguments in ({"x": x}, {"x": x, "lengths": lengths}, {"x": x[:, 0]}):
        (got, state), (expected, other) = (stack(**arguments) for stack in (ours, theirs))
        close(got, expected)
        close(state.h, other.h)
        close(state.c, other.c)
        again = dict(arguments, state=other)
        close(ours(**again)[0], theirs(**again)[0])
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 7, 1, 2]), enforce_sorted=False)
    close(ours(packed)[0].data, theirs(packed)[0].data)
    first, state = ours(x[:4])
    second, _ = ours(x[4:], state.detach())
    close(torch.cat([first, second]), theirs(x)[0])
    close(ours.step(x[0])[0], theirs.step(x[0])[0])
    changed = x.clone()
    changed[5:, 0] = math.inf
    assert torch.equal(ours(changed, lengths=lengths)[0], ours(x, lengths=lengths)[0])


def test_in_evaluation_it_is_the_lstm():
    ours = variational(3, 4, 2, dropout=0.5, recurrent_dropout=0.5).eval()
    theirs = make_stack("lstm", 3, 4, 2).double()
    theirs.load_state_dict(ours.state_dict())
    x = normal(6, 3, 3)
    assert isinstance(ours, VariationalLSTM)
    assert all(layer.fused for layer in ours.layers)
    assert torch.equal(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours(x)[0], ours(x)[0])
    assert not ours.train().layers[0].fused


def test_a_second_derivative_in_training_is_refused_and_in_evaluation_right():
    """Whether or not the upstream gradient is differentiable itself."""
    stack, x = variational(3, 4, 1, recurrent_dropout=0.5), normal(5, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="in training it has first derivatives only, got a request for the second"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(stack(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="in training it has first derivatives only, got a request for the second"):
        gradient.square().sum().backward()
    zoned = variational(3, 4, 1, zoneout=0.5).eval()
    assert torch.autograd.gradgradcheck(lambda x: zoned(x)[0], x)


def test_a_decoder_starts_in_its_encoders_state():
    encoder, decoder = (variational(3, 4, 2, context_size=size) for size in (None, 4))
    _, encoded = encoder(normal(5, 2, 3))
    state, context = decoder.start(encoded)
    assert context is None
    close(state.c, encoded.c)
    with pytest.raises(ValueError, match="context: expected None"):
        decoder(normal(4, 2, 3), context=(state.h[0],) * 2)


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout", "dropout"])
def test_a_probability_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=rf"{name}: expected a probability in \[0, 1\), got 1.0"):
        variational(3, 4, 1, **{name: 1.0})


def test_other_families_have_no_recurrent_dropout():
    for family in ("qrnn", "lstm"):
        with pytest.raises(ValueError, match=f"recurrent_dropout: expected 0.0 .*'{family}' has no such option"):
            make_stack(family, 3, 4, 1, recurrent_dropout=0.2)
    assert type(make_stack("lstm", 3, 4, 1, recurrent_dropout=0.0)) is LSTM


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("staying", [False, True])
def test_the_written_gradient_is_autograds(staying, masked, strided):
    """Values and every gradient of the definition, and finite differences; also where no tensor is contiguous."""
    given = [normal(*shape) for shape in ((5, 3, 16), (3, 4), (3, 4), (16, 4))]
    if strided:
        given = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    inputs, h, c, weight = (x.requires_grad_() for x in given)
    mask = (torch.rand(3, 4) < 0.6).double() / 0.6 if masked else None
    stays = torch.rand(5, 2, 3, 4) < 0.3 if staying else None
    results, upstream = [], [normal(5, 3, 4), normal(3, 4)]
    assert all(x.is_contiguous() is not strided for x in given)
    for run in (by_steps, with_gradient):
        outputs = run(inputs, h, c, weight, mask, stays)
        results.append([*outputs, *torch.autograd.grad(outputs, (inputs, h, c, weight), upstream)])
    for expected, got in zip(*results, strict=True):
        close(got, expected)
    assert torch.autograd.gradcheck(lambda *given: with_gradient(*given, mask, stays), (inputs, h, c, weight))


def test_in_bfloat16_products_the_definition_trains():
    """The state keeps its precision; the output is that of float32 up to the products' rounding."""
    stack, x = make_stack("variational", 8, 8, 2, recurrent_dropout=0.3, zoneout=0.1), torch.randn(6, 3, 8)
    torch.manual_seed(1)
    expected, _ = stack(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = stack(x)
    assert output.dtype == state.c.dtype == torch.float32
    close(output, expected, 0.02)
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())


# Masks


def test_a_held_mask_is_one_for_all_steps_and_another_for_each_row_and_call():
    drop, x = HeldDropout(0.25), torch.ones(9, 40, 50)
    first, second = drop(x), drop(x)
    assert torch.equal(first, first[:1].expand(9, -1, -1))
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert len({tuple(row) for row in first[0].tolist()}) == 40
    assert not torch.equal(first, second)
    kept = 40 * 50 * 0.75
    assert abs((first[0] > 0).sum().item() - kept) < 5 * math.sqrt(kept * 0.25)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("layers", [1, 2])
def test_the_recurrence_reads_one_mask_of_h_in_all_gates(layers):
    """By torch's LSTMCell, step by step: given mask * h and the whole c. Masks between layers too."""
    stack, x = variational(3, 4, layers, dropout=0.5, recurrent_dropout=0.5), normal(6, 5, 3)
    with sampled_masks(stack):
        output, state = stack(x)
        masks = [layer.recurrent.mask(x.new_empty(5, 4)) for layer in stack.layers]
        between = [drop.mask(x.new_empty(5, 4)) for drop in stack.between]
    for index, layer in enumerate(stack.layers):
        cell, (h, c), outputs = cell_of(layer), (torch.zeros(5, 4).double(),) * 2, []
        assert set(masks[index].unique().tolist()) == {0.0, 2.0}
        for t in range(6):
            h, c = cell(x[t], (h * masks[index], c))
            outputs.append(h)
        x = torch.stack(outputs) * (between[index] if index < layers - 1 else 1)
    close(output, x)
    close(state.c[-1], c)


def test_in_training_every_window_has_masks_of_its_own():
    stack, x = variational(3, 4, 1, recurrent_dropout=0.5), normal(6, 5, 3)
    assert not torch.equal(stack(x)[0], stack(x)[0])
    close(stack(x)[0][0], stack(x)[0][0])  # the first step reads h = 0


def test_sampled_masks_drop_in_evaluation_and_last():
    """One text in two windows with its state carried is the text in one; afterwards all is as before."""
    model = LanguageModel(7, 5, variational(5, 4, 2, dropout=0.4, recurrent_dropout=0.4), dropout=0.4, word_dropout=0.9)
    model.double().eval()
    tokens = torch.randint(7, (9, 3))
    plain, _ = model(tokens)
    with sampled_masks(model):
        whole, _ = model(tokens)
        first, state = model(tokens[:4])
        second, _ = model(tokens[4:], state)
        with pytest.raises(ValueError, match=r"x: expected \(B, n\) = \(3, 5\) as the held mask, got \(2, 5\)"):
            model(tokens[:, :2])
    close(torch.cat([first, second]), whole)
    assert not torch.allclose(whole, plain)
    with sampled_masks(model):
        assert not torch.allclose(model(tokens)[0], whole)
    assert torch.equal(model(tokens)[0], plain)
    assert not any(part.training or part.holds for part in model.modules() if isinstance(part, HeldDropout))


def test_masks_around_the_stack_are_held_as_those_within():
    model = LanguageModel(5, 8, make_stack("variational", 8, 8, 1), dropout=0.5)
    seen = {}
    model.stack.register_forward_pre_hook(lambda module, inputs: seen.update(bottom=inputs[0]))
    model.output.register_forward_pre_hook(lambda module, inputs: seen.update(top=inputs[0]))
    model(torch.randint(5, (30, 20)))
    for place in ("bottom", "top"):
        dropped = seen[place] == 0
        assert torch.equal(dropped, dropped[:1].expand(30, -1, -1)), place
        assert 0.3 < dropped[0].float().mean() < 0.7, place


# Words


def test_word_dropout_drops_types_not_tokens():
    drop, tokens = WordDropout(0.25), torch.randint(50, (200, 30))
    factors = drop(torch.ones(200, 30, 3), tokens, 50)
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    dropped = []
    for b in range(30):
        for word in tokens[:, b].unique():
            same = factors[tokens[:, b] == word, b]
            assert (same == same[0, 0]).all()
            dropped.append(same[0, 0].item() == 0)
    assert abs(np.mean(dropped) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / len(dropped))
    rows = torch.arange(50).unsqueeze(-1).expand(-1, 30)
    assert len({tuple(row) for row in drop(torch.ones(50, 30, 1), rows, 50)[..., 0].t().tolist()}) == 30
    x = torch.ones(200, 30, 3)
    assert drop.eval()(x, tokens, 50) is x
    with pytest.raises(ValueError, match=r"word_dropout: expected a probability in \[0, 1\), got 1.0"):
        WordDropout(1.0)


# Zoneout


def test_zoneout_in_evaluation_is_the_expectation():
    """Krueger et al. (2016) by hand: p * old + (1 - p) * new for c and h, h's new value from c's before zoneout."""
    stack, x = variational(3, 4, 1, zoneout=0.3).eval(), normal(6, 5, 3)
    cell, h, c = cell_of(stack.layers[0]), torch.zeros(5, 4).double(), torch.zeros(5, 4).double()
    output, state = stack(x)
    for t in range(6):
        new_h, new_c = cell(x[t], (h, c))
        h, c = 0.3 * h + 0.7 * new_h, 0.3 * c + 0.7 * new_c
        close(output[t], h)
    close(state.c[0], c)


def test_zoneout_in_training_keeps_a_share_of_the_old_values():
    """Each channel has the old value or the new one, drawn apart for c and h; on average the expectation."""
    stack, rows, p = variational(3, 8, 1, zoneout=0.3), 4000, 0.3
    x, h, c = (tensor.expand(*tensor.shape[:-2], rows, -1) for tensor in (normal(1, 1, 3), normal(1, 8), normal(1, 8)))
    _, state = stack(x)
    before = type(state)((type(state.layers[0])(h, c),))
    _, after = stack(x, before)
    _, mean = stack.eval()(x, before)
    new_h, new_c = cell_of(stack.layers[0])(x[0], (h, c))
    kept = []
    for old, new, got, expected in ((h, new_h, after.h[0], mean.h[0]), (c, new_c, after.c[0], mean.c[0])):
        stayed = got == old
        close(torch.where(stayed, old, new), got)
        kept.append(stayed)
        assert abs(stayed.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / (8 * rows))
        error = (old - new).abs() * math.sqrt(p * (1 - p) / rows)
        assert ((got.mean(0) - expected[0]).abs() < 5 * error[0]).all()
    both = (kept[0] & kept[1]).double().mean().item()
    assert abs(both - p * p) < 5 * math.sqrt(p * p / (8 * rows))
    steps = stack.train().layers[0]._stays(x.expand(50, -1, -1), h, None)
    assert not torch.equal(steps[0], steps[1])


# Language modelling


def variational_trial(**changes):
    """The tiny root's LSTM as a variational one."""
    whole = load().trial("sample", "ptb", "lstm", 1)
    options = {"family": "variational", "recurrent_dropout": 0.2, "word_dropout": 0.2, "layers": 2, **changes}
    return dataclasses.replace(whole, recipe=dataclasses.replace(whole.recipe, **options))


def task_of(one):
    return ptb_task.Ptb(Processed(paths.processed("sample", "ptb")), one.recipe, torch.device("cpu"))


class Rows(nn.Module):
    """Gives every word the probability that its sample has for it, whatever is read."""

    def __init__(self, table):
        super().__init__()
        self.logs, self.first, self.calls = torch.tensor(table).log(), 0, []

    def forward(self, tokens, state):
        if state is None:
            self.first = sum(self.groups())
        self.calls.append((tokens.shape[1], state))
        logs = self.logs[self.first : self.first + tokens.shape[1]]
        return logs.expand(len(tokens), -1, -1), State()

    def groups(self):
        """The number of samples of each pass over the text."""
        return [rows for rows, state in self.calls if state is None]


class State:
    """Nothing to carry."""


def test_probabilities_are_averaged_over_samples_not_their_logarithms(data, monkeypatch):
    """Three samples, two side by side. Words 0, 1, 2 have averages 0.4, 0.2, 0.4 (by hand); the text is 1, 2, 0, ..."""
    monkeypatch.setattr(ptb_task, "MC_ROWS", 2)
    monkeypatch.setattr(ptb_task, "MC_PREDICTIONS", 14)
    model = Rows([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.1, 0.3]])
    task = task_of(variational_trial(mc_samples=3))
    text = np.asarray(task.data.array("test"))
    nats = task._averaged_nats(model, "test", 3)
    assert nats.dtype == torch.float64
    close(nats, -torch.tensor([0.4, 0.2, 0.4])[torch.tensor(text.tolist())].double().log(), 1e-7)
    assert model.groups() == [2, 1]
    assert len(model.calls) == -(-len(text) // 7) + -(-len(text) // 14)  # windows of 14 predictions


def test_samples_have_masks_of_their_own_for_the_whole_text(data, monkeypatch):
    """Against every sample run alone by LSTMCell in float64, with the masks that it had."""
    monkeypatch.setattr(ptb_task, "MC_PREDICTIONS", 28)
    task = task_of(variational_trial(mc_samples=4, dropout=0.3))
    model, found = task.model().double().eval(), []

    def remember(part):
        found.append([drop._held for drop in (part.input_dropout, part.stack.layers[0].recurrent, part.stack.between[0],
                                              part.stack.layers[1].recurrent, part.output_dropout)])  # fmt: skip

    model.register_forward_hook(lambda part, inputs, output: remember(part))
    nats = task._averaged_nats(model, "test", 4)
    assert len(found) > 1
    assert all(a is b for masks in found[1:] for a, b in zip(masks, found[0], strict=True))
    text = torch.tensor(task.data.array("test").tolist())
    before, (bottom, *inner, top) = torch.cat([torch.tensor([0]), text[:-1]]), [mask.clone() for mask in found[0]]
    cells, states = [cell_of(layer) for layer in model.stack.layers], [(torch.zeros(4, 8).double(),) * 2] * 2
    expected = []
    for token, target in zip(before, text, strict=True):
        x = model.embedding(token).expand(4, -1) * bottom
        for k, (cell, mask) in enumerate(zip(cells, (inner[0], inner[2]), strict=True)):
            h, c = states[k]
            states[k] = cell(x, (h * mask, c))
            x = states[k][0] * (inner[1] if k == 0 else top)
        expected.append(-model.output(x).softmax(-1)[:, target].mean().log())
    close(nats, torch.stack(expected).detach(), 1e-6)  # logits pass through float32


def test_a_trial_reports_both_perplexities_and_its_samples_again(data):
    """The ordinary perplexity is that of the trial without samples; another run of the trial draws the same masks."""
    one = variational_trial(mc_samples=5)
    records = [trial.run(one, device="cpu", report=lambda _progress: None) for _ in range(2)]
    alone = trial.run(variational_trial(), device="cpu", report=lambda _progress: None)
    assert records[0]["test"] == records[1]["test"]
    assert records[0]["test"].keys() == {"perplexity", "perplexity_mc", "mc_samples", "tokens"}
    assert records[0]["test"]["mc_samples"] == 5
    assert records[0]["test"]["perplexity"] == alone["test"]["perplexity"]
    assert "perplexity_mc" not in alone["test"]
    assert records[0]["test"]["perplexity_mc"] != records[0]["test"]["perplexity"]
