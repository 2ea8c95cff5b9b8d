"""Sequence classification (section 3.1). Axes: T time steps, B batch rows, m hidden size."""

import torch
from torch import Tensor, nn

from ..dropout import Dropout
from ..pooling.reference import steps_beyond
from ..stack import Stack


class Classifier(nn.Module):
    """Embeddings, a stack, and a linear layer on what `readout` makes of the last layer's output.

    Args:
        vocabulary_size, embedding_size: the embedding's shape; embedding_size must be the stack's input size.
        stack: of `qrnn.make_stack`, with batch_first=False.
        classes: number of logits.
        dropout: probability, on the embeddings and on the last output; dropout between layers is the stack's
            own.
        padding_index: the token that fills rows up; its embedding is 0 and stays so.
        readout: "last", the output at each row's last step; or over each row's steps its "mean" or "max".

    Raises:
        ValueError: a stack that does not fit, or an unknown readout; the message names argument, expected and got.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        stack: Stack,
        *,
        classes: int = 2,
        dropout: float = 0.0,
        padding_index: int = 0,
        readout: str = "last",
    ) -> None:
        super().__init__()
        if readout not in ("last", "mean", "max"):
            raise ValueError(f"readout: expected last, mean or max, got {readout!r}")
        self.readout = readout
        check_stack("stack", stack, embedding_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=padding_index)
        self.dropout = Dropout(dropout)
        self.stack = stack
        self.output = nn.Linear(stack.output_size, classes)

    @property
    def parameter_count(self) -> int:
        """Number of trained scalars."""
        return count_parameters(self)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (T, B) int64, of which row b has lengths[b] (int64)."""
        output, state = self.stack(self.dropout(self.embedding(tokens)), lengths=lengths)
        read = state.layers[-1].h if self.readout == "last" else over_time(output, lengths, self.readout)
        return self.output(self.dropout(read))

    def states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The last layer's c_t at every step, (T, B, m), as Figure 3 shows it; of an LSTM its output h_t."""
        (c, _), _ = self.stack(self.dropout(self.embedding(tokens)), lengths=lengths, split_last=True)
        return c


def over_time(h: Tensor, lengths: Tensor, how: str) -> Tensor:
    """The "mean" or "max", (B, m), over the first lengths[b] steps of each row of h (T, B, m), which is 0 beyond them.

    A row of no steps gives 0.
    """
    if how == "mean":
        return h.sum(0) / lengths.clamp(min=1).unsqueeze(-1)
    highest = h.masked_fill(steps_beyond(lengths, h.shape[0]), float("-inf")).amax(0)
    return torch.where((lengths > 0).unsqueeze(-1), highest, 0.0)


def check_stack(name: str, stack: Stack, embedding_size: int, *, one_way: bool = False) -> None:
    """Raises ValueError unless the stack reads embeddings of this size, time first and, if so asked, forwards only."""
    if stack.input_size != embedding_size:
        raise ValueError(f"{name}: expected input_size = embedding_size = {embedding_size}, got {stack.input_size}")
    if stack.batch_first:
        raise ValueError(f"{name}: expected batch_first=False, got True")
    if one_way and stack.output_size != stack.hidden_size:
        raise ValueError(f"{name}: expected bidirectional=False, got True")


def count_parameters(module: nn.Module) -> int:
    """Number of trained scalars, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
