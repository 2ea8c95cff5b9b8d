"""Language model (section 3.2). Axes: T time steps, B batch rows, V vocabulary."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..products import Linear
from ..stack import Stack, State
from .classifier import check_stack, count_parameters


class LanguageModel(nn.Module):
    """Embeddings, a stack, and a softmax layer over the vocabulary, with state carried across windows.

    Args:
        vocabulary_size, embedding_size: the embedding's shape; embedding_size must be the stack's input size.
        stack: of `qrnn.make_stack`, with batch_first=False.
        dropout: probability, on the embeddings and on the last layer's output (Zaremba et al., 2014), with masks
            as the stack makes them between its layers; the probability there is the stack's own.
        tied: the softmax layer's weight is the embedding's; then hidden and embedding size must be equal.
        word_dropout: probability that a word's embedding is 0 wherever the word is read (see `WordDropout`).
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        stack: Stack,
        *,
        dropout: float = 0.0,
        tied: bool = False,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_stack("stack", stack, embedding_size, one_way=True)
        if tied and stack.hidden_size != embedding_size:
            raise ValueError(f"tied: expected hidden_size = embedding_size = {embedding_size}, got {stack.hidden_size}")
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.word_dropout = WordDropout(word_dropout)
        self.input_dropout, self.output_dropout = (stack.make_dropout(dropout) for _ in range(2))
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
        x = self.word_dropout(self.embedding(tokens), tokens, self.embedding.num_embeddings)
        output, state = self.stack(self.input_dropout(x), state)
        return self.output(self.output_dropout(output)), state


class WordDropout(nn.Module):
    """Dropout of word types: of rows of the embedding matrix, drawn once a call and row (Gal and Ghahramani, 2016).

    A dropped word's embedding is 0 at every step at which the row has the word; what is kept is divided by 1 - p. In
    evaluation nothing is dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"word_dropout: expected a probability in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor, tokens: Tensor, vocabulary_size: int) -> Tensor:
        """x (T, B, n), the embeddings of tokens (T, B) int64, after dropout."""
        if not (self.training and self.p):
            return x
        kept = F.dropout(x.new_ones((vocabulary_size, tokens.shape[1])), self.p)
        return x * kept.gather(0, tokens).unsqueeze(-1)
