"""IMDB sentiment classification (section 3.1): densely connected stack, last state, accuracy."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline import figure3
from pipeline.errors import UserError
from pipeline.tasks.base import (
    Metrics,
    Outputs,
    Shape,
    Step,
    Task,
    bucketed,
    by_length,
    make_stack,
    negative_log_likelihood,
    padded,
    padded_shapes,
    rows,
)
from qrnn.models.classifier import Classifier

EVALUATION_BATCH = 128


class Imdb(Task):
    criterion: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    loss_unit: ClassVar[str] = "nats/review"
    item: ClassVar[str] = "tokens"

    def model(self) -> nn.Module:
        recipe = self.recipe
        stack = make_stack(recipe, dense=recipe.dense)
        words = len(self.data.json("vocabulary"))
        model = Classifier(words, recipe.embedding, stack, dropout=recipe.dropout, readout=recipe.readout)
        model.embedding.weight.requires_grad_(recipe.trainable_embeddings)
        return model

    def warm_start(self, model: nn.Module) -> None:
        """Word vectors, where the processed data hold some.

        Raises:
            UserError: vectors of another size than the recipe's, or none where the recipe says what stands beside them.
        """
        if "embeddings.npy" not in self.data.manifest["files"]:
            if self.recipe.unknown_vectors != "drawn":
                raise UserError(
                    f"unknown_vectors: expected drawn where the data hold no word vectors, "
                    f"got {self.recipe.unknown_vectors}"
                )
            return
        ids, vectors = (torch.from_numpy(np.array(self.data.array(f"embeddings{end}"))) for end in (".ids", ""))
        if vectors.shape[1] != self.recipe.embedding:
            raise UserError(f"embedding: expected {vectors.shape[1]}, as the vectors have, got {self.recipe.embedding}")
        start_from_vectors(model.embedding, ids, vectors, unknown=self.recipe.unknown_vectors)

    def steps_per_epoch(self) -> int:
        return -(-len(self.data.array("train.labels")) // self.recipe.batch_size)

    def steps(self, model: nn.Module, order: np.random.Generator) -> Iterator[Step]:
        """Shuffled batches of reviews of like length."""
        for batch in self._batches(order):
            logits, labels, tokens = self._forward(model, "train", batch)
            nats = negative_log_likelihood(logits, labels)
            yield Step(nats / len(batch), nats.detach(), len(batch), tokens)

    def shapes(self, order: np.random.Generator) -> list[Shape]:
        return padded_shapes(self._lengths("train"), self._batches(order))

    def evaluation_shapes(self, *, test: bool) -> list[Shape]:
        split = "test" if test else "dev"
        return padded_shapes(self._lengths(split), self._scored(split))

    def _batches(self, order: np.random.Generator) -> list[np.ndarray]:
        return bucketed(self._lengths("train"), self.recipe.batch_size, order)

    def _scored(self, split: str) -> list[np.ndarray]:
        return by_length(self._lengths(split), EVALUATION_BATCH)

    def validate(self, model: nn.Module) -> Metrics:
        return self._accuracy(model, "dev")[0]

    def test(self, model: nn.Module) -> tuple[Metrics, Outputs]:
        """Accuracy, and the label that is given to each review, a digit each."""
        metrics, given = self._accuracy(model, "test")
        return metrics, "".join(map(str, given))

    @torch.inference_mode()
    def states(self, model: nn.Module) -> dict[str, Any] | None:
        """The last layer's over the review of Figure 3, where the test set has it uncut; see `pipeline.figure3`."""
        reviews = self.data.ragged("test")
        found = figure3.find(reviews, self.data.json("vocabulary"))
        if found is None:
            return None
        review, spans = found
        (tokens,) = rows(reviews, np.array([review]), self.recipe.max_tokens)
        if len(tokens) <= max(last for _, last in spans.values()):
            return None
        states = model.states(self.tensor(tokens[:, None]), self.tensor(np.array([len(tokens)])))
        return figure3.pack(review, spans, states[:, 0].float().cpu().numpy())

    @torch.inference_mode()
    def _accuracy(self, model: nn.Module, split: str) -> tuple[Metrics, np.ndarray]:
        """Accuracy and loss, and the label given to each review, (reviews,) int64."""
        wanted = self.data.array(f"{split}.labels")
        given, nats, reviews = np.empty(len(wanted), dtype=np.int64), 0.0, 0
        for batch in self._scored(split):
            logits, labels, _ = self._forward(model, split, batch)
            given[batch] = logits.argmax(-1).cpu().numpy()
            nats += negative_log_likelihood(logits, labels).item()
            reviews += len(batch)
            self.tell(f"{split}: {reviews}/{len(wanted)} reviews")
        right = int((given == wanted).sum())
        return {"accuracy": 100.0 * right / reviews, "loss": nats / reviews, "reviews": reviews}, given

    def _forward(self, model: nn.Module, split: str, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        reviews = rows(self.data.ragged(split), batch, self.recipe.max_tokens)
        lengths = np.array([len(review) for review in reviews])
        logits = model(self.tensor(padded(reviews)), self.tensor(lengths))
        return logits, self.tensor(self.data.array(f"{split}.labels")[batch]), int(lengths.sum())

    def _lengths(self, split: str) -> np.ndarray:
        lengths = self.data.ragged(split).lengths
        return lengths if self.recipe.max_tokens is None else np.minimum(lengths, self.recipe.max_tokens)


@torch.no_grad()
def start_from_vectors(
    embedding: nn.Embedding, ids: torch.Tensor, vectors: torch.Tensor, unknown: str = "drawn"
) -> None:
    """Sets the words `ids` (K,) to `vectors` (K, n), and the others as `unknown` says; padding (row 0) is zero.

    "drawn": from torch's global generator, normal with the mean and the standard deviation of all numbers in `vectors`.
    "zero": zero.
    """
    if unknown == "zero":
        embedding.weight.zero_()
    else:
        embedding.weight.normal_(vectors.mean().item(), vectors.std().item())
    embedding.weight[0] = 0.0
    embedding.weight[ids] = vectors
