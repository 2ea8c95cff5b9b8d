"""The one place where a family of stacks is chosen by name."""

import inspect
from typing import Any

from .lstm import LSTM
from .stack import QRNN, Stack
from .variational import VariationalLSTM

FAMILIES: dict[str, type[Stack]] = {"qrnn": QRNN, "lstm": LSTM, "variational": VariationalLSTM}


def make_stack(family: str, input_size: int, hidden_size: int, num_layers: int, **options: Any) -> Stack:
    """A stack of the family "qrnn", "lstm" or "variational".

    Args:
        family: a name in `FAMILIES`.
        input_size, hidden_size, num_layers: as for `qrnn.QRNN`.
        options: keywords of any family. One that this family does not have is accepted at its default, where
            it asks for nothing, and refused otherwise.

    Raises:
        ValueError: an unknown family or option, or an option that this family does not have.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    known = {name: default for kind in FAMILIES.values() for name, default in _options(kind).items()}
    own = _options(FAMILIES[family])
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name}: expected one of the options {', '.join(sorted(known))}, got an unknown name")
        if name not in own and value != known[name]:
            raise ValueError(
                f"{name}: expected {known[name]!r} (the family {family!r} has no such option), got {value!r}"
            )
    return FAMILIES[family](
        input_size, hidden_size, num_layers, **{name: value for name, value in options.items() if name in own}
    )


def _options(kind: type[Stack]) -> dict[str, object]:
    """The keyword-only arguments of a family and their defaults."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
