"""Dropout, and the random masks of dropout and zoneout, drawn in 16 bits an element."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def chosen(shape: torch.Size, probability: float, device: torch.device) -> Tensor | None:
    """Bool of a shape, each element true with a probability in [0, 1), to 1.5e-5; None for probability 0.

    Sixteen random bits an element, four elements to a 64-bit draw from torch's generator: on a CPU torch.bernoulli
    takes eight times as long.
    """
    if probability == 0:
        return None
    count = shape.numel()
    # One value in 2^64 is never drawn; Tensor.random_ has it, but torch.compile does not trace that.
    words = torch.randint(-(2**63), 2**63 - 1, ((count + 3) // 4,), dtype=torch.int64, device=device)
    threshold = min(max(1, round(probability * 2**16)), 2**16 - 1)
    return (words.view(torch.int16)[:count] < threshold - 2**15).view(shape)


class Dropout(nn.Module):
    """As nn.Dropout: in training each element is 0 with probability p, the others are divided by 1 - p.

    On a CPU torch's own draws its mask one element at a time, which was a seventh of a training step of PTB's models;
    elsewhere, and under torch.compile, it is torch's own.

    Args:
        p: in [0, 1).

    Raises:
        ValueError: p out of range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape with elements dropped; x itself in evaluation and for p = 0."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        dropped = chosen(x.shape, self.p, x.device) if self.training else None
        return x if dropped is None else x * dropped.logical_not_().to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
