"""Seeded choices that are the same in every Python."""

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Choices made of `random.Random.random()` alone, the one sequence that Python promises not to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def between(self, low: int, high: int) -> int:
        """A whole number, `low <= n <= high`."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self._random.random() * len(items))]

    def index(self, cumulative: Sequence[float]) -> int:
        """An index by its weight, given the running sums of the weights."""
        place = bisect.bisect_right(cumulative, self._random.random() * cumulative[-1])
        return min(place, len(cumulative) - 1)


def running_sums(weights: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(weights))
