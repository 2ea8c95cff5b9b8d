"""The embedded corpora: what they promise of entropy, of bags of words, of word order; and that they never change."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpora import iwslt
from pipeline.corpora.sample import language, sentiment, translation
from pipeline.corpora.sample.draws import Draws
from pipeline.corpora.sample.grammar import Grammar, Production

# -------------------------------------------------------------------------------------------------------- grammars

COIN = Grammar("s", {"s": [Production(1, "heads"), Production(1, "tails")]})
BRACKETS = Grammar("s", {"s": [Production(0.7, "x"), Production(0.3, "(", ("s", ")"))]})


def test_entropy_of_grammars_that_can_be_done_by_hand():
    assert COIN.entropy() == pytest.approx(math.log(2) / 2)  # one coin, then a certain end: two tokens
    assert COIN.expected_length() == pytest.approx(2)
    # Of brackets: 1 + 2 * 0.3 / 0.7 words and the end; as many choices as brackets and one more.
    assert BRACKETS.expected_length() == pytest.approx(2 + 0.6 / 0.7)
    choice = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert BRACKETS.entropy() == pytest.approx((choice / 0.7) / (2 + 0.6 / 0.7))


def test_a_grammar_with_two_ways_to_begin_is_refused():
    with pytest.raises(ValueError, match="s: two productions begin with the same word"):
        Grammar("s", {"s": [Production(1, "x"), Production(1, "x", ("y",))]})


def test_a_grammar_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="no finite expectation"):
        Grammar("s", {"s": [Production(1, "x", ("s",))]}).entropy()


@pytest.mark.parametrize("sentence", ["", "x", "( x", "( x ) )", "( y )", ") x ("])
def test_only_sentences_of_the_grammar_have_a_probability(sentence):
    expected = math.log(0.7) if sentence == "x" else -math.inf
    assert BRACKETS.log_probability(sentence.split()) == expected


def test_probabilities_of_all_short_sentences_add_up():
    sentences = [["("] * n + ["x"] + [")"] * n for n in range(40)]
    assert math.fsum(math.exp(BRACKETS.log_probability(s)) for s in sentences) == pytest.approx(1, abs=1e-12)


# -------------------------------------------------------------------------------------------------------- language


def test_monte_carlo_agrees_with_the_exact_entropy():
    count = 40_000
    draws = Draws(5)
    drawn = [language.grammar().sample(draws) for _ in range(count)]
    codes = np.array([-log_probability for _, log_probability in drawn])
    lengths = np.array([len(words) + 1 for words, _ in drawn])
    entropy, length = language.grammar().entropy(), language.grammar().expected_length()
    # Both are means of independent sentences: the ratio's error by the delta method, five standard errors allowed.
    error = (codes - entropy * lengths).std() / (length * math.sqrt(count))
    assert abs(codes.sum() / lengths.sum() - entropy) < 5 * error
    assert error < 0.002
    assert abs(lengths.mean() - length) < 5 * lengths.std() / math.sqrt(count)
    print(f"exact {entropy:.5f} nats a token, sampled {codes.sum() / lengths.sum():.5f} +- {error:.5f}")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9))
def test_the_probability_of_a_sentence_can_be_told_from_its_words_alone(seed):
    words, log_probability = language.grammar().sample(Draws(seed))
    assert language.grammar().log_probability(words) == pytest.approx(log_probability, abs=1e-9)


def test_unigrams_are_far_from_the_floor_and_the_vocabulary_is_small():
    sentences, _ = language.sentences(6000, Draws(12))
    counts = Counter(word for words in sentences for word in [*words, "<eos>"])
    total = counts.total()
    unigram = math.exp(-math.fsum(n / total * math.log(n / total) for n in counts.values()))
    assert unigram > 3 * language.grammar().perplexity()
    assert 200 <= len(language.grammar().words()) <= 500
    assert set(counts) == {*language.grammar().words(), "<eos>"}  # no word of the test set is new


def test_the_verb_agrees_with_its_subject_past_a_relative_clause():
    grammar = language.grammar()
    for number, verb in (("sailors", "drift"), ("sailor", "drifts")):
        for inner, inner_verb in (("gull", "chases"), ("gulls", "chase")):
            sentence = f"ashore the {number} that the {inner} {inner_verb} {verb} ."
            assert grammar.log_probability(sentence.split()) > -math.inf, sentence
            for wrong in (sentence.replace(f" {verb} ", " sink " if verb == "drifts" else " sinks "),
                          sentence.replace(inner_verb, "haul" if inner_verb == "chases" else "hauls")):  # fmt: skip
                assert grammar.log_probability(wrong.split()) == -math.inf, wrong
    stranger = "ashore the sailors that the gull outshines drift ."  # a verb of the sky
    assert grammar.log_probability(stranger.split()) == -math.inf


def test_opening_and_closing_words_answer_each_other():
    inside = "ashore some gulls swim"
    for opening in language.BRACKETS:
        for closing in language.BRACKETS.values():
            possible = language.grammar().log_probability([opening, *inside.split(), closing]) > -math.inf
            assert possible == (language.BRACKETS[opening] == closing)


# ------------------------------------------------------------------------------------------------------- sentiment


@pytest.fixture(scope="module")
def reviews() -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    draws, taken = Draws(11), set()
    return sentiment.reviews(4000, draws, taken), sentiment.reviews(1000, draws, taken)


def test_reviews_are_balanced_and_none_is_in_both_sets(reviews):
    train, test = reviews
    assert [sum(label for label, _ in part) for part in reviews] == [2000, 500]
    assert len({text for _, text in train + test}) == 5000
    lengths = {label: np.array([len(text.split()) for other, text in train if other == label]) for label in (0, 1)}
    assert min(map(min, lengths.values())) >= 30
    assert max(map(max, lengths.values())) <= 80
    error = math.hypot(*(group.std() / math.sqrt(len(group)) for group in lengths.values()))
    assert abs(lengths[0].mean() - lengths[1].mean()) < 4 * error
    assert sum("<br />" in text for _, text in train) > 1000


def test_praise_and_blame_are_as_frequent_in_both_classes(reviews):
    words = [w for kind in (sentiment.GOOD, sentiment.BAD) for w in (*kind.adjectives, *kind.verbs, *kind.nouns)]
    for word in words:
        shares = [np.mean([word in text.split() for label, text in reviews[0] if label == y]) for y in (0, 1)]
        error = math.sqrt(2 * max(shares) * (1 - max(shares)) / 2000)
        assert abs(shares[0] - shares[1]) < 4.5 * error, word


def test_a_bag_of_words_does_not_solve_it(reviews):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    (train_labels, train), (test_labels, test) = (zip(*part, strict=True) for part in reviews)
    for binary in (True, False):
        bags = CountVectorizer(binary=binary, lowercase=False).fit(train)
        model = LogisticRegression(max_iter=1000).fit(bags.transform(train), train_labels)
        accuracy = 100 * model.score(bags.transform(test), test_labels)
        print(f"bag of words, {'presence' if binary else 'counts'}: {accuracy:.1f} %")
        assert accuracy < 60


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**9), st.booleans())
def test_a_statement_means_what_it_should(seed, good):
    words = sentiment.statement(good, Draws(seed)).split()
    praise = any(w in words for w in (*sentiment.GOOD.adjectives, *sentiment.GOOD.verbs, *sentiment.GOOD.nouns))
    assert good == (praise != any(word in words for word in ("not", "no")))


@pytest.mark.slow
def test_a_model_that_reads_in_order_learns_it(reviews, request):
    """Two layers of GRU, two passes over 4000 reviews."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # several threads wait for each other at this size
    both = reviews[0] + reviews[1]
    split = [text.replace("<br />", " ").replace(".", " .").replace(",", " ,").split() for _, text in both]
    ids = {word: index for index, word in enumerate(sorted({w for words in split for w in words}), 1)}
    rows = [torch.tensor([ids[w] for w in words]) for words in split]
    labels = torch.tensor([label for label, _ in both])
    embed, layers, output = nn.Embedding(len(ids) + 1, 32), nn.GRU(32, 32, 2), nn.Linear(32, 2)
    parameters = [*embed.parameters(), *layers.parameters(), *output.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=4e-3)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_sequence([embed(rows[i]) for i in batch], enforce_sorted=False)
        return output(layers(packed)[1][-1])

    for _ in range(2):
        for batch in torch.randperm(4000).split(32):
            loss = nn.functional.cross_entropy(logits(batch), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimiser.step()
    with torch.no_grad():
        right = sum(int((logits(b).argmax(1) == labels[b]).sum()) for b in torch.arange(4000, 5000).split(200))
    print(f"order-aware accuracy {right / 10:.1f} %")
    assert right / 1000 > 0.85


# ----------------------------------------------------------------------------------------------------- translation


def test_the_lexicon_is_one_to_one_and_its_sides_share_no_word():
    parts = (translation.TIMES, translation.ADJECTIVES, translation.SUBJECTS, translation.OBJECTS, translation.VERBS)
    lexicon = {source: target for part in parts for source, target in part.items()}
    assert len(lexicon) == sum(map(len, parts)) == len(set(lexicon.values()))
    assert 30 <= len(lexicon) <= 60
    assert not set(lexicon) & set(lexicon.values())


def test_the_verb_goes_from_the_end_to_the_second_place():
    for source, target in translation.pairs(500, Draws(3), set()):
        words, translated = source.split(), target.split()
        assert words[-1] in translation.VERBS
        verb = translated.index(translation.VERBS[words[-1]])
        before = translated[:verb]
        if words[0] in translation.TIMES:
            assert before == [translation.TIMES[words[0]]]
        else:
            assert before[0] in translation.SUBJECTS.values()
            assert set(before[1:]) <= set(translation.ADJECTIVES.values())
        assert len(words) == len(translated)


def test_pairs_are_short_distinct_and_copying_scores_nothing():
    draws, taken = Draws(13), set()
    train, test = translation.pairs(4000, draws, taken), translation.pairs(400, draws, taken)
    sources = [source for source, _ in train + test]
    assert len(set(sources)) == 4400
    assert min(map(len, sources)) >= 20
    assert max(map(len, sources)) <= 50
    score, signature = iwslt.source_copy(test)
    assert score < 1
    assert "version:" in signature


# ----------------------------------------------------------------------------------------------------------- draws


def test_choices_never_change():
    """Written down from the first version: a change here makes every sample corpus another one."""
    draws = Draws(7)
    assert [draws.between(0, 9) for _ in range(8)] == [3, 1, 6, 0, 5, 3, 0, 5]
    assert [draws.choice("abcdef") for _ in range(8)] == list("acaaceab")
    assert [draws.index([1, 3, 4]) for _ in range(8)] == [1, 2, 1, 1, 2, 0, 2, 1]
