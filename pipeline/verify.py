"""Whether the results of a scale are what its records say.

The figures of trials in `tables.json` are computed anew from the raw files of the ledger, with none of the report's
own arithmetic, as is which records belong to params.yaml's recipes and the table's data. The paper's figures are held
against published.json's, floors and measurements of speed against the ledger's, and a measurement's ratios against its
times of single calls, where it has them. Claims are judged, and metrics.json and report.md made, anew, and compared
(the pictures are not). Each record is looked at by itself: its checksum, its place in the ledger, whether the epoch
that was tested is the one that its validation curve selects, and whether its test figure is what its outputs on the
test set give.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import ledger, measurements, paths
from pipeline.errors import UserError
from pipeline.params import load, off_default, with_defaults
from pipeline.processed import Processed, read_manifest
from pipeline.report import claims, markdown, speed, states, tables
from pipeline.report.layout import Column, dig, floors, layout, published
from pipeline.rescoring import NEEDS_DATA, rescore
from pipeline.tasks import task_class

Record = dict[str, Any]
Records = dict[tuple[str, str, int], Record]  # by task, model, seed


def run(scale: str, say: Callable[[str], None] = print) -> int:
    """Tells every fault, then what was looked at; returns the number of faults.

    Raises:
        UserError: there are no results of the scale, or they are no JSON or of another version's schema.
    """
    folder = paths.results(scale)
    made, judged = (_json(folder / name) for name in ("tables.json", "claims.json"))
    if made["schema"] != tables.SCHEMA:
        raise UserError(f"{folder / 'tables.json'}: expected schema {tables.SCHEMA}, got {made['schema']}, of another"
                        " version; `report` makes it anew")  # fmt: skip
    records, faults = _records(scale)
    faults += [f"{task}/{model}, seed {seed}: expected a row for it in tables.json, found none; `report` makes it"
               for task, model, seed in records if model not in _models(made, task)]  # fmt: skip
    records = {place: record for place, record in records.items() if place[1] in _models(made, place[0])}
    faults += [fault for record in records.values() for fault in _selection(record)]
    rescored = [record for record in records.values() if _can_be_rescored(record)]
    faults += [fault for record in rescored for fault in _test_figure(record)]
    cells = list(_cells(made))
    faults += [fault for table, row, path in cells for fault in _cell(table, row, path, records)]
    faults += [f"{task}/{model}: expected the seeds that ended well, {kept}, in tables.json, found {stated}"
               for task, model, kept, stated in _seeds(made, records) if kept != stated]  # fmt: skip
    faults += [*_printed(made), *_left_out(scale, made, records)]
    faults += [
        *_courses(made, records),
        *_turns(made, records),
        *_took(made, records),
        *_floors(made, records),
        *_speed(scale, made),
    ]
    if judged != claims.findings(made):
        faults.append("claims.json: expected the verdicts that tables.json gives, found others")
    faults += _texts(scale, made, list(records.values()))
    for fault in faults:
        say(fault)
    filled = sum(row["cells"][path]["n"] > 0 for _, row, path in cells)
    say(f"{scale}: {len(records)} records ({len(rescored)} scored again from their outputs), {filled} figures, "
        f"{len(judged)} claims looked at; {len(faults)} faults")  # fmt: skip
    return len(faults)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: expected the results of this scale, found none; `report` makes them") from None
    except ValueError as error:
        raise UserError(f"{file}: expected JSON: {error}") from None


def _records(scale: str) -> tuple[Records, list[str]]:
    """The records that are whole, and what is wrong with the others or with where they lie."""
    records, faults = {}, []
    for file in sorted(paths.ledger(scale).glob("*/*/seed-*.json")):
        try:
            record = ledger.read(file)
        except UserError as error:
            faults.append(str(error))
            continue
        task, model, seed = record["task"], record["model"], record["seed"]
        if ledger.path(record["scale"], task, model, seed) != file:
            faults.append(f"{file}: expected a record of this place, found {record['scale']} {ledger.name_of(record)}")
        records[task, model, seed] = record
    return records, faults


def _models(made: dict[str, Any], task: str) -> set[str]:
    """The models that a task's table has rows of."""
    return {row["model"] for row in made["tables"].get(task, {"models": []})["models"]}


def _printed(made: dict[str, Any]) -> Iterator[str]:
    """Faults in the figures that are the paper's own, or those of works that it cites."""
    for task, table in made["tables"].items():
        paper = published()["tables"].get(task, {"cited": [], "models": {}})
        cited = [{"label": row["label"], "cells": row["figures"]} for row in paper["cited"]]
        if table["cited"] != json.loads(json.dumps(cited)):
            yield f"{task}: expected the figures of the cited works as published.json has them, found others"
        for row in table["models"]:
            figures = paper["models"].get(row["model"], {}).get("figures", {})
            for path, cell in row["cells"].items():
                if cell["paper"] != figures.get(path):
                    yield (f"{task}/{row['model']} {path}: expected the paper's figure {figures.get(path)}, "
                           f"found {cell['paper']}")  # fmt: skip


