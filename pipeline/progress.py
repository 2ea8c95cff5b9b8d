"""What a running trial tells: to the terminal, to Tune, and to `pipeline status` through a file in its folder."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files, paths
from pipeline.params import Trial

STALE_S = 120.0  # a trial that has told nothing for longer is not running


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Position of a trial, mean loss so far in its epoch, and times in seconds.

    `key` is that of the record to come; `entry`, the epoch's part of the curve, is there when an epoch ends; `doing`
    says what is done instead of training.
    """

    trial: str
    key: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    loss_unit: str
    elapsed_s: float
    left_s: float
    entry: dict[str, Any] | None = None
    doing: str | None = None

    def __str__(self) -> str:
        where = f"{self.trial:<24} epoch {self.epoch}/{self.epochs}"
        left = f"{duration(self.elapsed_s)} gone, {duration(self.left_s)} left"
        if self.doing is not None:
            return f"{where}  {self.doing}  {duration(self.elapsed_s)} gone"
        if self.entry is None:
            return f"{where}  step {self.step}/{self.steps}  loss {self.loss:.3f} {self.loss_unit}  {left}"
        figures = "  ".join(f"{k} {v:.2f}" for k, v in self.entry["valid"].items() if isinstance(v, float))
        return f"{where}  done  loss {self.loss:.3f} {self.loss_unit}  valid: {figures}  {left}"


Report = Callable[[Progress], None]


def leave_note(trial: Trial, progress: Progress) -> None:
    """Writes where the trial stands into its folder, if there is room: no trial is to end for want of a note."""
    with contextlib.suppress(OSError), files.replacing(_note(trial), durable=False) as temporary:
        temporary.write_text(json.dumps({"text": str(progress), "updated_at": time.time()}))


def remove_note(trial: Trial) -> None:
    _note(trial).unlink(missing_ok=True)


def running(trial: Trial, since: float = 0.0) -> str | None:
    """The last words of a trial that is being trained now, told after `since` (seconds since 1970); None if none is."""
    try:
        note = json.loads(_note(trial).read_bytes())
    except (OSError, ValueError):
        return None
    told_at = max(since, time.time() - STALE_S)
    return note["text"].partition(trial.name)[2].strip() if note["updated_at"] > told_at else None


def duration(seconds: float) -> str:
    """Seconds as a reader likes them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def folder(trial: Trial) -> Path:
    """The working folder of a trial: checkpoint, lock and note."""
    return paths.run(trial.cell.scale, trial.cell.task, trial.cell.model, trial.seed)


def _note(trial: Trial) -> Path:
    return folder(trial) / "progress.json"
