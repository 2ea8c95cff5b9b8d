"""Processed data: arrays, text and a vocabulary in one folder, closed by a manifest.

What is kept is a function of the raw text and the parameters alone, byte for byte: `.npy` arrays that trials map into
memory, UTF-8 text, JSON. The data's hash covers those files and nothing else, so the same text got by another route has
the same hash.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files, paths
from pipeline.errors import UserError
from pipeline.params import Trial
from pipeline.schema import defaults

MANIFEST = "manifest.json"
UNKNOWN = "unknown"  # a parameter that one side does not have


class Writer:
    """Collects the files of one processed task; see `writing`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: dict[str, Any] = {}

    def array(self, name: str, values: np.ndarray) -> None:
        np.save(self.folder / f"{name}.npy", np.ascontiguousarray(values), allow_pickle=False)

    def ragged(self, name: str, rows: Sequence[Sequence[int]], dtype: type = np.int32) -> None:
        """Rows of unequal length as `<name>.values` (all rows end to end) and `<name>.offsets` (rows + 1)."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if rows else np.zeros(0, dtype)
        self.array(f"{name}.values", values)
        self.array(f"{name}.offsets", offsets)

    def lines(self, name: str, lines: Sequence[str]) -> None:
        """Text rows, one a line; a line break inside a row is refused."""
        if any("\n" in line for line in lines):
            raise ValueError(f"{name}: a row holds a line break")
        (self.folder / f"{name}.txt").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))

    def json(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_bytes((files.canonical_json(value) + "\n").encode("utf-8"))

    def describe(self, **facts: Any) -> None:
        """Facts for the manifest: counts, floors, source, deviations. Not part of the data's hash."""
        self.description.update(facts)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """Writes a processed folder whole: it appears under its name, manifest included, when the block ends well."""
    with files.replacing_folder(folder) as temporary:
        writer = Writer(temporary)
        yield writer
        hashes = {path.name: files.sha256_file(path) for path in sorted(temporary.iterdir())}
        manifest = {"hash": files.sha256_text(files.canonical_json(hashes)), "files": hashes, **writer.description}
        files.write_json(temporary / MANIFEST, manifest)


class Processed:
    """A processed folder, checked against its manifest and opened whole: what takes its place later changes nothing.

    Raises:
        UserError: the folder is missing, or a file differs from the manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._arrays: dict[str, np.ndarray] = {}
        self._texts: dict[str, str] = {}
        for name, expected in self.manifest["files"].items():
            path = folder / name
            found = files.sha256_file(path) if path.is_file() else "no such file"
            if found != expected:
                raise UserError(f"{path}: expected sha256 {expected}, found {found}; run `dvc repro` again")
            if path.suffix == ".npy":
                self._arrays[path.stem] = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                self._texts[name] = path.read_bytes().decode("utf-8")

    @classmethod
    def of(cls, trial: Trial) -> "Processed":
        """A trial's data.

        Raises:
            UserError: the folder is missing or altered, or was made with other parameters than the trial's.
        """
        data = cls(_folder(trial))
        _require_parameters(trial, data.manifest)
        return data

    @property
    def hash(self) -> str:
        return self.manifest["hash"]

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def ragged(self, name: str) -> "Ragged":
        return Ragged(self.array(f"{name}.values"), self.array(f"{name}.offsets"))

    def lines(self, name: str) -> list[str]:
        return self._texts[f"{name}.txt"].split("\n")[:-1]

    def json(self, name: str) -> Any:
        return json.loads(self._texts[f"{name}.json"])


class Ragged(Sequence[np.ndarray]):
    """Rows of unequal length over one memory-mapped array."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[override]
        index = range(len(self))[index]  # counts a negative one from the end
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{path}: no processed data; expected what `dvc repro` makes of this task")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected a manifest in JSON: {error}; run `dvc repro` again") from None


def manifest_of(trial: Trial) -> dict[str, Any]:
    """The manifest of a trial's data, whose `parameters`, where it has some, are those that the trial asks for.

    Raises:
        UserError: no such data, or made with other parameters.
    """
    manifest = read_manifest(_folder(trial))
    _require_parameters(trial, manifest)
    return manifest


def has_data(trial: Trial) -> bool:
    """Whether there are processed data of a trial's task and scale, whatever they were made with."""
    return (_folder(trial) / MANIFEST).is_file()


def _require_parameters(trial: Trial, manifest: dict[str, Any]) -> None:
    cell = trial.cell
    differing = _differing(trial.preprocess, manifest["parameters"]) if "parameters" in manifest else {}
    if differing:
        expected, got = (_listed({name: pair[side] for name, pair in differing.items()}) for side in (0, 1))
        raise UserError(
            f"{_folder(trial) / MANIFEST}: expected data made with {expected} (params.yaml), got {got}; "
            f"`python -m pipeline repro --scale {cell.scale} preprocess@{cell.task}` makes them anew"
        )


def _folder(trial: Trial) -> Path:
    return paths.processed(trial.cell.scale, trial.cell.task)


def _differing(wanted: Any, made: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(wanted, made) of the parameters that differ, by name. Data older than a parameter are as its default says."""
    expected = dataclasses.asdict(wanted)
    got = {**defaults(wanted), **made}
    pairs = {name: (expected.get(name, UNKNOWN), got.get(name, UNKNOWN)) for name in {**expected, **got}}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {'null' if value is None else value}" for name, value in values.items())
