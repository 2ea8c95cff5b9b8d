"""Every path of the project, named once.

`QRNN_ROOT` moves what the pipeline reads and writes (not the code) to another folder: tests use it, and a node of a
cluster that mounts the project elsewhere.
"""

import os
from pathlib import Path

CODE = Path(__file__).resolve().parent.parent


def root() -> Path:
    return Path(os.environ.get("QRNN_ROOT", CODE)).resolve()


def params_file() -> Path:
    return root() / "params.yaml"


def raw(scale: str, task: str) -> Path:
    return root() / "data" / scale / "raw" / task


def processed(scale: str, task: str) -> Path:
    return root() / "data" / scale / "processed" / task


def downloads() -> Path:
    """Downloaded bytes by their hash, shared by the scales."""
    return root() / "data" / "downloads"


def ledger(scale: str | None = None) -> Path:
    return root() / "ledger" / scale if scale else root() / "ledger"


def run(scale: str, task: str, model: str, seed: int) -> Path:
    """Working folder of one trial: checkpoint and progress, never evidence."""
    return root() / "runs" / scale / task / model / f"seed-{seed}"


def results(scale: str) -> Path:
    return root() / "results" / scale


def trials(scale: str, task: str) -> Path:
    """What `tune@task` found done: the keys and statuses of its trials."""
    return root() / "data" / scale / "trials" / f"{task}.json"


def speed(scale: str) -> Path:
    """What stage `speed` found: the name and hash of this machine's measurement."""
    return root() / "data" / scale / "speed.json"


def tune_state(name: str) -> Path:
    """Ray Tune's own files of one fan-out; rebuilt every time."""
    return root() / "runs" / "tune" / name


def metrics(scale: str) -> Path:
    return results(scale) / "metrics.json"
