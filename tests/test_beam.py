"""Equations 9 to 11, and beam search against exhaustive and greedy search."""

import itertools
import math

import pytest
import torch

from qrnn import make_stack
from qrnn.models import Seq2Seq, beam_search
from qrnn.models.beam import _extend, length_factor

BOS, EOS, VOCABULARY = 1, 0, 4


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small for threads to help, and threads that wait for one another spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(family, seed, sharpness=1.0):
    """A small untrained model; `sharpness` scales its logits."""
    torch.manual_seed(seed)
    wide = {"causal": False} if family == "qrnn" else {}
    encoder = make_stack(family, 4, 6, 2, **wide)
    decoder = make_stack(family, 4, 6, 2, context_size=6)
    model = Seq2Seq(VOCABULARY, None, 4, encoder, decoder).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        model.output.weight.mul_(sharpness)
        model.output.bias.mul_(sharpness)
    return model


def log_probability(model, source, tokens):
    """Sum of log p(w_i | w_1 .. w_{i-1}) of one target, eos included if there, by the whole forward."""
    column = torch.tensor(source).unsqueeze(1)
    target_in = torch.tensor([BOS, *tokens[:-1]]).unsqueeze(1)
    logits = model(column, torch.tensor([len(source)]), target_in)[:, 0]
    return float(logits.detach().log_softmax(-1)[range(len(tokens)), tokens].sum())


def exhaustive(model, source, alpha, longest, margin=5):
    """The best finished target of at most `longest` tokens by eq. 9 written out."""
    best, best_score = None, -math.inf
    for length in range(1, longest + 1):
        product = 1.0
        for j in range(length, len(source) + margin + 1):
            product *= (j + alpha) / j
        for body in itertools.product([token for token in range(VOCABULARY) if token != EOS], repeat=length - 1):
            score = product * log_probability(model, source, [*body, EOS])
            if score > best_score:
                best, best_score = list(body), score
    return best


def test_equation_9_factor_by_hand():
    assert length_factor(3, 5, 0.6) == pytest.approx(3.6 / 3 * 4.6 / 4 * 5.6 / 5, rel=1e-15)
    assert length_factor(5, 5, 0.6) == pytest.approx(5.6 / 5, rel=1e-15)
    assert length_factor(6, 5, 0.6) == 1.0  # the empty product, beyond the target length
    assert length_factor(60, 5, 0.6) == 1.0


def test_equation_10_and_11_are_its_ends():
    for length in range(1, 12):
        assert length_factor(length, 9, 0.0) == 1.0
        expected = (9 + 1) / length if length <= 9 else 1.0  # proportional to 1 / T up to the target length
        assert length_factor(length, 9, 1.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("alpha", "margin"), [(0.0, 5), (0.6, 5), (1.0, 5), (0.6, 0), (1.0, 20)])
@pytest.mark.parametrize("family", ["qrnn", "lstm"])
def test_a_wide_beam_agrees_with_exhaustive_search(family, alpha, margin):
    sources, longest = [[2, 3], [3], [2, 2, 3]], 4
    width = (VOCABULARY - 1) ** longest  # nothing is ever cut off
    found = set()
    for seed in range(4):
        model = model_of(family, seed, 4.0)
        model.output.bias.data[EOS] -= 6.0  # an untrained model would end at once
        source = torch.zeros(3, 3, dtype=torch.int64)
        for b, row in enumerate(sources):
            source[: len(row), b] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in sources])
        options = {"width": width, "alpha": alpha, "target_margin": margin, "max_length": longest}
        outputs = beam_search(model, source, lengths, bos=BOS, eos=EOS, **options)
        expected = [exhaustive(model, row, alpha, longest, margin) for row in sources]
        assert outputs == expected
        found.update(map(tuple, outputs))
    assert max(map(len, found)) > 1, "the search has nothing to decide"


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("family", ["qrnn", "lstm"])
def test_width_1_is_greedy(family, alpha):
    ended = 0
    for seed in range(8):
        model = model_of(family, seed, 2.0)
        source = [2, 3, 2]
        tokens = []
        while len(tokens) < 2 * (3 + 5):
            column, first = torch.tensor(source).unsqueeze(1), torch.tensor([BOS, *tokens]).unsqueeze(1)
            best = int(model(column, torch.tensor([3]), first)[-1, 0].argmax())
            if best == EOS:
                ended += 1
                break
            tokens.append(best)
        got = beam_search(
            model,
            torch.tensor(source).unsqueeze(1),
            torch.tensor([3]),
            bos=BOS,
            eos=EOS,
            width=1,
            alpha=alpha,
        )
        assert got == [tokens]
    assert 0 < ended < 8, "both ways to stop should occur"


