"""The report's section on the time that the trials took, and that those which are missing would take."""

from collections.abc import Iterator
from typing import Any

from pipeline.report.tables import tried
from pipeline.report.text import grid, plain

Lines = list[str]
Row = dict[str, Any]


def section(scale: str, tables: dict[str, dict[str, Any]]) -> Lines:
    """Lines of the section; none where no trial has ended well."""
    rows = [(task, row) for task, table in tables.items() for row in table["models"] if tried(row) and not row["of"]]
    lines = [line for task, row in rows for line in _lines(task, row)]
    if not lines:
        return []
    heading = ["Model", "Device", "Trials", "Minutes a trial", "Minutes in all"]
    return [
        "## What the trials took", "",
        "Minutes of training of the trials that ended well, without validation, test and start-up; where there are"
        " several, their mean and from least to most. What ran beside them is not known.", "",
        *grid(heading, lines, left=(0, 1)), "",
        f"- {_in_all(rows)}",
        f"- {_missing(scale, rows)}", "",
    ]  # fmt: skip


def _lines(task: str, row: Row) -> Iterator[list[str]]:
    """Cells of a row's lines, one for each device."""
    for device, took in row["took"].items():
        spread = f" ({_minutes(took['min'])} to {_minutes(took['max'])})" if took["n"] > 1 else ""
        yield [f"{task}/{plain(row['model'])}", plain(device), str(took["n"]), _minutes(took["mean"]) + spread,
               _minutes(took["n"] * took["mean"])]  # fmt: skip


def _in_all(rows: list[tuple[str, Row]]) -> str:
    found = [took for _, row in rows for took in row["took"].values()]
    count, seconds = sum(took["n"] for took in found), sum(took["n"] * took["mean"] for took in found)
    return f"In all: {_count(count)}, {_minutes(seconds)} minutes ({seconds / 3600:.1f} h)."


def _missing(scale: str, rows: list[tuple[str, Row]]) -> str:
    """What the missing trials would take by those of their row; of a row without one that ended nothing is known."""
    missing = [(row, len(row["seeds"]["missing"])) for _, row in rows if row["seeds"]["missing"]]
    if not missing:
        return "No trial is missing."
    known = [(row, count) for row, count in missing if row["took"]]
    seconds = sum(count * max(took["mean"] for took in row["took"].values()) for row, count in known)
    parts = []
    if known:
        parts.append(
            f"{_count(sum(count for _, count in known))} more of these rows would take {_minutes(seconds)} minutes"
            f" ({seconds / 3600:.1f} h) at their row's mean, of two devices the slower"
        )
    if unknown := sum(count for row, count in missing if not row["took"]):
        parts.append(f"{_count(unknown)} are missing of rows of which none has ended")
    return f"Missing: {'; '.join(parts)}. `python -m pipeline cost --scale {scale}` projects all for one large GPU."


def _count(trials: int) -> str:
    return f"{trials} trial{'s' if trials != 1 else ''}"


def _minutes(seconds: float) -> str:
    """Minutes, with one decimal below ten."""
    return f"{seconds / 60:,.{1 if seconds < 600 else 0}f}"
