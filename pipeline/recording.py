"""The record of a trial, put together: what was run, on what, where, and what came of it."""

import statistics
import time
from typing import Any

from pipeline import ledger, machine
from pipeline.params import Trial
from pipeline.processed import manifest_of

DATA = ("hash", "source", "parameters", "counts", "floors", "deviations")  # of the manifest


def describe(trial: Trial, identity: ledger.Identity, manifest: dict[str, Any], options: str = "") -> dict[str, Any]:
    """What a trial runs: the fields of its record that are known, and must be taken, before it begins.

    `options` are the command's, of the machine it runs on.
    """
    cell = trial.cell
    return {
        "schema": ledger.SCHEMA,
        "key": identity.key,
        "scale": cell.scale,
        "task": cell.task,
        "model": cell.model,
        "seed": trial.seed,
        "command": f"{command(trial)} {options}".rstrip(),
        "config": trial.config,
        "code": {**machine.revision(), "fingerprint": identity.fingerprint},
        "data": {name: manifest.get(name) for name in DATA},
    }


def failed(trial: Trial, error: str, environment: dict[str, Any]) -> ledger.Record:
    """The record of a trial that crashed: it stays in the report, counted and named.

    Raises:
        UserError: no data, or others than the trial asks for: a record of these would not be of this trial.
    """
    manifest = manifest_of(trial)
    nothing = dict.fromkeys(("parameters", "selected_epoch", "valid", "test", "outputs", "states", "peak_bytes"))
    now = time.time()
    return {
        **describe(trial, ledger.identity(trial, manifest["hash"]), manifest),
        **nothing,
        "status": "failed",
        "error": error,
        "environment": environment,
        "curve": [],
        "timing": timing([], None),
        "started_at": now,
        "finished_at": now,
    }


def timing(curve: list[dict[str, Any]], item: str | None) -> dict[str, Any]:
    """Seconds of training (validation apart). Not exclusive: other trials may have run beside this one."""
    seconds = [entry["epoch_s"] for entry in curve]
    speeds = [entry["items_per_s"] for entry in curve]
    return {
        "epoch_s": statistics.median(seconds) if curve else None,
        "items_per_s": statistics.median(speeds) if curve else None,
        "item": item,
        "total_s": sum(seconds),
        "exclusive": False,
    }


def command(trial: Trial) -> str:
    cell = trial.cell
    return f"python -m pipeline trial --scale {cell.scale} --task {cell.task} --model {cell.model} --seed {trial.seed}"
