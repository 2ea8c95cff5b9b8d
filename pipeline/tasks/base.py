"""The contract between the training loop and a task, and what tasks share.

Axes: T time, B batch, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import qrnn
from pipeline.params import Recipe
from pipeline.processed import Processed, Ragged

Metrics = dict[str, Any]
Outputs = str | list[Any]  # what a model made of the test set, an entry an example, in the data's order; JSON
# Of those parameters that not every family has, the ones that its stack takes.
STACK_OPTIONS = ("kernel_size", "pooling", "zoneout", "zoneout_evaluation", "recurrent_dropout")


@dataclass(frozen=True)
class Step:
    """One batch, forward done: `loss` is what to descend.

    `nats` (0-d) is the summed negative log-likelihood of `weight` predictions; `items` is what speed counts.
    """

    loss: torch.Tensor
    nats: torch.Tensor
    weight: int
    items: int


@dataclass(frozen=True)
class Shape:
    """One batch as it is computed: `rows` of `steps` read by the stack, or written by a decoder after it read `source`.

    Of these positions `filled` are no padding.
    """

    rows: int
    steps: int
    source: int = 0
    filled: int = 0

    @property
    def positions(self) -> int:
        return self.rows * (self.steps + self.source)


class Task(ABC):
    """One task on one processed data set with one recipe.

    `criterion` names the validation metric that selects an epoch, `greater_is_better` its direction. `loss_unit` and
    `item` say what the training loss is per and what speed counts.
    """

    criterion: ClassVar[str]
    greater_is_better: ClassVar[bool]
    loss_unit: ClassVar[str]
    item: ClassVar[str]

    def __init__(
        self, data: Processed, recipe: Any, device: torch.device, tell: Callable[[str], None] = lambda doing: None
    ) -> None:
        """`tell` takes words on what goes on in evaluation, as often as it likes."""
        self.data, self.recipe, self.device, self.tell = data, recipe, device, tell

    @abstractmethod
    def model(self) -> nn.Module:
        """A fresh model, drawn from torch's global generator."""

    def warm_start(self, model: nn.Module) -> None:  # noqa: B027 (doing nothing is the default)
        """Sets what of a drawn model begins from data; most models have nothing such."""

    @abstractmethod
    def steps_per_epoch(self) -> int: ...

    @abstractmethod
    def steps(self, model: nn.Module, order: np.random.Generator) -> Iterator[Step]:
        """One pass over the training data; `order` shuffles it."""

    @abstractmethod
    def shapes(self, order: np.random.Generator) -> list[Shape]:
        """The shapes of the batches that `steps` makes with this order."""

    @abstractmethod
    def validate(self, model: nn.Module) -> Metrics: ...

    @abstractmethod
    def test(self, model: nn.Module) -> tuple[Metrics, Outputs]:
        """Test metrics, and the outputs they can be computed from again; called once, on the selected weights."""

    def states(self, model: nn.Module) -> dict[str, Any] | None:
        """The states over an example that the paper shows as a picture, as a record has them; most tasks have none."""
        return None

    @abstractmethod
    def evaluation_shapes(self, *, test: bool) -> list[Shape]:
        """The shapes of the batches that `validate`, or `test`, scores."""

    def decoding_shapes(self) -> list[Shape]:
        """The shapes of the batches that `test` decodes step by step, the references taken for what is decoded."""
        return []

    def sampled_shapes(self) -> list[Shape]:
        """The shapes of the batches that `test` scores with sampled dropout masks."""
        return []

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """An int64 tensor on the task's device."""
        made = torch.from_numpy(values.astype(np.int64))
        if self.device.type == "cuda":
            made = made.pin_memory()  # a copy from pageable memory would wait for all that the device has yet to do
        return made.to(self.device, non_blocking=True)

    def better(self, new: float, old: float | None) -> bool:
        return old is None or (new > old if self.greater_is_better else new < old)


def make_stack(recipe: Recipe, **options: Any) -> nn.Module:
    """The recipe's stack of recurrent layers over its embeddings; `options` go before the recipe's."""
    own = [name for name in STACK_OPTIONS if recipe.family in recipe.FAMILIES_WITH.get(name, ())]
    options = {**{name: getattr(recipe, name) for name in ("dropout", "bias", *own)}, **options}
    return qrnn.make_stack(recipe.family, recipe.embedding, recipe.hidden, recipe.layers, **options)


def negative_log_likelihood(
    logits: torch.Tensor, targets: torch.Tensor, ignored: int = -100, reduction: str = "sum"
) -> torch.Tensor:
    """Nats of targets (N,) int64 by logits (N, V) in any precision: 0-d float32, or (N,) where reduction is "none".

    A target that is `ignored` has none.
    """
    return F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction=reduction)


def padded(rows: list[np.ndarray], before: int | None = None, after: int | None = None) -> np.ndarray:
    """Rows as the columns of a (T, B) array padded with 0; `before` and `after` are put around every row."""
    first, last = [[]] if before is None else [[before]], [[]] if after is None else [[after]]
    whole = [np.concatenate([*first, row, *last]) for row in rows]
    columns = np.zeros((max(len(row) for row in whole), len(whole)), dtype=np.int64)
    for column, row in enumerate(whole):
        columns[: len(row), column] = row
    return columns


def bucketed(lengths: np.ndarray, batch_size: int, order: np.random.Generator, pool: int = 64) -> list[np.ndarray]:
    """Batches of row indices, rows of like length together: shuffled, sorted in pools of batches, shuffled again."""
    shuffled = order.permutation(len(lengths))
    size = batch_size * pool
    batches: list[np.ndarray] = []
    for start in range(0, len(shuffled), size):
        chunk = shuffled[start : start + size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in order.permutation(len(batches))]


def by_positions(lengths: np.ndarray, positions: int) -> list[np.ndarray]:
    """Batches of row indices for evaluation, longest rows first: as many as fill `positions` when padded, at least one.

    So no batch takes more memory than another, but for a row that alone has more positions.
    """
    ordered = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(ordered):
        count = max(1, positions // max(1, int(lengths[ordered[start]])))
        batches.append(ordered[start : start + count])
        start += count
    return batches


def padded_shapes(lengths: np.ndarray, batches: list[np.ndarray], source: np.ndarray | None = None) -> list[Shape]:
    """The shape of each batch of rows of these lengths, padded to its longest."""
    if source is None:
        return [Shape(len(b), int(lengths[b].max()), 0, int(lengths[b].sum())) for b in batches]
    return [Shape(len(b), int(lengths[b].max()), int(source[b].max()), int((lengths + source)[b].sum()))
            for b in batches]  # fmt: skip


def padding_share(shapes: list[Shape]) -> float:
    """Padded positions over all."""
    return 1 - sum(shape.filled for shape in shapes) / sum(shape.positions for shape in shapes)


def by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of row indices for evaluation, longest rows first."""
    ordered = np.argsort(-lengths, kind="stable")
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def rows(ragged: Ragged, indices: np.ndarray, limit: int | None = None) -> list[np.ndarray]:
    return [np.asarray(ragged[i][:limit]) for i in indices]
