"""Pieces of Markdown."""

import html
from collections.abc import Sequence
from typing import Any


def plain(value: str) -> str:
    """Any text, harmless in a table cell and in Markdown, on one line."""
    escaped = html.escape(" ".join(value.split()), quote=False)
    for character in "\\`*_[]|~$":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def code(value: str) -> str:
    """A code span on one line."""
    return f"`{' '.join(value.split()).replace('`', chr(39))}`"


def grid(heading: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table; columns are right-aligned but those in `left`. Cells hold no bare `|`."""
    rule = [":---" if i in left else "---:" for i in range(len(heading))]
    return [f"| {' | '.join(cells)} |" for cells in (heading, rule, *rows)]


def shown(value: Any) -> str:
    """A parameter's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value)).join("[]")
    return "none" if value is None else str(value)


def superscript(marks: Sequence[str]) -> str:
    return f"<sup>{' '.join(marks)}</sup>" if marks else ""


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ...; without t, which marks times."""
    letters = "abcdefghijklmnopqrsuvwxyz"
    return (letter(index // len(letters) - 1) if index >= len(letters) else "") + letters[index % len(letters)]


def capital(value: str) -> str:
    return value[:1].upper() + value[1:]


def small(value: str) -> str:
    return value[:1].lower() + value[1:]


def joined(items: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
