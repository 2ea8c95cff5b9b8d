"""Processed folders: whole or absent, the same bytes each time, checked when opened."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.processed import Processed, writing


def write(folder: Path, first: int = 0, **facts) -> None:
    with writing(folder) as writer:
        writer.array("numbers", np.arange(first, first + 5, dtype=np.int32))
        writer.ragged("rows", [[1, 2], [], [3]])
        writer.lines("texts", ["äöü", "", "a b"])
        writer.json("vocabulary", ["<pad>", "ß"])
        writer.describe(**facts)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    write(tmp_path / "p", counts={"rows": 3})
    data = Processed(tmp_path / "p")
    assert data.array("numbers").tolist() == [0, 1, 2, 3, 4]
    assert [row.tolist() for row in data.ragged("rows")] == [[1, 2], [], [3]]
    assert [data.ragged("rows")[index].tolist() for index in (-1, -3)] == [[3], [1, 2]]
    with pytest.raises(IndexError):
        data.ragged("rows")[3]
    assert data.ragged("rows").lengths.tolist() == [2, 0, 1]
    assert data.lines("texts") == ["äöü", "", "a b"]
    assert data.json("vocabulary") == ["<pad>", "ß"]
    assert data.manifest["counts"] == {"rows": 3}
    assert isinstance(data.array("numbers"), np.memmap)


def test_what_was_opened_stays_whatever_takes_its_place(tmp_path: Path) -> None:
    """A trial reads its test set hours after it opened the folder."""
    write(tmp_path / "p")
    data = Processed(tmp_path / "p")
    with writing(tmp_path / "p") as writer:
        writer.array("numbers", np.zeros(5, dtype=np.int32))
        writer.lines("texts", ["another"])
    assert data.array("numbers").tolist() == [0, 1, 2, 3, 4]
    assert data.lines("texts") == ["äöü", "", "a b"]
    assert data.json("vocabulary") == ["<pad>", "ß"]


def test_a_manifest_cut_short_is_named(tmp_path: Path) -> None:
    write(tmp_path / "p")
    (tmp_path / "p/manifest.json").write_text('{"hash": ')
    with pytest.raises(UserError, match=r"manifest\.json: expected a manifest in JSON: .*; run `dvc repro` again"):
        Processed(tmp_path / "p")


def test_hash_is_of_the_data_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", source="mirror")
    write(tmp_path / "b", source="hub")
    assert Processed(tmp_path / "a").hash == Processed(tmp_path / "b").hash
    write(tmp_path / "c", first=1)
    assert Processed(tmp_path / "c").hash != Processed(tmp_path / "a").hash


def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "p")

    def fail() -> None:
        with writing(tmp_path / "p") as writer:
            writer.array("numbers", np.zeros(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert Processed(tmp_path / "p").array("numbers").size == 5
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_line_break_in_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="texts: a row holds a line break"), writing(tmp_path / "p") as writer:
        writer.lines("texts", ["a\nb"])
    assert not (tmp_path / "p").exists()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/manifest\.json: no processed data"):
        Processed(tmp_path / "nowhere")


@given(rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=6))
def test_ragged_rows_survive(tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("ragged") / "p"
    with writing(folder) as writer:
        writer.ragged("rows", rows)
    assert [row.tolist() for row in Processed(folder).ragged("rows")] == rows
