"""From plain YAML values to frozen dataclasses: unknown, missing, ill-typed and out-of-range values are refused."""

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Between:
    """Bounds of a number: `low <= value <= high`; the first is `<` where `above`, the second where `below`."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        high_enough = self.low < value if self.above else self.low <= value
        return high_enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.below else 'at most'} {self.high:g}"


Count = Annotated[int, Between(1)]
Natural = Annotated[int, Between(0)]
Probability = Annotated[float, Between(0, 1, below=True)]
Share = Annotated[float, Between(0, 1)]
NonNegative = Annotated[float, Between(0)]
Positive = Annotated[float, Between(0, above=True)]


def build(kind: type[T], value: Any, where: str) -> T:
    """Makes a `kind` (dataclass, number, text, Literal, tuple, dict, optional) of a plain value.

    Raises:
        UserError: naming the parameter (`where`), what was expected and what came.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1], value, where)
    if origin is Literal:
        return value if value in arguments else _refuse(where, " or ".join(map(str, arguments)), value)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else _refuse(where, "a list", value)
        return tuple(build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        items = value if isinstance(value, dict) else _refuse(where, "a mapping", value)
        return {str(key): build(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    return _scalar(kind, value, where)


def defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a dataclass, by the names of the fields that have one."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _refuse(where, "a mapping", value)
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise UserError(f"{where}.{name}: unknown parameter; expected one of {', '.join(fields)}")
    for name, field in fields.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{name}: missing; expected {_describe(hints[name])}")
    made = {name: build(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _bounded(kind: Any, bounds: Between, value: Any, where: str) -> Any:
    expected = f"{_describe(kind)} {bounds}"
    number = _scalar(kind, value, where, expected)
    return number if number in bounds else _refuse(where, expected, value)


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    # The one that the value's form asks for: what it lacks is the error to be told.
    is_list = isinstance(value, list | tuple)
    others = [option for option in options if option is not types.NoneType]
    of_form = [option for option in others if (typing.get_origin(option) is tuple) == is_list] or others
    for option in of_form[:-1]:
        try:
            return build(option, value, where)
        except UserError:
            continue
    return build(of_form[-1], value, where)


def _scalar(kind: Any, value: Any, where: str, expected: str | None = None) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # a whole number beyond all floats
            if math.isfinite(value):
                return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    return _refuse(where, expected or _describe(kind), value, kind is float)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Annotated:
        base, bounds = typing.get_args(kind)
        return f"{_describe(base)} {bounds}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(kind).replace("typing.", ""))


def _refuse(where: str, expected: str, value: Any, is_number: bool = False) -> Any:
    hint = ""
    if is_number and isinstance(value, str):
        with contextlib.suppress(ValueError):
            hint = f" (text: write {float(value)!r} with a dot and a signed exponent, as YAML wants)"
    raise UserError(f"{where}: expected {expected}, got {value!r}{hint}")
