"""What an unfinished trial needs to go on as if it had never stopped, after each epoch.

No generator states are kept: every epoch draws its random streams from (seed, epoch).
"""

import dataclasses
import pickle
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import files
from pipeline.errors import UserError
from pipeline.ledger import Identity


@dataclass
class State:
    """Where a trial stands between two epochs, besides model and optimiser.

    `selected` holds the weights of the epoch to be tested, `best` its validation metric; `curve` has an entry an epoch.
    """

    epoch: int = 0
    best: float | None = None
    selected_epoch: int = 0
    selected: dict[str, torch.Tensor] | None = None
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    started_at: float = dataclasses.field(default_factory=time.time)
    peak_bytes: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint file of one trial; one of another recipe, data or sources is as good as none."""

    file: Path
    identity: Identity

    def save(self, state: State, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        content = {
            "identity": dataclasses.asdict(self.identity),
            "state": dataclasses.asdict(state),
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        try:
            with files.replacing(self.file) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            raise UserError(
                f"{self.file}: the checkpoint could not be written: {str(error).splitlines()[0]}"
            ) from error

    def load(self, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> State:
        """Restores model and optimiser; returns the state to go on from, a fresh one where there is no checkpoint.

        Raises:
            UserError: the file cannot be read as a checkpoint.
        """
        if not self.file.is_file():
            return State()
        try:
            content = torch.load(self.file, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{self.file}: expected a checkpoint ({reason}); remove it to start anew") from None
        if content["identity"] != dataclasses.asdict(self.identity):
            return State()
        model.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
        return State(**content["state"])

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
