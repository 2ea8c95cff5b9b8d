"""From records to numbers: every cell of every table, as `tables.json` keeps it and as the report prints it."""

import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline import params
from pipeline.report import layout as layouts
from pipeline.report import states
from pipeline.report.layout import Column, Floor, Layout

SCHEMA = 2  # of tables.json
WORD_VECTORS = ("glove-subset", "no-glove", "corpus-vectors")  # deviations of no concern to a model that has none
STATUSES = ("done", "diverged", "failed", "missing")
Record = dict[str, Any]
Table = dict[str, Any]


def summary(figures: dict[int, float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for fewer than two), extremes and values of figures by seed."""
    values = list(figures.values())
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "seeds": {str(seed): figure for seed, figure in sorted(figures.items())},
    }


def tables(
    scale: str,
    records: Sequence[Record],
    manifests: dict[str, dict[str, Any]],
    grid: Sequence[params.Trial],
    fingerprints: dict[str, str],
) -> dict[str, Any]:
    """All tables of a scale.

    Args:
        records: of this scale.
        manifests: processed manifest by task, where there is one.
        grid: the trials that params.yaml asks for.
        fingerprints: of the present sources, by task.
    """
    tasks = dict.fromkeys([*(trial.cell.task for trial in grid), *(record["task"] for record in records)])
    made = {
        task: _table(
            task,
            [record for record in records if record["task"] == task],
            manifests.get(task),
            [trial for trial in grid if trial.cell.task == task],
            fingerprints.get(task),
        )
        for task in tasks
    }
    return {
        "schema": SCHEMA,
        "scale": scale,
        "comparable": scale == "paper",
        "grid": _counts(made.values()),
        "finished": _date(records),
        "devices": sorted({device(record) for record in records}),
        "commits": sorted({commit(record) for record in records}),
        "tables": made,
    }


def _table(
    task: str, records: list[Record], manifest: dict[str, Any] | None, grid: list[params.Trial], fingerprint: str | None
) -> Table:
    layout = layouts.layout(task, records)
    paper = layouts.published()["tables"].get(task, {"number": None, "cited": [], "models": {}})
    manifest = manifest or next((record["data"] for record in records), None)
    printed = {path for model in paper["models"].values() for path in model["figures"]}
    models = dict.fromkeys([*paper["models"], *(trial.cell.model for trial in grid), *(r["model"] for r in records)])
    rows = [
        _row(layout, model, row, [r for r in records if r["model"] == row.get("of", model)],
             {trial.seed: trial for trial in grid if trial.cell.model == row.get("of", model)}, manifest, fingerprint)
        for model in models for row in (paper["models"].get(model, {}),)
    ]  # fmt: skip
    behind = counted(rows, records)
    return {
        "title": layout.title,
        "number": paper["number"],
        "paper_device": paper.get("device"),
        "columns": [
            {"path": column.path, "heading": column.heading, "paper": column.path in printed}
            for column in layout.columns
        ],
        "cited": [{"label": row["label"], "cells": row["figures"]} for row in paper["cited"]],
        "models": rows,
        "floors": floors(layout, layouts.floors(manifest)),
        "deviations": _unique((manifest or {}).get("deviations") or [], *(row["deviations"] for row in rows)),
        "data": {name: (manifest or {}).get(name) for name in ("hash", "source", "counts", "deviations")},
        "devices": sorted({device(record) for record in behind if record["curve"]}),
        "exclusive": bool(behind) and all(layouts.dig(record, "timing.exclusive") is True for record in behind),
        "signatures": _signatures(behind, manifest),
    }


def left_out(stale: dict[str, list[int]]) -> set[int]:
    """Seeds left out of means, metrics and figures, which are of trials of one recipe on one data set."""
    return {*stale["recipe"], *stale["data"]}


def current(rows: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[Record]:
    """The records of a task that are not left out, however they ended."""
    stale = {row["model"]: left_out(row["stale"]) for row in rows}
    return [record for record in records if record["seed"] not in stale[record["model"]]]


def counted(rows: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[Record]:
    """The records that the cells of a task's rows are of: neither failed or diverged, nor left out."""
    seeds = {row["model"]: row["seeds"]["done"] for row in rows}
    return [record for record in records if record["seed"] in seeds[record["model"]]]


def tried(row: dict[str, Any]) -> bool:
    """Whether the scale asks for trials of a row, or has records of them; otherwise the paper's figures stand alone."""
    return any((*row["seeds"].values(), *row["stale"].values()))


def _row(
    layout: Layout,
    model: str,
    paper: dict[str, Any],
    records: list[Record],
    grid: dict[int, params.Trial],
    manifest: dict[str, Any] | None,
    fingerprint: str | None,
) -> dict[str, Any]:
    stale = _stale(records, grid, manifest, fingerprint)
    current = [record for record in records if record["seed"] not in left_out(stale)]
    done = [record for record in current if record["status"] == "done"]
    return {
        "model": model,
        "of": paper.get("of"),  # the model whose trials the row shows another figure of
        "note": paper.get("note"),
        "label": paper.get("label", model),
        "paper_label": paper.get("paper_label"),
        "config": _config(done, grid, records),
        "seeds": _seeds(current, grid),
        "stale": stale,
        "deviations": _unique(*(_deviations(record) for record in done)),
        "cells": {column.path: _cell(column, paper, done) for column in layout.columns},
        "course": {} if paper.get("of") else _course(layout.curve, done),
        "turns": {} if paper.get("of") else states.turns(done),
        "took": {} if paper.get("of") else _took(done),
    }


def _config(done: list[Record], grid: dict[int, params.Trial], records: list[Record]) -> dict[str, Any] | None:
    """The recipe that a row's cells are of; of a row without a figure the one asked for, or else the one recorded."""
    if grid and not done:
        return next(iter(grid.values())).config
    return next((params.with_defaults(record["task"], record["config"]) for record in (*done, *records)), None)


def _deviations(record: Record) -> list[dict[str, str]]:
    """Deviations of a trial's data, and that of its matrix products where they are not in float32 as the paper's."""
    has_vectors = "embedding" in params.with_defaults(record["task"], record["config"])
    named = [item for item in record["data"].get("deviations") or [] if has_vectors or item["id"] not in WORD_VECTORS]
    tokens = record["config"].get("max_tokens")
    if tokens is not None:
        named.append({"id": "imdb-max-tokens", "text": f"the first {tokens:,} tokens of a review only, of test too"})
    precision = (record["environment"] or {}).get("precision", "float32")
    if precision != "float32":
        # Under autocast torch's LSTM has its gates and state in bfloat16 too; the QRNN's pooling is float32.
        state = " and the LSTM's state" if (precision, record["config"].get("family")) == ("bfloat16", "lstm") else ""
        exact = (
            " (not attention's and the output layer's)" if (precision, record["task"]) == ("bfloat16", "iwslt") else ""
        )
        named.append({"id": "precision", "text": f"matrix products{exact}{state} in {precision} on {device(record)}"})
    return named


def _cell(column: Column, paper: dict[str, Any], done: list[Record]) -> dict[str, Any]:
    shown = layouts.Column(paper.get("shows", {}).get(column.path, column.path))
    figures = {record["seed"]: figure for record in done if (figure := shown.figure(record)) is not None}
    return {"paper": paper.get("figures", {}).get(column.path), **summary(figures)}


def _took(done: list[Record]) -> dict[str, dict[str, Any]]:
    """By device, the seconds of training of its trials, validation and test apart."""
    total = layouts.Column("timing.total_s")
    by_device: dict[str, dict[int, float]] = {}
    for record in done:
        if (seconds := total.figure(record)) is not None:
            by_device.setdefault(device(record), {})[record["seed"]] = seconds
    return {name: summary(seconds) for name, seconds in sorted(by_device.items())}


def _course(metric: str, done: list[Record]) -> dict[str, dict[str, Any]]:
    """By seed: a validation metric at its `best`, the `epoch` of that, its `last` value and the number of `epochs`."""
    pick = max if Column(f"valid.{metric}").metric.better == "higher" else min
    found = {}
    for record in done:
        values = [
            figure for entry in record["curve"] if (figure := layouts.number(entry["valid"].get(metric))) is not None
        ]
        if values:
            best = pick(values)
            found[str(record["seed"])] = {"best": best, "epoch": 1 + values.index(best), "last": values[-1],
                                          "epochs": len(values)}  # fmt: skip
    return found


def _seeds(records: list[Record], grid: dict[int, params.Trial]) -> dict[str, list[int]]:
    """Seeds by status; missing are those of the grid without a record."""
    by_status = {status: sorted(r["seed"] for r in records if r["status"] == status) for status in STATUSES[:-1]}
    recorded = {record["seed"] for record in records}
    return {**by_status, "missing": sorted(seed for seed in grid if seed not in recorded)}


def _stale(
    records: list[Record], grid: dict[int, params.Trial], manifest: dict[str, Any] | None, fingerprint: str | None
) -> dict[str, list[int]]:
    """Seeds whose record is of other sources (if it is done), another recipe or other data than stand here now.

    A trial that other sources began is of other sources, whichever ended it.
    """
    data = (manifest or {}).get("hash")
    asked = next(iter(grid.values()), None)  # a cell has one recipe, whatever the seed

    def set_off(record: Record) -> dict[str, Any]:
        return params.off_default(record["task"], record["config"])

    def by_others(record: Record) -> bool:
        return bool(record.get("earlier_code")) or fingerprint not in (None, record["code"]["fingerprint"])

    tests = {
        "sources": lambda r: r["status"] == "done" and by_others(r),
        "recipe": lambda r: asked is not None and set_off(r) != params.off_default(r["task"], asked.config),
        "data": lambda r: data is not None and r["data"]["hash"] != data,
    }
    return {name: sorted(r["seed"] for r in records if differs(r)) for name, differs in tests.items()}


def floors(layout: Layout, known: list[Floor]) -> list[dict[str, Any]]:
    """Floors as rows, one a label; a floor whose column the table lacks stands under its own path."""
    rows: dict[str, dict[str, Any]] = {}
    for floor in known:
        row = rows.setdefault(floor.label, {"label": floor.label, "bound": floor.bound, "cells": {}})
        row["cells"][floor.path] = {"value": floor.value}
    return list(rows.values())


def _signatures(records: list[Record], manifest: dict[str, Any] | None) -> list[str]:
    """Distinct signatures of the scores: those of trials, and that of the floor beside them."""
    floors = layouts.flat((manifest or {}).get("floors") or {})
    found = {layouts.dig(record, "test.signature") for record in records}
    found |= {value for name, value in floors if name.endswith("signature")}
    return sorted(filter(None, found))


def _counts(made: Iterable[Table]) -> dict[str, int]:
    rows = [row for table in made for row in table["models"] if not row["of"]]
    counts = {status: sum(len(row["seeds"][status]) for row in rows) for status in STATUSES}
    return {"trials": sum(counts.values()), **counts}


def _unique(*groups: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Deviations in the order met, each once."""
    met = {(item["id"], item["text"]): {"id": item["id"], "text": item["text"]} for group in groups for item in group}
    return list(met.values())


def _date(records: list[Record]) -> str | None:
    """UTC date of the latest finished record."""
    latest = max((record["finished_at"] for record in records), default=None)
    return None if latest is None else datetime.fromtimestamp(latest, UTC).strftime("%Y-%m-%d")


def device(record: Record) -> str:
    """The device's name; for a CPU also how many threads a trial had."""
    environment = record["environment"] or {}
    name = environment.get("device_name") or environment.get("device") or "unknown device"
    threads = environment.get("threads")
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}" if environment.get("device") == "cpu" else name


def commit(record: Record) -> str:
    """Short commit of a record's sources, with `+` where they differed from it."""
    return _revision(record["code"] or {})


def earlier(record: Record) -> str:
    """The same of the code that ran the trial before; of a commit that is not known the sources' fingerprint."""
    return ", ".join(_revision(code) if code["commit"] else f"sources {code['fingerprint'][:8]}"
                     for code in record.get("earlier_code", []))  # fmt: skip


def _revision(code: dict[str, Any]) -> str:
    return f"{(code.get('commit') or 'none')[:8]}{'+' if code.get('dirty') else ''}"


def metrics(records: Sequence[Record]) -> dict[str, Any]:
    """A task's figures by model, numbers only: what the DVC metrics file holds of the task's current records.

    Returns:
        {model: {"trials": {"done", "diverged", "failed"}, "test": {metric: {"n", "mean", "std"}}, "valid": ...}};
        `std` is the sample standard deviation and is left out where there is one value.
    """
    return {model: _metrics([record for record in records if record["model"] == model])
            for model in dict.fromkeys(record["model"] for record in records)}  # fmt: skip


def _metrics(records: list[Record]) -> dict[str, Any]:
    done = [record for record in records if record["status"] == "done"]
    counts = {status: sum(record["status"] == status for record in records) for status in STATUSES[:-1]}
    return {"trials": counts, **{split: _split(done, split) for split in ("test", "valid")}}


def _split(done: list[Record], split: str) -> dict[str, Any]:
    names = dict.fromkeys(name for record in done for name in layouts.measures(record[split]))
    made = {}
    for name in names:
        figures = {r["seed"]: r[split][name] for r in done if layouts.number((r[split] or {}).get(name)) is not None}
        whole = summary(figures)
        made[name] = {key: whole[key] for key in ("n", "mean", "std") if whole[key] is not None}
    return made
