"""Language model (section 3.2). Axes: T time steps, B batch rows, V vocabulary."""

from torch import Tensor, nn

from ..products import Linear
from ..stack import Stack, State
from .classifier import check_stack, count_parameters


class LanguageModel(nn.Module):
    """Embeddings, a stack, and a softmax layer over the vocabulary, with state carried across windows.

    Args:
        vocabulary_size, embedding_size: the embedding's shape; embedding_size must be the stack's input size.
        stack: of `qrnn.make_stack`, with batch_first=False.
        dropout: probability, on the embeddings and on the last layer's output (Zaremba et al., 2014); between
            layers it is the stack's own.
        tied: the softmax layer's weight is the embedding's; then hidden and embedding size must be equal.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        stack: Stack,
        *,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        check_stack("stack", stack, embedding_size, one_way=True)
        if tied and stack.hidden_size != embedding_size:
            raise ValueError(f"tied: expected hidden_size = embedding_size = {embedding_size}, got {stack.hidden_size}")
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.output = Linear(stack.hidden_size, vocabulary_size)
        if tied:
            self.output.weight = self.embedding.weight

    @property
    def parameter_count(self) -> int:
        """Number of trained scalars."""
        return count_parameters(self)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(logits (T, B, V) of each next token, state) of tokens (T, B) int64.

        `state` is what the previous window returned (detach it to truncate backpropagation); None is the
        beginning.
        """
        output, state = self.stack(self.dropout(self.embedding(tokens)), state)
        return self.output(self.dropout(output)), state
