"""The report as GitHub-flavoured Markdown, printed from the numbers of `tables.json`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import ledger, paths
from pipeline.report import choices, claims, reading, speed, states, tables, took
from pipeline.report import layout as layouts
from pipeline.report.layout import Layout
from pipeline.report.section import STALE, Lines, section
from pipeline.report.text import code, grid, plain


def report(
    made: dict[str, Any],
    judged: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    figures: dict[str, str],
) -> str:
    """The whole report.

    Args:
        made: what `tables.tables` returns.
        judged: what `claims.findings` returns.
        records: the trials behind it.
        figures: by task, by machine for its speed, and of Figure 3 by its name, path of its figure relative to the
            report.
    """
    scale = made["scale"]
    sheets = {task: layouts.layout(task, [r for r in records if r["task"] == task]) for task in made["tables"]}
    order = [(task, row["model"]) for task, table in made["tables"].items() for row in table["models"]]
    records = sorted(records, key=lambda r: (order.index((r["task"], r["model"])), r["seed"]))
    lines = [*_head(made), *claims.section(judged), *_reading(made, sheets)]
    for task, table in made["tables"].items():
        lines += section(table, sheets[task], figures.get(task))
    lines += states.section(
        [row for table in made["tables"].values() for row in table["models"]], figures.get(states.NAME)
    )
    titles = {task: table["title"] for task, table in made["tables"].items()}
    drawn = [figures[one["machine"]] for one in made["speed"]]
    measurements = [_relative(scale, paths.ledger(scale) / "speed" / f"{one['name']}.json") for one in made["speed"]]
    lines += speed.section(made["speed"], drawn, measurements, titles)
    lines += took.section(made["scale"], made["tables"])
    lines += choices.section(made["tables"], records)
    lines += [*_troubled(records), *_provenance(made, records, sheets)]
    return "\n".join(lines).rstrip() + "\n"


def _head(made: dict[str, Any]) -> Lines:
    grid, source = made["grid"], layouts.published()["source"]
    counts = ", ".join(f"{grid[status]} {status}" for status in tables.STATUSES)
    when = f"The last one ended on {made['finished']} (UTC)." if made["finished"] else "None has ended yet."
    devices = f" Devices: {'; '.join(map(plain, made['devices']))}." if made["devices"] else ""
    return [
        f"# {source['title']}: results at scale {made['scale']}", "",
        f"{grid['trials']} trials: {counts}. {when}{devices}", "",
        *_orientation(made),
        f"The paper is [{plain(source['title'])}]({source['address']})",
        f"({plain(source['authors'])}; {source['venue']}). Columns named *paper* hold its published values,",
        "columns named *here* the mean ± sample standard deviation over seeds (a single seed without a spread); column",
        "*Seeds* says how many of the trials ended with a result. Every figure comes from the records under",
        "[Provenance](#provenance), or the measurement that the section on speed names, and stands unrounded in",
        "[tables.json](tables.json). The epoch that is tested is the best on validation data, or the last where the",
        "recipe says so. No choice was made by test figures; one that was seen before a change has a note.", "",
    ]  # fmt: skip


def _orientation(made: dict[str, Any]) -> Lines:
    if made["comparable"]:
        return []
    return [
        f"> **Scale {made['scale']} does not reproduce the paper's figures.**",
        "> The paper's values are for another corpus or a larger budget, and stand here for orientation only.",
        "",
    ]


def _reading(made: dict[str, Any], sheets: dict[str, Layout]) -> Lines:
    lines: Lines = ["## Reading", ""]
    for task, table in made["tables"].items():
        said = reading.sentences(table, sheets[task], made["comparable"]) or ["Nothing is done yet."]
        lines += [f"**{plain(table['title'])}**", "", *(f"- {plain(sentence)}" for sentence in said), ""]
    said = speed.sentences(made["speed"]) or ["Nothing is measured yet."]
    return [*lines, "**Speed**", "", *(f"- {plain(sentence)}" for sentence in said), ""]


def _troubled(records: Sequence[dict[str, Any]]) -> Lines:
    lines = [f"- {code(ledger.name_of(record))} {record['status']}: {plain(record['error'] or 'no reason recorded')}"
             for record in records if record["status"] != "done"]  # fmt: skip
    return ["## Failed and diverged trials", "", *(lines or ["None."]), ""]


def _provenance(made: dict[str, Any], records: Sequence[dict[str, Any]], sheets: dict[str, Layout]) -> Lines:
    heading = ["Trial", "Status", "Result", "Selected epoch", "Command", "Commit", "Data", "Key", "Device", "Record"]
    rows = [_trial(record, made["tables"][record["task"]], sheets[record["task"]]) for record in records]
    return [
        "## Provenance", "",
        "One row a trial. `+` after a commit: the sources had local changes. "
        + " ".join(f"{mark} {meaning}." for mark, meaning in STALE.values()), "",
        *(grid(heading, rows, left=(0, 1, 4, 5, 6, 7, 8, 9)) if rows else ["No records yet."]), "",
    ]  # fmt: skip


def _trial(record: dict[str, Any], table: dict[str, Any], layout: Layout) -> list[str]:
    row = next(row for row in table["models"] if row["model"] == record["model"])
    stale = "".join(f" {STALE[name][0]}" for name, seeds in row["stale"].items() if record["seed"] in seeds)
    epochs = f"{record['selected_epoch']} of {len(record['curve'])}" if record["selected_epoch"] else "—"
    return [
        ledger.name_of(record), f"{record['status']}{stale}", _result(record, layout) or "—", epochs,
        code(record["command"]), _sources(record), code((record["data"]["hash"] or "none")[:12]),
        code(record["key"]), plain(tables.device(record)), f"[record]({_link(record)})",
    ]  # fmt: skip


def _sources(record: dict[str, Any]) -> str:
    before = tables.earlier(record)
    return code(tables.commit(record)) + (f" after {code(before)}" if before else "")


def _result(record: dict[str, Any], layout: Layout) -> str:
    columns = [layout.column(path) for path in layout.headlines]
    return "; ".join(f"{column.text(figure)} {column.metric.label}" for column in columns
                     if (figure := column.figure(record)) is not None)  # fmt: skip


def _link(record: dict[str, Any]) -> str:
    scale = record["scale"]
    return _relative(scale, ledger.path(scale, record["task"], record["model"], record["seed"]))


def _relative(scale: str, file: Path) -> str:
    """A file's path as a link in the report of a scale."""
    return os.path.relpath(file, paths.results(scale)).replace(os.sep, "/")
