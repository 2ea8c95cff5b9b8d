"""Sequence classification (section 3.1). Axes: T time steps, B batch rows, m hidden size."""

from torch import Tensor, nn

from ..stack import Stack


class Classifier(nn.Module):
    """Embeddings, a stack, and a linear layer on the last layer's output at each row's last step.

    Args:
        vocabulary_size, embedding_size: the embedding's shape; embedding_size must be the stack's input size.
        stack: of `qrnn.make_stack`, with batch_first=False.
        classes: number of logits.
        dropout: probability, on the embeddings and on the last output; dropout between layers is the stack's
            own.
        padding_index: the token that fills rows up; its embedding is 0 and stays so.
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
    ) -> None:
        super().__init__()
        check_stack("stack", stack, embedding_size)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size, padding_idx=padding_index)
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.output = nn.Linear(stack.output_size, classes)

    @property
    def parameter_count(self) -> int:
        """Number of trained scalars."""
        return count_parameters(self)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (T, B) int64, of which row b has lengths[b] (int64)."""
        _, state = self.stack(self.dropout(self.embedding(tokens)), lengths=lengths)
        return self.output(self.dropout(state.layers[-1].h))

    def states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The last layer's c_t at every step, (T, B, m), as Figure 3 shows it; of an LSTM its output h_t."""
        (c, _), _ = self.stack(self.dropout(self.embedding(tokens)), lengths=lengths, split_last=True)
        return c


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
