"""A short reading of the tables in words; every figure in it is computed."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.report import layout as layouts
from pipeline.report.layout import Column
from pipeline.report.text import capital, joined, small

Row = dict[str, Any]


def sentences(table: dict[str, Any], layout: layouts.Layout, comparable: bool) -> list[str]:
    """What a task's figures say: models beside the floors, then beside each other; empty while nothing is done."""
    columns = [layout.column(path) for path in layout.headlines]
    said = [
        sentence
        for column in columns
        for sentence in (*_values(table, column), *_floors(table, column), *_pairs(table, layout, column, comparable))
    ]
    return [*said, *_courses(table, layout)]


def _values(table: dict[str, Any], column: Column) -> Iterator[str]:
    known = [f"{row['label']} {figure(column, cell)} ({seeds(cell['n'])})"
             for row in table["models"] if (cell := row["cells"][column.path])["n"]]  # fmt: skip
    if known:
        yield f"{capital(column.heading)}: {'; '.join(known)}."


def _courses(table: dict[str, Any], layout: layouts.Layout) -> Iterator[str]:
    """Where validation was best, and where it ended: whether a model begins to overfit within its epochs."""
    column = Column(f"valid.{layout.curve}")
    known = [f"{row['label']} {_course(row['course'].values(), column)}" for row in table["models"] if row["course"]]
    if known:
        yield f"Validation {column.metric.label}, best and last (epoch), means over seeds: {'; '.join(known)}."


def _course(seeds: Iterable[dict[str, Any]], column: Column) -> str:
    found = list(seeds)
    (best, at), (last, end) = (
        (statistics.fmean(one[value] for one in found), _span([one[epoch] for one in found]))
        for value, epoch in (("best", "epoch"), ("last", "epochs"))
    )
    return f"{column.text(best)} ({at}) and {column.text(last)} ({end})"


def _span(epochs: list[int]) -> str:
    low, high = min(epochs), max(epochs)
    return str(low) if low == high else f"{low} to {high}"


def _floors(table: dict[str, Any], column: Column) -> Iterator[str]:
    for floor in table["floors"]:
        cell, rows = floor["cells"].get(column.path), _known(table, column)
        if cell and rows:
            yield (_bound if floor["bound"] else _beaten)(floor["label"], cell["value"], rows, column)


def _beaten(label: str, value: float, rows: list[Row], column: Column) -> str:
    better = [row["label"] for row in rows if column.metric.beats(_mean(row, column), value)]
    worse = [row["label"] for row in rows if row["label"] not in better]
    name = f"{small(label)} ({column.text(value)})"
    if not worse:
        return f"{_models(better)} the floor: {name}."
    verdict = f"{joined(worse)} {'does' if len(worse) == 1 else 'do'} not beat the floor: {name}"
    return f"{verdict}; {_models(better)} it." if better else f"{verdict}."


def _bound(label: str, value: float, rows: list[Row], column: Column) -> str:
    best = rows[0]
    for row in rows[1:]:
        best = row if column.metric.beats(_mean(row, column), _mean(best, column)) else best
    mean = _mean(best, column)
    if column.metric.beats(mean, value):
        return (f"{best['label']} ({column.text(mean)}) is better than the bound allows: {small(label)} "
                f"({column.text(value)}). An accident of the test text, or a fault in the measurement.")  # fmt: skip
    return (f"No model can beat the bound in the long run: {small(label)} ({column.text(value)}). Closest comes "
            f"{best['label']} with {column.text(mean)}.")  # fmt: skip


def _pairs(table: dict[str, Any], layout: layouts.Layout, column: Column, comparable: bool) -> Iterator[str]:
    rows = {row["model"]: row for row in _known(table, column)}
    for model, other in layout.comparisons:
        if model in rows and other in rows:
            aside = ", on its own corpus and budget" if not comparable else _corpus(table)
            yield compare(rows[model], rows[other], column, aside) + _precision(rows[model], rows[other])


def _corpus(table: dict[str, Any]) -> str:
    """What is to be said with the paper's figures where the data are not the paper's."""
    return ", on other data (see the deviations)" if table["data"]["deviations"] else ""


def compare(row: Row, other: Row, column: Column, aside: str = "") -> str:
    """How two models' means stand to each other, held against the larger of their standard deviations."""
    one, two = row["cells"][column.path], other["cells"][column.path]
    gap = one["mean"] - two["mean"]
    if gap == 0:
        stand = f"{row['label']} equals {other['label']}"
    else:
        verdict = "better" if column.metric.beats(one["mean"], two["mean"]) else "worse"
        size = Column(column.path).text(abs(gap))
        stand = f"{row['label']} is {size} {'above' if gap > 0 else 'below'} {other['label']} ({verdict})"
    count = seeds(one["n"]) if one["n"] == two["n"] else f"{seeds(one['n'])} and {two['n']}"
    return f"{stand}, {count}; {_spread(one, two, gap, column)}.{_paper(one, two, aside)}"


def _spread(one: dict[str, Any], two: dict[str, Any], gap: float, column: Column) -> str:
    spreads = [cell["std"] for cell in (one, two) if cell["std"] is not None]
    if len(spreads) < 2:
        return "with a single seed on a side the spread is not known"
    larger = max(spreads)
    held = "beyond it" if abs(gap) > larger else "within it"
    return f"the larger standard deviation of the two is {column.text(larger)}, the gap lies {held}"


def _paper(one: dict[str, Any], two: dict[str, Any], aside: str) -> str:
    if not (one["paper"] and two["paper"]):
        return ""
    gap = one["paper"]["value"] - two["paper"]["value"]
    return f" In the paper it is {abs(gap):.3g} {'above' if gap > 0 else 'below'}{aside}."


def _precision(row: Row, other: Row) -> str:
    """A word where the two did not compute alike, or one row's trials did not."""
    found = [
        {item["text"].partition(" on ")[0] for item in one["deviations"] if item["id"] == "precision"}
        for one in (row, other)
    ]  # less the device
    return "" if found[0] == found[1] else " The two did not run in the same precision; see the deviations."


def figure(column: Column, cell: dict[str, Any]) -> str:
    """Mean, with its standard deviation where there are two seeds or more (and it is not zero by nature)."""
    spread = None if column.path == "parameters" and not cell["std"] else cell["std"]
    return column.text(cell["mean"], spread)


def seeds(n: int) -> str:
    return f"n = {n}"


def _known(table: dict[str, Any], column: Column) -> list[Row]:
    return [row for row in table["models"] if row["cells"][column.path]["n"]]


def _mean(row: Row, column: Column) -> float:
    return row["cells"][column.path]["mean"]


def _models(labels: list[str]) -> str:
    return f"{joined(labels)} {'beats' if len(labels) == 1 else 'beat'}"
