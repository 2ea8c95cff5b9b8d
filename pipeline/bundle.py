"""Code and processed data in one file, for a machine without a network; its records come back through `import`."""

import io
import json
import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipeline import files, machine, paths
from pipeline.processed import Processed

ROOT = "qrnn-bundle"  # the one folder in the archive
CODE = ("qrnn", "pipeline")
LIMIT_BYTES = 64 * 2**20  # what small transfers take; a larger bundle is written all the same, and said to be larger


def write(scale: str, tasks: Iterable[str], target: Path) -> int:
    """Writes a .tar.xz with the code, params.yaml and the processed data of `tasks`; returns its size in bytes.

    The same content gives the same bytes: members are sorted and carry no times, owners or modes of this machine.

    Raises:
        UserError: a task has no processed data, or it differs from its manifest.
    """
    members = {f"{name}": paths.CODE / name for name in _code()}
    members["params.yaml"] = paths.params_file()
    for task in tasks:
        folder = paths.processed(scale, task)
        Processed(folder)  # checks every file against the manifest
        for file in sorted(folder.iterdir()):
            members[f"data/{scale}/processed/{task}/{file.name}"] = file
    with files.replacing(target) as temporary:
        with lzma.open(temporary, "wb", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
            for name, file in sorted(members.items()):
                _add(archive, name, file.read_bytes())
            _add(archive, machine.REVISION, json.dumps(machine.revision()).encode())
        return temporary.stat().st_size


def _code() -> list[str]:
    found = [file for folder in CODE for file in (paths.CODE / folder).rglob("*") if file.suffix in (".py", ".json")]
    return [file.relative_to(paths.CODE).as_posix() for file in found]


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(f"{ROOT}/{name}")
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
