"""IMDB sentiment classification (section 3.1): densely connected stack, last state, accuracy."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.tasks.base import Metrics, Step, Task, bucketed, by_length, make_stack, padded, rows
from qrnn.models.classifier import Classifier

EVALUATION_BATCH = 128


class Imdb(Task):
    criterion: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    loss_unit: ClassVar[str] = "nats/review"
    item: ClassVar[str] = "tokens"

    def model(self) -> nn.Module:
        stack = make_stack(self.recipe, dense=self.recipe.dense)
        words = len(self.data.json("vocabulary"))
        model = Classifier(words, self.recipe.embedding, stack, dropout=self.recipe.dropout)
        if "embeddings.npy" in self.data.manifest["files"]:
            vectors = torch.from_numpy(np.array(self.data.array("embeddings")))
            model.embedding.weight.data.copy_(vectors)
        return model

    def steps_per_epoch(self) -> int:
        return -(-len(self.data.array("train.labels")) // self.recipe.batch_size)

    def steps(self, model: nn.Module, order: np.random.Generator) -> Iterator[Step]:
        """Shuffled batches of reviews of like length."""
        for batch in bucketed(self._lengths("train"), self.recipe.batch_size, order):
            logits, labels, tokens = self._forward(model, "train", batch)
            nats = F.cross_entropy(logits, labels, reduction="sum")
            yield Step(nats / len(batch), nats.detach(), len(batch), tokens)

    def validate(self, model: nn.Module) -> Metrics:
        return self._accuracy(model, "dev")

    def test(self, model: nn.Module) -> Metrics:
        return self._accuracy(model, "test")

    @torch.inference_mode()
    def _accuracy(self, model: nn.Module, split: str) -> Metrics:
        right, nats, reviews = 0, 0.0, 0
        for batch in by_length(self._lengths(split), EVALUATION_BATCH):
            logits, labels, _ = self._forward(model, split, batch)
            right += int((logits.argmax(-1) == labels).sum())
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            reviews += len(batch)
        return {"accuracy": 100.0 * right / reviews, "loss": nats / reviews, "reviews": reviews}

    def _forward(self, model: nn.Module, split: str, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        reviews = rows(self.data.ragged(split), batch, self.recipe.max_tokens)
        lengths = np.array([len(review) for review in reviews])
        logits = model(self.tensor(padded(reviews)), self.tensor(lengths))
        return logits, self.tensor(self.data.array(f"{split}.labels")[batch]), int(lengths.sum())

    def _lengths(self, split: str) -> np.ndarray:
        lengths = self.data.ragged(split).lengths
        return lengths if self.recipe.max_tokens is None else np.minimum(lengths, self.recipe.max_tokens)