def _left_out(scale: str, made: dict[str, Any], records: Records) -> Iterator[str]:
    """Faults in which records a row leaves out: of another recipe than params.yaml's, other data than the table's."""
    asked = {(trial.cell.task, trial.cell.model): trial.config for trial in load().grid(scale)}
    for task, table in made["tables"].items():
        manifest, counted = _at_hand(scale, task), any(row["seeds"]["done"] for row in table["models"])
        hashes = {record["data"]["hash"] for (of, _, _), record in records.items() if of == task}
        hashes |= {manifest["hash"]} if manifest else set()
        # Data that are not at hand may be those of a table that leaves all records out.
        if hashes and table["data"]["hash"] not in hashes and (manifest or counted):
            yield (f"{task}: expected the data of a record or of those at hand in tables.json, found others; `report`"
                   " makes it anew")  # fmt: skip
        for row in table["models"]:
            model = row["of"] or row["model"]
            config = asked.get((task, model))
            mine = {seed: record for (t, m, seed), record in records.items() if (t, m) == (task, model)}
            wanted = {
                "recipe": [seed for seed, record in mine.items()
                           if config is not None and off_default(task, record["config"]) != off_default(task, config)],
                "data": [seed for seed, record in mine.items() if record["data"]["hash"] != table["data"]["hash"]],
            }  # fmt: skip
            for name, seeds in wanted.items():
                if row["stale"][name] != sorted(seeds):
                    yield (f"{task}/{row['model']}: expected the seeds of another {name}, {sorted(seeds)}, in "
                           f"tables.json, found {row['stale'][name]}; `report` makes it anew")  # fmt: skip


def _selection(record: Record) -> Iterator[str]:
    """Faults in which epoch of a trial was tested; a model that is fitted at once has no epochs."""
    curve, epoch = record["curve"], record["selected_epoch"]
    recipe = with_defaults(record["task"], record["config"])
    if record["status"] != "done" or "epochs" not in recipe:
        return
    name = ledger.name_of(record)
    if [entry["epoch"] for entry in curve] != list(range(1, len(curve) + 1)):
        yield f"{name}: expected a curve of epochs 1, 2, ..., found {[entry['epoch'] for entry in curve]}"
        return
    task = task_class(record["task"])
    values = [entry["valid"][task.criterion] for entry in curve]
    last = _last_epoch(values, task.greater_is_better, recipe["patience"], recipe["epochs"])
    if len(curve) != last:
        yield f"{name}: expected training to end with epoch {last} by its recipe, found {len(curve)} epochs"
        return
    wanted = len(curve) if recipe["selection"] == "last" else _best(values, task.greater_is_better)[1]
    if epoch != wanted:
        yield f"{name}: expected epoch {wanted} to be tested by its validation {task.criterion}, found {epoch}"
    elif record["valid"] != curve[epoch - 1]["valid"]:
        yield f"{name}: expected the validation of epoch {epoch} in the record's result, found another"


def _last_epoch(values: list[float], highest: bool, patience: int | None, epochs: int) -> int:
    """The epoch after which training ends: the first whose `patience` predecessors and itself bring nothing better."""
    for epoch in range(1, min(len(values), epochs) + 1):
        if patience is not None and epoch - (_best(values[:epoch], highest)[1] or 0) >= patience:
            return epoch
    return epochs


def _best(values: list[float], highest: bool) -> tuple[float | None, int | None]:
    """The best value by epoch and its epoch, the first of equals; nothing where there is none."""
    best = (max if highest else min)(values, default=None)
    return best, None if best is None else 1 + values.index(best)


def _can_be_rescored(record: Record) -> bool:
    """Whether it has outputs, and its data are at hand where they are needed."""
    return bool(record.get("outputs")) and (record["task"] not in NEEDS_DATA or _data(record) is not None)


def _test_figure(record: Record) -> Iterator[str]:
    """Faults of a test figure that the record's outputs do not give, or give of another number of tokens."""
    name, tokens = ledger.name_of(record), (record["data"]["counts"] or {}).get("test_tokens")
    if record["task"] == "ptb" and tokens not in (None, record["test"]["tokens"]):
        yield f"{name}: expected the {tokens} test tokens of its data, found {record['test']['tokens']}"
    figure, value, tolerance = rescore(record, _data(record))
    stated = record["test"][figure]
    if not math.isclose(stated, value, rel_tol=tolerance):
        yield f"{name}: the record has test {figure} {stated}, its outputs give {value}"


