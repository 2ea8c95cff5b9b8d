"""Writing that is whole or absent: a temporary file beside the target, fsync, rename; folders by renaming alone."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.errors import Busy


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. What hashes and checksums are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` atomically; on any error the old content stays and no temporary file is left."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path`, which takes its name when the block ends well.

    `durable` waits until the bytes are on the disk, so that the name never stands for less after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keeps other processes, and other callers in this one, out until the block ends or the process does.

    Raises:
        Busy: somebody is in it.
    """
    import filelock

    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = filelock.FileLock(lock, timeout=0).acquire()
    except filelock.Timeout:
        raise Busy(f"{lock}: expected no other process at {what}, got one that runs; wait for its end") from None
    with held:
        yield


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a fresh folder beside `path`, which takes its place when the block ends well.

    The old folder is moved aside first and back where the new one cannot take its place, so that at no moment a part of
    it has the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = _beside(path), _beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            if aside.exists() and not path.exists():
                os.rename(aside, path)
            raise
    finally:
        for left in (temporary, aside):
            shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new hidden name in the same folder. What is made there has the mode that the user's umask gives."""
    return path.with_name(f".{path.name}.{uuid4().hex}")
