"""Beam search with the paper's ranking (appendix, eq. 9).

Axes: S source steps, N sentences, W beam width, A sentences still searched, V target vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .seq2seq import Seq2Seq

Ended = tuple[int, int, float]  # (sentence, parent in the beam, log-probability)


def length_factor(length: int, target_length: int, alpha: float) -> float:
    """Product over j = length .. target_length of (j + alpha) / j, by which eq. 9 multiplies the
    log-probability.

    1 beyond the target length, where the product is empty; 1 at alpha = 0 (eq. 10); (target_length + 1) /
    length at alpha = 1 (eq. 11). length counts output tokens, the end token included, and is at least 1.
    """
    return math.prod((j + alpha) / j for j in range(length, target_length + 1))


@dataclass
class _Sentence:
    """What is known of one sentence: its limits and its finished hypotheses, apart from the live beam."""

    target_length: int
    max_length: int
    alpha: float
    finished: int = 0
    best_score: float = -math.inf
    best: list[int] = field(default_factory=list)
    ended: bool = False  # whether `best` ends with the end token

    def finish(self, tokens: list[int], log_probability: float, length: int) -> None:
        """Enters a hypothesis of `length` tokens, the end token included though not among `tokens`."""
        score = length_factor(length, self.target_length, self.alpha) * log_probability
        self.finished += 1
        if not self.ended or score > self.best_score:
            self.best_score, self.best, self.ended = score, tokens, True

    def done(self, live: float, length: int, width: int) -> bool:
        """Whether the search ends, given the best live log-probability at `length` tokens."""
        if length >= self.max_length or live == -math.inf:
            return True
        if not self.ended:
            return False
        attainable = live * length_factor(self.max_length, self.target_length, self.alpha)
        if self.best_score >= attainable:
            return True
        now = live * length_factor(length, self.target_length, self.alpha)
        return self.finished >= width and self.best_score >= now


def beam_search(
    model: Seq2Seq,
    source: Tensor,
    source_lengths: Tensor,
    *,
    bos: int,
    eos: int,
    width: int = 8,
    alpha: float = 0.6,
    target_margin: int = 5,
    max_length: int | None = None,
) -> list[list[int]]:
    """The best target of each source sentence under eq. 9, as lists of tokens without bos and eos.

    Each step extends every live hypothesis by every token. Among the best `width` extensions those that end
    with eos are finished and set apart; the best `width` others live on. A sentence's search ends when (a) no
    live hypothesis can overtake the best finished one, its log-probability only falling and its factor never
    falling below the one at max_length; or (b) `width` hypotheses are finished and the best of them ranks
    above every live one by eq. 9 as it stands; or (c) max_length is reached. Width 1 is greedy search. (a)
    and (c) lose nothing, (b) bounds the work.

    Args:
        model: a Seq2Seq (put it into evaluation mode first).
        source: (S, N) int64; source_lengths: (N,) int64, as the model takes them.
        bos, eos: the tokens that begin and end a target.
        width: live hypotheses per sentence, at least 1.
        alpha: length normalisation of eq. 9, at least 0.
        target_margin: what the target length of eq. 9 is longer than the source, in tokens, at least 0; the
            paper has 5.
        max_length: most output tokens, eos included; twice the target length if None. A sentence with nothing
            finished by then gives its best live hypothesis.

    Raises:
        ValueError: width, alpha, target_margin or max_length out of range.
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    if alpha < 0:
        raise ValueError(f"alpha: expected at least 0, got {alpha}")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected at least 1 or None, got {max_length}")
    if target_margin < 0:
        raise ValueError(f"target_margin: expected at least 0, got {target_margin}")
    targets = [int(length) + target_margin for length in source_lengths.tolist()]
    sentences = [_Sentence(target, max_length or 2 * target, alpha) for target in targets]
    if sentences:
        with torch.inference_mode():
            _search(model, source, source_lengths, sentences, bos, eos, width)
    return [sentence.best for sentence in sentences]


def _search(
    model: Seq2Seq,
    source: Tensor,
    source_lengths: Tensor,
    sentences: list[_Sentence],
    bos: int,
    eos: int,
    width: int,
) -> None:
    memory, state = model.encode(source, source_lengths)
    count, device = len(sentences), source.device
    repeated = torch.arange(count, device=device).repeat_interleave(width)
    state = None if state is None else state.index_select(repeated)  # the memory, of the sources, needs no copies
    searched = list(range(count))
    scores = torch.full((count, width), -math.inf, device=device)
    scores[:, 0] = 0.0  # the beam's rows are the same at first: one of them is enough
    tokens = torch.full((count, width, 1), bos, dtype=torch.int64, device=device)
    length = 0
    while searched:
        length += 1
        logits, state = model.decode_step(tokens[:, :, -1].reshape(-1), memory, state)
        scores, parents, added, ended = _extend(logits, scores, eos)
        _set_apart(ended, tokens, [sentences[index] for index in searched], length)
        tokens = torch.cat(
            [tokens.gather(1, parents.unsqueeze(-1).expand(-1, -1, length)), added.unsqueeze(-1)], dim=-1
        )
        rows = torch.arange(len(searched), device=device).unsqueeze(-1) * width + parents
        best_live = scores[:, 0].tolist()
        going = [a for a, index in enumerate(searched) if not sentences[index].done(best_live[a], length, width)]
        for a in set(range(len(searched))) - set(going):
            if not sentences[searched[a]].ended:
                sentences[searched[a]].best = tokens[a, 0, 1:].tolist()
        if len(going) < len(searched):
            kept = torch.tensor(going, dtype=torch.int64, device=device)
            searched = [searched[a] for a in going]
            scores, tokens, rows = scores[kept], tokens[kept], rows[kept]
            memory = memory.index_select(kept)
        state = state.index_select(rows.reshape(-1))


def _extend(logits: Tensor, scores: Tensor, eos: int) -> tuple[Tensor, Tensor, Tensor, list[Ended]]:
    """One step of every beam.

    Args:
        logits: (A * W, V). scores: (A, W) log-probabilities of the live hypotheses, -inf where there is none.

    Returns:
        (scores (A, W) best first, parents (A, W), tokens (A, W)) of the hypotheses that live on, and a list
        of (sentence, parent, log-probability) of those that end. All live hypotheses of a sentence are
        equally long, so eq. 9 ranks them as their log-probabilities do.
    """
    count, width = scores.shape
    log_probabilities = logits.float().log_softmax(-1).view(count, width, -1)
    vocabulary = log_probabilities.shape[-1]
    extended = (scores.unsqueeze(-1) + log_probabilities).view(count, -1)
    best, flat = extended.topk(min(2 * width, extended.shape[1]), dim=-1)
    parents, tokens = flat // vocabulary, flat % vocabulary
    ends = tokens == eos
    first = (ends & (best > -math.inf))[:, :width].nonzero().tolist()
    ended = [(a, int(parents[a, place]), float(best[a, place])) for a, place in first]
    # At most `width` of the 2 * width best end, so a stable sort by "ends" leaves `width` that do not in
    # front.
    order = ends.to(torch.int8).sort(dim=-1, stable=True).indices[:, :width]
    return best.gather(1, order), parents.gather(1, order), tokens.gather(1, order), ended


def _set_apart(ended: list[Ended], tokens: Tensor, sentences: list[_Sentence], length: int) -> None:
    for a, parent, log_probability in ended:
        sentences[a].finish(tokens[a, parent, 1:].tolist(), log_probability, length)
