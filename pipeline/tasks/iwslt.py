"""IWSLT German-English translation by character (section 3.3): attention, beam search, BLEU."""

import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.tasks.base import (
    Metrics,
    Outputs,
    Shape,
    Step,
    Task,
    bucketed,
    by_length,
    by_positions,
    make_stack,
    negative_log_likelihood,
    padded,
    padded_shapes,
    rows,
)
from qrnn.models.beam import beam_search
from qrnn.models.seq2seq import Seq2Seq

PAD, BOS, EOS = 0, 2, 3  # ids that the processed data reserve
EVALUATION_POSITIONS = 4096  # of a batch, in its longer text; bounds the memory, changes no figure but for rounding
DECODING_BATCH = 32


class Iwslt(Task):
    criterion: ClassVar[str] = "bits_per_character"
    greater_is_better: ClassVar[bool] = False
    loss_unit: ClassVar[str] = "nats/character"
    item: ClassVar[str] = "target characters"

    def model(self) -> nn.Module:
        recipe = self.recipe
        encoder = make_stack(recipe, **self._encoder_options())
        decoder = make_stack(recipe, context_size=recipe.hidden, context_layers=recipe.context_layers)
        characters = len(self.data.json("vocabulary"))
        return Seq2Seq(
            characters,
            None,
            recipe.embedding,
            encoder,
            decoder,
            dropout=recipe.dropout,
            encoder_states=recipe.encoder_states,
            attentional=recipe.attentional,
        )

    def _encoder_options(self) -> dict:
        if self.recipe.family == "lstm":
            return {}
        recipe = self.recipe
        return {"kernel_size": recipe.encoder_kernel_size, "causal": False, "extra_padding": recipe.extra_padding}

    def steps_per_epoch(self) -> int:
        return -(-len(self.data.ragged("train.target")) // self.recipe.batch_size)

    def steps(self, model: nn.Module, order: np.random.Generator) -> Iterator[Step]:
        """Shuffled batches of pairs of like length."""
        for batch in self._batches(order):
            nats, characters = self._nats(model, "train", batch)
            per = len(batch) if self.recipe.loss_reduction == "sum" else characters
            yield Step(nats / per, nats.detach(), characters, characters)

    def shapes(self, order: np.random.Generator) -> list[Shape]:
        return self._shapes("train", self._batches(order))

    def evaluation_shapes(self, *, test: bool) -> list[Shape]:
        split = "test" if test else "dev"
        return self._shapes(split, self._scored(split))

    def decoding_shapes(self) -> list[Shape]:
        return self._shapes("test", self._decoded("test"))

    def _batches(self, order: np.random.Generator) -> list[np.ndarray]:
        return bucketed(self._longer("train"), self.recipe.batch_size, order)

    def _scored(self, split: str) -> list[np.ndarray]:
        return by_positions(self._longer(split), EVALUATION_POSITIONS)

    def _decoded(self, split: str) -> list[np.ndarray]:
        return by_length(self._lengths(split)[0], DECODING_BATCH)

    def _shapes(self, split: str, batches: list[np.ndarray]) -> list[Shape]:
        source, target = self._lengths(split)
        return padded_shapes(target, batches, source)

    def _longer(self, split: str) -> np.ndarray:
        """Steps of each pair's longer text: pairs alike in it leave less padding in both than pairs alike in one."""
        return np.maximum(*self._lengths(split))

    def _lengths(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps of each pair's source, and of its target with the mark that begins or ends it."""
        return self.data.ragged(f"{split}.source").lengths, self.data.ragged(f"{split}.target").lengths + 1

    def validate(self, model: nn.Module) -> Metrics:
        return self._bits(model, "dev")

    def test(self, model: nn.Module) -> tuple[Metrics, Outputs]:
        """Bits a character of the references, BLEU of the translations, and these."""
        translations = self.translate(model, "test")
        return {**self._bits(model, "test"), **self._bleu(translations, "test")}, translations

    @torch.inference_mode()
    def _bits(self, model: nn.Module, split: str) -> Metrics:
        """Bits a target character, the end of the sentence counted as one."""
        nats, characters = 0.0, 0
        for batch in self._scored(split):
            batch_nats, batch_characters = self._nats(model, split, batch)
            nats += batch_nats.item()
            characters += batch_characters
            self.tell(f"{split}: {characters} characters scored")
        return {"bits_per_character": nats / characters / math.log(2), "characters": characters}

    def _bleu(self, translations: list[str], split: str) -> Metrics:
        import sacrebleu  # only where a translation is scored

        references = self.data.lines(f"{split}.references")
        bleu = sacrebleu.BLEU(force=True)  # no warning where the text is tokenised already; the score is the same
        score = bleu.corpus_score(translations, [references])
        return {"bleu": score.score, "signature": str(bleu.get_signature()), "sentences": len(references)}

    @torch.inference_mode()
    def translate(self, model: nn.Module, split: str) -> list[str]:
        """Beam-searched translations of a split, in its order."""
        sources = self.data.ragged(f"{split}.source")
        vocabulary = self.data.json("vocabulary")
        translations, done = [""] * len(sources), 0
        for batch in self._decoded(split):
            source, lengths = self._source(f"{split}.source", batch)
            found = beam_search(
                model,
                source,
                lengths,
                bos=BOS,
                eos=EOS,
                width=self.recipe.beam_width,
                alpha=self.recipe.length_alpha,
                target_margin=self.recipe.target_margin,
            )
            for row, characters in zip(batch, found, strict=True):
                translations[row] = "".join(vocabulary[c] for c in characters if c > EOS)
            done += len(batch)
            self.tell(f"{split}: {done}/{len(sources)} sentences translated")
        return translations

    def _nats(self, model: nn.Module, split: str, batch: np.ndarray) -> tuple[torch.Tensor, int]:
        source, lengths = self._source(f"{split}.source", batch)
        target = rows(self.data.ragged(f"{split}.target"), batch)
        logits = model(source, lengths, self.tensor(padded(target, before=BOS)))
        wanted = self.tensor(padded(target, after=EOS))
        nats = negative_log_likelihood(logits.flatten(0, 1), wanted.flatten(), ignored=PAD)
        return nats, sum(len(row) + 1 for row in target)

    def _source(self, name: str, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        source = rows(self.data.ragged(name), batch)
        lengths = np.array([len(row) for row in source])
        if lengths.min() == 0:
            raise UserError(f"{self.data.folder}/{name}: expected at least one character in every row, found none")
        return self.tensor(padded(source)), self.tensor(lengths)