@pytest.mark.parametrize(("family", "seed"), [("qrnn", 2), ("lstm", 1)])
def test_a_batch_gives_what_each_sentence_gives_alone(family, seed):
    """Sentences end at different steps and leave the batch without disturbing the others."""
    model = model_of(family, seed, 2.0)
    rows = [[2, 3, 3, 2, 2, 3], [3], [2, 3], [3, 3, 3, 2]]
    source = torch.zeros(6, 4, dtype=torch.int64)
    for b, row in enumerate(rows):
        source[: len(row), b] = torch.tensor(row)
    together = beam_search(model, source, torch.tensor([len(row) for row in rows]), bos=BOS, eos=EOS, width=3)
    assert len({len(target) for target in together}) > 2
    for row, expected in zip(rows, together, strict=True):
        column = torch.tensor(row).unsqueeze(1)
        assert beam_search(model, column, torch.tensor([len(row)]), bos=BOS, eos=EOS, width=3) == [expected]


class Script:
    """A model whose next-token distribution is a table on the tokens so far, for cases worked by hand."""

    def __init__(self, table):
        self.table = table

    def encode(self, source, lengths):
        class Rows(list):
            def index_select(self, rows):
                return Rows(self[int(row)] for row in rows)

        self.rows = Rows
        return Rows(range(source.shape[1])), Rows([()] * source.shape[1])

    def decode_step(self, tokens, memory, state):
        after = self.rows((*seen, int(token)) for seen, token in zip(state, tokens, strict=True))
        logits = torch.full((len(after), VOCABULARY), -50.0)
        for b, seen in enumerate(after):
            for token, probability in self.table.get(seen[1:], {EOS: 1.0}).items():
                logits[b, token] = math.log(probability)
        return logits, after


def search(table, **options):
    source, lengths = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1])
    return beam_search(Script(table), source, lengths, bos=BOS, eos=EOS, **options)[0]


def test_a_beam_finds_what_greedy_misses_and_normalisation_prefers_the_longer():
    """Greedy takes 2 (.6) then ends at .3 of it; the beam keeps 3 (.4), which ends surely: .4 > .18."""
    table = {(): {2: 0.6, 3: 0.4}, (2,): {EOS: 0.3, 2: 0.25, 3: 0.25, 1: 0.2}, (3,): {EOS: 1.0}}
    assert search(table, width=1, alpha=0.0) == [2]
    assert search(table, width=2, alpha=0.0) == [3]
    # Ending at once has log-probability ln .5 = -.693; going on to length 4 has ln .5 + ln .9 = -.799. Source
    # length 1, so T_trg = 6: at alpha = 1 the scores are 7 * -.693 = -4.85 and 7 / 4 * -.799 = -1.40.
    table = {(): {EOS: 0.5, 2: 0.5}, (2,): {2: 0.9, EOS: 0.1}, (2, 2): {2: 1.0}, (2, 2, 2): {EOS: 1.0}}
    assert search(table, width=2, alpha=0.0) == []
    assert search(table, width=2, alpha=1.0) == [2, 2, 2]


def test_rows_without_a_hypothesis_end_none():
    """Only the first of three rows is live; with a vocabulary of the end token alone, each would end."""
    scores = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert _extend(torch.zeros(3, 1), scores, EOS)[-1] == [(0, 0, 0.0)]


def test_states_follow_their_hypotheses_when_the_beam_reorders():
    """2 leads with .6, then [3, 3] with .4 overtakes [2, 1] with .24 and needs the state that saw 3."""
    table = {(): {2: 0.6, 3: 0.4}, (2,): {1: 0.4, 2: 0.3, 3: 0.3}, (3,): {3: 1.0}, (2, 1): {2: 1.0}}
    table |= {(3, 3): {EOS: 1.0}, (2, 3): {2: 1.0}, (3, 1): {3: 1.0}}
    assert search(table, width=2, alpha=0.0, max_length=5) == [3, 3]


def test_finished_hypotheses_stay_while_the_beam_goes_on():
    """[] finishes first with .4; 2 goes on with .6 but splits into ends of at most .24: [] is best."""
    table = {(): {EOS: 0.4, 2: 0.6}, (2,): {EOS: 0.2, 2: 0.2, 3: 0.2, 1: 0.4}}
    assert search(table, width=3, alpha=0.0) == []


def test_max_length_returns_the_best_live_hypothesis_where_nothing_is_finished():
    table = {tuple([2] * n): {2: 1.0} for n in range(20)}
    assert search(table, width=2, max_length=3) == [2, 2, 2]
    assert search(table, width=2) == [2] * 12  # twice the target length, 1 + 5
    assert search(table, width=2, target_margin=0) == [2] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"alpha": -1.0}, "alpha: expected at least 0, got -1.0"),
        ({"target_margin": -1}, "target_margin: expected at least 0, got -1"),
        ({"max_length": 0}, "max_length: expected at least 1 or None, got 0"),
    ],
)
def test_a_bad_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        search({}, **options)


def test_no_sentences_give_no_targets():
    empty = torch.zeros(0, 0, dtype=torch.int64)
    assert beam_search(model_of("qrnn", 0), empty, torch.zeros(0, dtype=torch.int64), bos=BOS, eos=EOS) == []
