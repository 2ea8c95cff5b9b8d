"""GloVe word vectors (Pennington et al., 2014; 840B tokens, cased, 300 dimensions) in their own text format."""

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline import sources
from pipeline.corpora import raw as layout
from pipeline.corpora.progress import Progress
from pipeline.errors import UserError

FILE = "glove.txt"
DIMENSIONS = 300
ARCHIVE = sources.Address(
    "https://nlp.stanford.edu/data/glove.840B.300d.zip", "sha1:8084fbacc2dee3b1fd1ca4cc534cbfff3519ed0d", 2176768927
)
PACKED = "glove.840B.300d.subset.txt.xz"


def known(path: Path, vocabulary: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The vectors that the words of a vocabulary have; its first two entries are no words.

    Returns:
        (ids (K,) int64 ascending, vectors (K, 300) float32).

    Raises:
        UserError: a line is not a word and 300 numbers, or no word of the vocabulary has a vector.
    """
    ids = {word: index for index, word in enumerate(vocabulary) if index > 1}
    found: dict[int, list[float]] = {}
    for number, line in enumerate(layout.read_lines(path), 1):
        word, *numbers = line.rsplit(" ", DIMENSIONS)
        if word in ids:
            found[ids[word]] = _numbers(numbers, path, number)
    if not found:
        raise UserError(f"{path}: expected vectors for words of the vocabulary, found none")
    rows = sorted(found)
    return np.array(rows, dtype=np.int64), np.array([found[row] for row in rows], dtype=np.float32)


def from_mirror(mirror: sources.Mirror, folder: Path) -> dict[str, Any]:
    """The mirror's part of the vectors into `folder`; facts for the provenance, deviations among them."""
    packed = mirror.unpack(PACKED, folder / FILE)
    words = len(layout.read_lines(folder / FILE))
    text = f"GloVe vectors for {words:,} of 2.2 million words only; the other words start at random"
    return {"packed": {PACKED: packed}, "words": words, "deviations": [layout.deviation("glove-subset", text)]}


def from_official(folder: Path, wanted: set[str]) -> dict[str, Any]:
    """The vectors of the `wanted` words out of the whole file, which is read as a stream; facts as `from_mirror`."""
    archive = sources.download(ARCHIVE)
    try:
        with zipfile.ZipFile(archive) as unpacked:
            member = next(info for info in unpacked.infolist() if info.filename.endswith(".txt"))
            with unpacked.open(member) as lines, (folder / FILE).open("wb") as target:
                words = _copy_wanted(lines, target, wanted, member.file_size)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{archive}: expected a zip archive with one text file: {error}") from None
    return {"address": ARCHIVE.url, "archive": ARCHIVE.hash, "words": words, "deviations": []}


def _copy_wanted(lines: IO[bytes], target: IO[bytes], wanted: set[str], size: int) -> int:
    words = 0
    with Progress(f"vectors of {len(wanted):,} words", size, "bytes") as progress:
        for line in lines:
            progress.add(len(line))
            if line.rstrip(b"\n").rsplit(b" ", DIMENSIONS)[0].decode("utf-8", "replace") in wanted:
                target.write(line)
                words += 1
    return words


def _numbers(parts: list[str], path: Path, number: int) -> list[float]:
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) != DIMENSIONS:
        raise UserError(f"{path}:{number}: expected a word and {DIMENSIONS} numbers, got {len(parts)} parts after it")
    return values
