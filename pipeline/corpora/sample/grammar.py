"""Probabilistic grammars in which every production begins with a word and the word decides the production.

Such a grammar (a simple deterministic one, Korenjak and Hopcroft 1966) gives a sentence exactly one derivation: reading
from the left, the symbol on top of the stack and the next word leave one production. Two things follow.

1. The probability of a sentence is that of its derivation, and the true distribution of the next word, given all words
   before it, is the distribution over the productions of the symbol on top of the stack.
2. The entropy of a sentence is that of its derivation, which is linear in the symbols: H(A) = H(productions of A) +
   sum over productions of p * (sum of H over the symbols it leaves). The expected length obeys the same recursion. The
   end of the sentence is certain once the stack is empty: it adds one token and no entropy. Sentences are independent,
   so entropy a token = H(start) / (length(start) + 1), exactly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.corpora.sample.draws import Draws, running_sums


@dataclass(frozen=True)
class Production:
    """`word` followed by `rest`: names of symbols, or words that are certain."""

    weight: float
    word: str
    rest: tuple[str, ...] = ()


class Grammar:
    """Symbols with their productions; a name in `rest` that is no symbol is a word.

    Raises:
        ValueError: two productions of one symbol begin with the same word.
    """

    def __init__(self, start: str, symbols: dict[str, Sequence[Production]]) -> None:
        self.start = start
        self.symbols = {name: _normalised(name, productions) for name, productions in symbols.items()}
        self._sums = {name: running_sums([p.weight for p in ps]) for name, ps in self.symbols.items()}
        self._by_word = {name: {p.word: p for p in ps} for name, ps in self.symbols.items()}

    def sample(self, draws: Draws) -> tuple[list[str], float]:
        """One sentence and its log probability in nats."""
        words, stack, log_probability = [], [self.start], 0.0
        while stack:
            name = stack.pop()
            if name not in self.symbols:
                words.append(name)
                continue
            production = self.symbols[name][draws.index(self._sums[name])]
            log_probability += math.log(production.weight)
            words.append(production.word)
            stack.extend(reversed(production.rest))
        return words, log_probability

    def log_probability(self, words: Sequence[str]) -> float:
        """Log probability of a sentence in nats, from the words alone; -inf where the grammar does not make it."""
        stack, total = [self.start], 0.0
        for word in words:
            if not stack:
                return -math.inf
            name = stack.pop()
            if name not in self.symbols:
                if name != word:
                    return -math.inf
                continue
            production = self._by_word[name].get(word)
            if production is None:
                return -math.inf
            total += math.log(production.weight)
            stack.extend(reversed(production.rest))
        return -math.inf if stack else total

    def words(self) -> list[str]:
        """Every word of the language, sorted."""
        productions = [p for ps in self.symbols.values() for p in ps]
        certain = {name for p in productions for name in p.rest if name not in self.symbols}
        return sorted(certain | {p.word for p in productions})

    def expected_length(self) -> float:
        """Expected tokens of a sentence, its end included."""
        return self._expected({name: sum(p.weight * (1 + sum(part not in self.symbols for part in p.rest)) for p in ps)
                               for name, ps in self.symbols.items()}) + 1  # fmt: skip

    def entropy(self) -> float:
        """Expected code length of a token in nats, the end of the sentence included; exact, see the module's text."""
        own = {name: -sum(p.weight * math.log(p.weight) for p in ps) for name, ps in self.symbols.items()}
        return self._expected(own) / self.expected_length()

    def perplexity(self) -> float:
        """Perplexity a token of a model that knows the grammar: no model does better in expectation."""
        return math.exp(self.entropy())

    def _expected(self, own: dict[str, float]) -> float:
        """Expected sum of `own` over a derivation. The fixed point is reached by iteration: the depth of a
        derivation has a geometric tail, so the error falls geometrically."""
        totals = dict.fromkeys(own, 0.0)
        for _ in range(1000):
            updated = {name: own[name] + sum(p.weight * sum(totals.get(part, 0.0) for part in p.rest) for p in ps)
                       for name, ps in self.symbols.items()}  # fmt: skip
            change = max(abs(updated[name] - totals[name]) for name in totals)
            totals = updated
            if change < 1e-13:
                return totals[self.start]
        raise ValueError(f"{self.start}: the grammar has no finite expectation")


def _normalised(name: str, productions: Sequence[Production]) -> tuple[Production, ...]:
    if len({production.word for production in productions}) != len(productions):
        raise ValueError(f"{name}: two productions begin with the same word")
    total = math.fsum(production.weight for production in productions)
    return tuple(Production(p.weight / total, p.word, p.rest) for p in productions)


def zipf(words: Sequence[str], share: float, rest: tuple[str, ...] = ()) -> list[Production]:
    """Productions for the words of one class, the first the most frequent: weights 1, 1/2, 1/3, ... of `share`."""
    scale = share / math.fsum(1 / rank for rank in range(1, len(words) + 1))
    return [Production(scale / rank, word, rest) for rank, word in enumerate(words, 1)]
