"""Attentional encoder-decoder (section 2.1, eq. 7 and 8).

Axes: S source steps, T target steps, B batch rows, m hidden size, V target vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..dropout import Dropout
from ..layer import reverse_steps
from ..products import Linear
from ..stack import QRNN, Context, Stack, State, each_context
from .classifier import check_stack, count_parameters


class Memory(NamedTuple):
    """What the encoder leaves for the decoder."""

    keys: Tensor
    """(B, S, m) the encoder's last layer's states, h or c, in the order the encoder read them."""
    mask: Tensor
    """(B, S) bool, true at the steps that exist."""
    context: Context | None
    """For each decoder layer (B, m), eq. 7, or None; None in all for a family that starts from the encoder's state."""

    def index_select(self, rows: Tensor) -> "Memory":
        """The memory of rows `rows` (int64), repeats allowed."""
        context = each_context(self.context, lambda layer: layer.index_select(0, rows))
        return Memory(self.keys.index_select(0, rows), self.mask.index_select(0, rows), context)


class Seq2Seq(nn.Module):
    """Encoder over the reversed source, decoder with dot-product attention between its last state and output
    gate.

    Args:
        source_vocabulary_size, target_vocabulary_size: with target None there is one vocabulary and one
            embedding.
        embedding_size: width of the embeddings; both stacks' input size.
        encoder: stack that reads the source; for a QRNN built with causal=False.
        decoder: stack that writes the target; built with context_size = the encoder's hidden size. Both have
            the same number of layers and the same hidden size.
        dropout: probability, on the embeddings; between layers it is the stacks' own.
        encoder_states: which of the encoder's states stand for the tilde h of eq. 7 and 8: "h", the layers'
            outputs, as the text names them; or "c", before the output gate, as in the code that the authors
            published (for a QRNN only: nn.LSTM shows its c at the last step alone).
        attentional: what an LSTM decoder has where eq. 8 has the output gate, its own being inside the cell: "tanh"
            of the sum (Luong et al., 2015, eq. 5), or "linear", the sum alone, which the output layer could fold into
            its own weights. A QRNN's is gated and takes "linear" only.

    Raises:
        ValueError: stacks that do not fit; the message names argument, expected and got.
    """

    def __init__(
        self,
        source_vocabulary_size: int,
        target_vocabulary_size: int | None,
        embedding_size: int,
        encoder: Stack,
        decoder: Stack,
        *,
        dropout: float = 0.0,
        encoder_states: str = "h",
        attentional: str = "linear",
    ) -> None:
        super().__init__()
        if attentional not in ("linear", "tanh"):
            raise ValueError(f"attentional: expected linear or tanh, got {attentional!r}")
        if attentional == "tanh" and isinstance(decoder, QRNN):
            raise ValueError("attentional: expected linear with a decoder of QRNN, which eq. 8 gates, got 'tanh'")
        if encoder_states not in ("h", "c"):
            raise ValueError(f"encoder_states: expected h or c, got {encoder_states!r}")
        if encoder_states == "c" and not isinstance(encoder, QRNN):
            raise ValueError(f"encoder_states: expected h with an encoder of {type(encoder).__name__}, got 'c'")
        check_stack("encoder", encoder, embedding_size, one_way=True)
        check_stack("decoder", decoder, embedding_size, one_way=True)
        for name in ("num_layers", "hidden_size"):
            expected, got = getattr(encoder, name), getattr(decoder, name)
            if got != expected:
                raise ValueError(f"decoder: expected {name} = {expected} as the encoder, got {got}")
        self.source_embedding = nn.Embedding(source_vocabulary_size, embedding_size)
        if target_vocabulary_size is None:
            self.target_embedding = self.source_embedding
        else:
            self.target_embedding = nn.Embedding(target_vocabulary_size, embedding_size)
        self.encoder, self.decoder, self.encoder_states = encoder, decoder, encoder_states
        self.attentional = attentional
        self.dropout = Dropout(dropout)
        size = encoder.hidden_size
        self.attended = Linear(size, size, bias=False)  # W_k of eq. 8
        self.direct = Linear(size, size, bias=False)  # W_c of eq. 8
        self.output = Linear(size, self.target_embedding.num_embeddings)

    @property
    def parameter_count(self) -> int:
        """Number of trained scalars."""
        return count_parameters(self)

    def forward(self, source: Tensor, source_lengths: Tensor, target_in: Tensor) -> Tensor:
        """Logits (T, B, V) of each next target token.

        Args:
            source: (S, B) int64, rows filled up with any token beyond their length.
            source_lengths: (B,) int64, each in [1, S].
            target_in: (T, B) int64, the target shifted right: it begins with the begin-of-sequence token.
        """
        memory, state = self.encode(source, source_lengths)
        return self.decode(target_in, memory, state)[0]

    def encode(self, source: Tensor, source_lengths: Tensor) -> tuple[Memory, State | None]:
        """(memory, the decoder's first state). Each row of the source is read backwards from its own end."""
        x = self.dropout(self.source_embedding(reverse_steps(source, source_lengths)))
        if self.encoder_states == "h":
            keys, encoder_state = self.encoder(x, lengths=source_lengths)
        else:
            (keys, _), encoder_state = self.encoder(x, lengths=source_lengths, split_last=True)
            encoder_state = encoder_state.ungated()
        state, context = self.decoder.start(encoder_state)
        mask = torch.arange(source.shape[0], device=source.device) < source_lengths.unsqueeze(-1)
        return Memory(self._exact(keys.transpose(0, 1)).contiguous(), mask, context), state

    def decode(self, target_in: Tensor, memory: Memory, state: State | None) -> tuple[Tensor, State]:
        """(logits (T, B, V), state) of the next target_in (T, B) int64, any T >= 1.

        B may be a multiple of the memory's rows, those of one source side by side, as hypotheses of a beam are: so
        the keys need no copies.

        Attention and output layer are in the weights' precision, under autocast too: rounded, scores of about 50 are
        a quarter apart, and logits of different characters the same.

        Raises:
            ValueError: B is no multiple of the memory's rows.
        """
        x = self.dropout(self.target_embedding(target_in))
        sources = memory.keys.shape[0]
        if target_in.shape[1] % max(sources, 1):
            raise ValueError(f"target_in: expected a multiple of the memory's {sources} rows, got {target_in.shape[1]}")
        beam, context = target_in.shape[1] // max(sources, 1), memory.context
        if beam > 1:
            context = each_context(context, lambda layer: layer.repeat_interleave(beam, dim=0))
        (c, o), state = self.decoder(x, state, context=context, split_last=True)
        with torch.autocast(c.device.type, enabled=False):
            c = self._exact(c)
            h = self.attended(attend(c, memory.keys, memory.mask)) + self.direct(c)
            if o is not None:
                h = self._exact(o) * h
            elif self.attentional == "tanh":
                h = h.tanh()
            return self.output(h), state

    def _exact(self, x: Tensor) -> Tensor:
        """x in the weights' precision."""
        return x.to(self.output.weight.dtype)

    def decode_step(self, tokens: Tensor, memory: Memory, state: State | None) -> tuple[Tensor, State]:
        """(logits (B, V), state) after one more token (B,) int64 of each row."""
        logits, state = self.decode(tokens.unsqueeze(0), memory, state)
        return logits[0], state


def attend(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """Dot-product attention: k_t = sum over s of softmax_s(c_t . h_s) h_s (eq. 8).

    Args:
        queries: (T, B, m), the decoder's last layer before its output gate. keys: (N, S, m) with B a multiple of
            N, the queries of one row of keys side by side. mask: (N, S) bool, true at source steps that exist; each
            row needs one.

    Returns:
        (T, B, m).
    """
    steps, rows, size = queries.shape
    sources = keys.shape[0]
    asked = queries.transpose(0, 1).reshape(sources, rows // max(sources, 1) * steps, size)
    scores = torch.bmm(asked, keys.transpose(1, 2))
    weights = scores.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.bmm(weights.to(keys.dtype), keys).view(rows, steps, size).transpose(0, 1)


def pad_rows(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """(tokens (T, B) int64 filled up with `padding`, lengths (B,) int64) of lists of tokens."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((int(lengths.max()), len(rows)), padding, dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[: len(row), b] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths
