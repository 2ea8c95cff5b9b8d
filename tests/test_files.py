"""Writing that is whole or absent, at every moment."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import files


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with two files."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("old")
    return folder


def content(folder: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None


def replace(folder: Path) -> None:
    with files.replacing_folder(folder) as temporary:
        (temporary / "c").write_text("new")


def test_a_folder_takes_the_place_of_another(old: Path) -> None:
    replace(old)
    assert content(old) == {"c": "new"}
    assert list(old.parent.iterdir()) == [old]


def test_of_a_folder_no_part_has_its_name_at_any_moment(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed between any two calls to the system."""
    seen = []

    def watched(function):
        def call(*arguments, **options):
            seen.append(content(old))
            result = function(*arguments, **options)
            seen.append(content(old))
            return result

        return call

    for module, name in ((os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    replace(old)
    assert {"a": "old", "b": "old"} in seen
    assert all(found in ({"a": "old", "b": "old"}, None, {"c": "new"}) for found in seen)


def test_a_folder_that_cannot_be_replaced_stays(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename
    refusals: Iterator[bool] = iter([False, True, False])  # the old one aside, the new one in, the old one back

    def refusing(source: Path, target: Path) -> None:
        if next(refusals):
            raise PermissionError("held")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(PermissionError, match="held"):
        replace(old)
    assert content(old) == {"a": "old", "b": "old"}
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize(("mask", "modes"), [(0o077, (0o600, 0o700)), (0o002, (0o664, 0o775))])
def test_what_is_written_is_readable_as_the_users_umask_says(tmp_path: Path, mask: int, modes: tuple[int, int]) -> None:
    before = os.umask(mask)
    try:
        files.write_text(tmp_path / "file", "")
        replace(tmp_path / "folder")
    finally:
        os.umask(before)
    assert tuple((tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")) == modes
