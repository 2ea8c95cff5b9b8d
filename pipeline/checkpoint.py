"""What an unfinished trial needs to go on, from the end of an epoch, as if it had never stopped.

No generator states are kept: every epoch draws its random streams from (seed, epoch).
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipeline import files
from pipeline.errors import UserError
from pipeline.ledger import Identity

ANEW = "remove checkpoint.json to start anew"
OtherSources = Literal["anew", "refused", "accepted"]


@dataclass
class State:
    """Where a trial stands between two epochs, besides model and optimiser.

    `selected` holds the weights of the epoch to be tested, `best` its validation metric; `curve` has an entry an epoch.
    `machine` is the kind of device and the precision that the trial began with; `environments` are those it was on, and
    `revisions` the code that ran it (a record's `code`), in turn.
    """

    epoch: int = 0
    best: float | None = None
    selected_epoch: int = 0
    selected: dict[str, torch.Tensor] | None = None
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    started_at: float = dataclasses.field(default_factory=time.time)
    peak_bytes: int = 0
    machine: str = ""
    environments: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    revisions: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one trial in its working folder; one of another recipe or data is as good as none.

    One of `other_sources` is as good as none too ("anew"), or not to be lost for an edit ("refused"), or gone on from
    ("accepted").

    `checkpoint-<epoch>.pt` holds the tensors. `checkpoint.json`, written after it, names it with its SHA-256 and says
    whose it is: a stop at any moment leaves the manifest of a whole checkpoint, the new one or the one before.
    """

    folder: Path
    identity: Identity
    other_sources: OtherSources = "anew"

    @property
    def manifest(self) -> Path:
        return self.folder / "checkpoint.json"

    def save(self, state: State, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        file = self.folder / f"checkpoint-{state.epoch}.pt"
        kept = vars(state)
        if state.selected_epoch == state.epoch:
            kept = {**kept, "selected": None}  # they are the model's own
        content = {"state": kept, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        try:
            with files.replacing(file) as temporary:
                torch.save(content, temporary)
            whose = dataclasses.asdict(self.identity)
            files.write_json(self.manifest, {"file": file.name, "sha256": files.sha256_file(file), **whose})
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            raise UserError(f"{file}: the checkpoint could not be written: {str(error).splitlines()[0]}") from error
        self._remove_tensors(but=file)

    def load(self, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device) -> State:
        """Restores model and optimiser; returns the state to go on from, a fresh one where there is no checkpoint.

        Raises:
            UserError: the manifest cannot be read, its file is missing or was altered, or the checkpoint is of other
                sources and refused.
        """
        if not self.manifest.is_file():
            return State()
        found = self._read_manifest()
        if found.get("key") != self.identity.key:
            return State()
        if found.get("fingerprint") != self.identity.fingerprint:
            if self.other_sources == "anew":
                return State()
            if self.other_sources == "refused":
                raise UserError(f"{self.manifest}: expected a checkpoint of the present sources, got one of others; "
                                f"go on with those, take it with --other-sources, or {ANEW}")  # fmt: skip
        file = self._vouched_for(found)
        content = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
        state = State(**content["state"])
        if not state.revisions:  # of a checkpoint made before they were kept
            state.revisions = [{"commit": None, "dirty": None, "fingerprint": found.get("fingerprint")}]
        if state.selected_epoch == state.epoch:
            state.selected = {name: tensor.clone() for name, tensor in content["model"].items()}
        return state

    def _read_manifest(self) -> dict[str, Any]:
        try:
            found = json.loads(self.manifest.read_bytes())
            found["file"], found["sha256"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.manifest}: expected a checkpoint's manifest ({error}); {ANEW}") from None
        return found

    def _vouched_for(self, manifest: dict[str, Any]) -> Path:
        """The file that the manifest names, its bytes checked."""
        file = self.folder / manifest["file"]
        try:
            sha256 = files.sha256_file(file)
        except OSError as error:
            raise UserError(f"{file}: expected a checkpoint ({error.strerror}); {ANEW}") from None
        if sha256 != manifest["sha256"]:
            raise UserError(f"{file}: expected SHA-256 {manifest['sha256']}, found {sha256}; {ANEW}")
        return file

    def remove(self) -> None:
        self.manifest.unlink(missing_ok=True)
        self._remove_tensors()

    def _remove_tensors(self, but: Path | None = None) -> None:
        for pattern in ("checkpoint-*.pt", ".checkpoint-*"):  # the latter of a process that was killed as it wrote
            for file in self.folder.glob(pattern):
                if file != but:
                    file.unlink(missing_ok=True)