def _data(record: Record) -> Processed | None:
    """The processed data that the record was made of, if they are at hand."""
    data = _processed(paths.processed(record["scale"], record["task"]))
    return data if data and data.hash == record["data"]["hash"] else None


@functools.cache  # checking the files takes a while
def _processed(folder: Path) -> Processed | None:
    try:
        return Processed(folder)
    except UserError:
        return None


def _cells(made: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(task, row, path of the column) of every cell."""
    for task, table in made["tables"].items():
        for row in table["models"]:
            for path in row["cells"]:
                yield task, row, path


def _cell(task: str, row: dict[str, Any], path: str, records: Records) -> Iterator[str]:
    """Faults of one cell: its values by seed, and what `tables.summary` makes of them."""
    where, cell = f"{task}/{row['model']} {path}", row["cells"][path]
    figures = {}
    for seed in cell["seeds"]:
        record = records.get((task, row["of"] or row["model"], int(seed)))
        figures[seed] = dig(record, _shown(task, row["model"], path))
    yield from _summary(where, cell, figures)


def _summary(where: str, cell: dict[str, Any], figures: dict[str, Any]) -> Iterator[str]:
    """Faults of a cell whose records have these figures by seed."""
    for seed, value in figures.items():
        if value != (stated := cell["seeds"].get(seed)):
            yield f"{where}, seed {seed}: tables.json has {stated}, the record {value}"
            return
    values = list(figures.values())
    wanted = {
        "n": len(values),
        "mean": math.fsum(values) / len(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
    }
    for name, value in wanted.items():
        stated = cell[name]
        same = stated == value if None in (stated, value) else math.isclose(stated, value, rel_tol=1e-12)
        if not same:
            yield f"{where}: tables.json has {name} {stated}, the records give {value}"


def _shown(task: str, model: str, path: str) -> str:
    """The path in a record that a row shows in a column: another one where it is another figure of a row's trials."""
    paper = published()["tables"].get(task, {}).get("models", {}).get(model, {})
    return paper.get("shows", {}).get(path, path)


def _seeds(made: dict[str, Any], records: Records) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """(task, model, seeds of the records that belong in its row, seeds that the row has)."""
    for task, table in made["tables"].items():
        for row in table["models"]:
            model, stale = row["of"] or row["model"], {*row["stale"]["recipe"], *row["stale"]["data"]}
            ended = sorted(seed for (t, m, seed), record in records.items()
                           if (t, m) == (task, model) and record["status"] == "done" and seed not in stale)  # fmt: skip
            yield task, row["model"], ended, row["seeds"]["done"]


def _courses(made: dict[str, Any], records: Records) -> Iterator[str]:
    """Faults in the best and the last validation of a row's trials."""
    for task, table in made["tables"].items():
        metric = layout(task, [record for record in records.values() if record["task"] == task]).curve
        highest = Column(f"valid.{metric}").metric.better == "higher"
        for row in table["models"]:
            for seed, stated in row["course"].items():
                curve = records.get((task, row["model"], int(seed)), {"curve": []})["curve"]
                values = [entry["valid"][metric] for entry in curve]
                best, at = _best(values, highest)
                if stated != {"best": best, "epoch": at, "last": (values or [None])[-1], "epochs": len(values)}:
                    yield f"{task}/{row['model']}, seed {seed}: expected the course of its validation, found another"


def _turns(made: dict[str, Any], records: Records) -> Iterator[str]:
    """Faults in what a row has of its trials' states over the review of Figure 3."""
    for task, table in made["tables"].items():
        for row in table["models"]:
            seeds = [] if row["of"] else row["seeds"]["done"]
            done = [record for seed in seeds if (record := records.get((task, row["model"], seed)))]
            if row["turns"] != states.turns(done):
                yield f"{task}/{row['model']}: expected the turns of its records' states, found others"


def _took(made: dict[str, Any], records: Records) -> Iterator[str]:
    """Faults in the seconds that a row's trials took, by device."""
    for task, table in made["tables"].items():
        for row in table["models"]:
            by_device: dict[str, dict[str, Any]] = {}
            for seed in [] if row["of"] else row["seeds"]["done"]:
                if record := records.get((task, row["model"], seed)):
                    by_device.setdefault(tables.device(record), {})[str(seed)] = record["timing"]["total_s"]
            if row["took"].keys() != by_device.keys():
                yield (f"{task}/{row['model']}: expected the devices of its records, {sorted(by_device)}, found"
                       f" {sorted(row['took'])}")  # fmt: skip
                continue
            for device, seconds in by_device.items():
                yield from _summary(f"{task}/{row['model']} time on {device}", row["took"][device], seconds)


def _at_hand(scale: str, task: str) -> dict[str, Any] | None:
    """The manifest of a task's processed data, where they are at hand."""
    try:
        return read_manifest(paths.processed(scale, task))
    except UserError:
        return None


def _floors(made: dict[str, Any], records: Records) -> Iterator[str]:
    """Faults in the floors of tables: they are those of the data at hand, or hold those of each record of their data.

    A record may be older than a floor.
    """
    for task, table in made["tables"].items():
        stated = {(row["label"], path): (cell["value"], row["bound"])
                  for row in table["floors"] for path, cell in row["cells"].items()}  # fmt: skip
        manifest = _at_hand(made["scale"], task)
        if manifest and manifest["hash"] == table["data"]["hash"]:
            right = stated == _by_place(manifest)
        else:
            mine = [record["data"] for (of, _, _), record in records.items() if of == task]
            right = all(_by_place(data).items() <= stated.items()
                        for data in mine if data["hash"] == table["data"]["hash"])  # fmt: skip
        if not right:
            yield f"{task}: expected the floors of its records or data in tables.json, found others"


def _by_place(data: dict[str, Any]) -> dict[tuple[str, str], tuple[float, bool]]:
    """Floors by label and column, each with whether it is a bound."""
    return {(floor.label, floor.path): (floor.value, floor.bound) for floor in floors(data)}


def _speed(scale: str, made: dict[str, Any]) -> Iterator[str]:
    """Faults in the measurements of speed; whether they are of the present sources is the report's to say."""
    try:
        measured = measurements.all_of(scale)
    except UserError as error:
        yield str(error)
        return
    wanted = [speed.summary(one, one["settings"]) | {"differs": None} for one in measured]
    if [one | {"differs": None} for one in made["speed"]] != json.loads(json.dumps(wanted)):
        yield "speed: expected the measurements of the ledger in tables.json, found others"
    for one in measured:
        name = measurements.name(one["environment"])
        yield from (f"speed, {name}: {where}: expected the figures that its single times give, found others"
                    for where, stated, wanted in _timed(one) if not _close(stated, wanted))  # fmt: skip


def _timed(measurement: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(where, figures stated, figures by the times of single calls), of the comparisons that have these."""
    layer = measurement["layer"]
    shapes = [(f"batch {cell['batch_size']}, T = {cell['length']}, {mode}", cell[mode])
              for cell in (*layer["grid"], *layer["others"]) for mode in ("inference", "training")]  # fmt: skip
    shapes += [(f"one step, batch {found['batch_size']}", found) for found in layer["steps"]]
    for where, found in shapes:
        if times := found.get("times_s"):
            ours, theirs = np.array(times["qrnn"]), np.array(times["lstm"])
            ratios = theirs / ours
            yield where, found, {
                "qrnn_s": np.median(ours), "lstm_s": np.median(theirs), "ratio": np.median(theirs) / np.median(ours),
                "ratio_min": ratios.min(), "ratio_max": ratios.max(),
            }  # fmt: skip
    for task, found in measurement["steps"].items():
        if times := found.get("times_ms"):
            ours, theirs = np.array(times["qrnn"]), np.array(times["lstm"])
            yield task, found, {
                "ms": {"qrnn": _spread(ours), "lstm": _spread(theirs)}, "ratio": theirs.sum() / ours.sum(),
                "ratios": _spread(theirs / ours),
            }  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": np.median(values), "p10": np.percentile(values, 10), "p90": np.percentile(values, 90)}


def _close(stated: Any, wanted: Any) -> bool:
    """Whether every figure wanted is stated, to rounding."""
    if isinstance(wanted, dict):
        return all(_close(stated[name], value) for name, value in wanted.items())
    return math.isclose(stated, wanted, rel_tol=1e-9)


def _texts(scale: str, made: dict[str, Any], records: list[Record]) -> Iterator[str]:
    """Faults in what is printed from the tables: metrics.json and report.md."""
    folder = paths.results(scale)
    metrics = {task: tables.metrics(tables.current(table["models"], [r for r in records if r["task"] == task]))
               for task, table in made["tables"].items()}  # fmt: skip
    if _json(paths.metrics(scale)) != metrics:
        yield f"{paths.metrics(scale).name}: expected the figures of the records, found others"
    drawn = {task: file for task in made["tables"] if (folder / (file := f"figures/curves-{task}.svg")).is_file()}
    if any(row["turns"] for table in made["tables"].values() for row in table["models"]):
        drawn[states.NAME] = f"figures/{states.NAME}.svg"
    drawn |= {one["machine"]: f"figures/speed-{one['name']}.svg" for one in made["speed"]}
    report = folder / "report.md"
    text = markdown.report(made, claims.findings(made), records, drawn)
    if not report.is_file() or report.read_text(encoding="utf-8") != text:
        yield "report.md: expected the text that tables.json and the records give, found another"
