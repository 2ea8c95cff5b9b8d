"""Penn Treebank language modelling by word (section 3.2): one stream, truncated backpropagation, perplexity."""

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.tasks.base import Metrics, Outputs, Shape, Step, Task, make_stack, negative_log_likelihood
from qrnn import State
from qrnn.layer import scaled_zoneout
from qrnn.models.language_model import LanguageModel
from qrnn.variational import sampled_masks

VALIDATION_STREAMS = 20
CHUNK = 256  # timesteps scored at once in evaluation; bounds the logits in memory, changes no figure
DECIMALS = 4  # of a sentence's nats, as they are recorded
MC_ROWS = 256  # sampled masks side by side
MC_PREDICTIONS = 4096  # of all of them, scored at once; bounds the logits in memory, changes no figure


class Ptb(Task):
    criterion: ClassVar[str] = "perplexity"
    greater_is_better: ClassVar[bool] = False
    loss_unit: ClassVar[str] = "nats/token"
    item: ClassVar[str] = "tokens"

    def model(self) -> nn.Module:
        stack = make_stack(self.recipe)
        words = len(self.data.json("vocabulary"))
        names = ("dropout", "tied", "word_dropout")
        options = {name: getattr(self.recipe, name) for name in names}
        return LanguageModel(words, self.recipe.embedding, stack, **options)

    def steps_per_epoch(self) -> int:
        length = len(self.data.array("train")) // self.recipe.batch_size
        return math.ceil(length / self.recipe.unroll)

    def steps(self, model: nn.Module, order: np.random.Generator) -> Iterator[Step]:
        """Windows in the order of the text; the state is carried from one to the next, detached."""
        state = None
        for inputs, targets in self._windows("train", self.recipe.batch_size, self.recipe.unroll):
            logits, state = model(inputs, state)
            state = self._carried(state.detach().clone())  # a replayed CUDA graph writes over its outputs
            nats = negative_log_likelihood(logits.flatten(0, 1), targets.flatten())
            # The paper's learning rate, clipping and penalty are for a loss summed over time (Zaremba et al., 2014).
            per = self.recipe.batch_size if self.recipe.loss_reduction == "sum" else targets.numel()
            yield Step(nats / per, nats.detach(), targets.numel(), targets.numel())

    def shapes(self, order: np.random.Generator) -> list[Shape]:
        return windows(len(self.data.array("train")), self.recipe.batch_size, self.recipe.unroll)

    def evaluation_shapes(self, *, test: bool) -> list[Shape]:
        split, streams = ("test", 1) if test else ("valid", VALIDATION_STREAMS)
        readings = 2 if self._has_two_readings else 1
        return readings * windows(len(self.data.array(split)), streams, self._scored_steps)

    def sampled_shapes(self) -> list[Shape]:
        tokens = len(self.data.array("test"))
        groups = mc_rows(self.recipe.mc_samples or 0)
        return [shape for rows in groups for shape in windows(rows * tokens, rows, mc_steps(rows))]

    def validate(self, model: nn.Module) -> Metrics:
        """Perplexity of the text in `VALIDATION_STREAMS` streams; and `perplexity_scaled`, as in `test`."""
        return self._read(model, "valid", VALIDATION_STREAMS)[0]

    def test(self, model: nn.Module) -> tuple[Metrics, Outputs]:
        """Test perplexity with the text as one stream, so that every token is scored with its whole history.

        With `mc_samples` also `perplexity_mc`: of each token's probability averaged over as many sampled masks. Of a
        QRNN with zoneout that evaluation leaves out of account also `perplexity_scaled`: with the forget gate's
        expectation, the other reading of section 2.1.
        The outputs are the nats of each sentence, its <eos> among them, to `DECIMALS` places.
        """
        metrics, nats = self._read(model, "test", 1)
        if self.recipe.mc_samples is not None:
            averaged = self._averaged_nats(model, "test", self.recipe.mc_samples)
            metrics |= {"perplexity_mc": self._perplexity(averaged)["perplexity"], "mc_samples": self.recipe.mc_samples}
        return metrics, self._by_sentence(nats, "test")

    @property
    def _has_two_readings(self) -> bool:
        recipe = self.recipe
        return recipe.family == "qrnn" and recipe.zoneout > 0 and recipe.zoneout_evaluation == "none"

    def _read(self, model: nn.Module, split: str, streams: int) -> tuple[Metrics, torch.Tensor]:
        """The metrics of a split, and the nats of each of its tokens."""
        nats = self._nats(model, split, streams)
        metrics = self._perplexity(nats)
        if self._has_two_readings:
            with scaled_zoneout(model):
                metrics["perplexity_scaled"] = self._perplexity(self._nats(model, split, streams))["perplexity"]
        return metrics, nats

    def _perplexity(self, nats: torch.Tensor) -> Metrics:
        return {"perplexity": perplexity(nats.double().mean().item()), "tokens": nats.numel()}

    def _by_sentence(self, nats: torch.Tensor, split: str) -> list[float]:
        """Sums of nats (tokens,) over the sentences of a split, each of which ends with <eos>."""
        ends = np.asarray(self.data.array(split)) == self._eos
        starts = np.flatnonzero(np.concatenate([[True], ends[:-1]]))
        return np.add.reduceat(nats.double().cpu().numpy(), starts).round(DECIMALS).tolist()

    @torch.inference_mode()
    def _nats(self, model: nn.Module, split: str, streams: int) -> torch.Tensor:
        """Negative log-likelihood of each token that is scored, (tokens,) float32, window by window."""
        state, found, tokens = None, [], 0
        for inputs, targets in self._windows(split, streams, self._scored_steps):
            logits, state = model(inputs, state)
            state = self._carried(state)
            found.append(negative_log_likelihood(logits.flatten(0, 1), targets.flatten(), reduction="none"))
            tokens += targets.numel()
            self.tell(f"{split}: {tokens}/{len(self.data.array(split))} tokens")
        return torch.cat(found)

    @torch.inference_mode()
    def _averaged_nats(self, model: nn.Module, split: str, samples: int) -> torch.Tensor:
        """(tokens,) float64: minus the log of each token's probability, averaged over sampled dropout masks.

        MC dropout of Gal and Ghahramani (2016), as their published code has it: probabilities are averaged, not their
        logarithms; a sample keeps its masks for the whole text, read as one stream; no word is dropped. The samples are
        rows of a batch.
        """
        total = torch.zeros(len(self.data.array(split)), dtype=torch.float64, device=self.device)
        for rows in mc_rows(samples):
            with sampled_masks(model):
                state, start = None, 0
                for inputs, targets in self._windows(split, 1, mc_steps(rows)):
                    logits, state = model(inputs.expand(-1, rows), state)
                    logs = logits.float().log_softmax(-1).gather(-1, targets.expand(-1, rows).unsqueeze(-1))
                    total[start : start + len(targets)] += logs.double().exp().sum((1, 2))
                    start += len(targets)
                    self.tell(f"{split}, {rows} of {samples} sampled masks: {start}/{len(total)} tokens")
        return -(total / samples).log()

    @property
    def _eos(self) -> int:
        return self.data.json("vocabulary").index("<eos>")

    @property
    def _scored_steps(self) -> int:
        """Of a window in evaluation; where it loses its inputs its length counts, and is the same as in training."""
        return CHUNK if self.recipe.window_inputs == "carry" else self.recipe.unroll

    def _carried(self, state: State) -> State:
        """What the next window begins with."""
        return state if self.recipe.window_inputs == "carry" else state.without_inputs()

    def _windows(self, split: str, streams: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets (T, B): the text cut into `streams` columns, each token predicted from the one before it.

        The token before the first is <eos>. Tokens that do not fill the last row are left out.
        """
        text = self.data.array(split)
        length = len(text) // streams
        before = np.concatenate([[self._eos], text[:-1]])
        inputs = self.tensor(before[: length * streams].reshape(streams, length).T)
        targets = self.tensor(np.asarray(text[: length * streams]).reshape(streams, length).T)
        for start in range(0, length, steps):
            yield inputs[start : start + steps], targets[start : start + steps]


def mc_rows(samples: int) -> list[int]:
    """The samples in groups that are run side by side."""
    return [min(MC_ROWS, samples - first) for first in range(0, samples, MC_ROWS)]


def mc_steps(rows: int) -> int:
    """Timesteps of a window with so many samples side by side."""
    return max(1, MC_PREDICTIONS // rows)


def windows(tokens: int, streams: int, unroll: int) -> list[Shape]:
    """The shapes of the windows that a text cut into `streams` columns is read in; none is padded."""
    length = tokens // streams
    steps = [min(unroll, length - start) for start in range(0, length, unroll)]
    return [Shape(streams, count, filled=streams * count) for count in steps]


def perplexity(nats: float) -> float:
    """e to the mean negative log-likelihood in nats; infinite where that is beyond a double."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
