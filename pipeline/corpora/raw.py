"""Raw text: one layout a task whatever the route, closed by provenance.json.

    ptb      train.txt valid.txt test.txt       a sentence a line, as Mikolov's files
    imdb     train.jsonl test.jsonl             {"label": 0 or 1, "text": ...} a line, sorted by text, then label
             glove.txt                          where word vectors were asked for, in GloVe's own text format
    iwslt    {train,dev,test}.{de,en}           line n of both sides is a pair

provenance.json names the route, its addresses or revisions, the sha256 of every file and what deviates from the paper.
It holds no time and no path of a machine: the same route gives the same bytes.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import UserError

PROVENANCE = "provenance.json"


def deviation(name: str, text: str) -> dict[str, str]:
    """What differs from the paper: a name for records, a sentence for footnotes."""
    return {"id": name, "text": text}


def cuts(task: str, unit: str, wanted: dict[str, int | None], whole: dict[str, int]) -> list[dict[str, str]]:
    """The deviations of splits of which fewer are wanted (None: all) than there are in the whole."""
    return [
        deviation(f"{task}-{split}-cut", f"{count:,} {unit} of the {split} set only")
        for split, count in wanted.items()
        if count is not None and count < whole[split]
    ]


def seal(folder: Path, route: str, deviations: list[dict[str, str]], **facts: Any) -> None:
    """Writes provenance.json over the files of a raw folder."""
    hashes = {path.name: files.sha256_file(path) for path in sorted(folder.iterdir()) if path.name != PROVENANCE}
    files.write_json(folder / PROVENANCE, {"route": route, "files": hashes, "deviations": deviations, **facts})


def provenance(folder: Path) -> dict[str, Any]:
    """provenance.json of a raw folder, its files checked against it.

    Raises:
        UserError: a file is missing or differs from what was fetched, provenance.json among them.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise UserError(f"{path}: no raw text; expected what the fetch stage makes")
    try:
        facts = json.loads(path.read_bytes())
        hashes = facts["files"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected what the fetch stage writes ({error}); run it again") from None
    for name, expected in hashes.items():
        found = files.sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if found != expected:
            raise UserError(f"{folder / name}: expected sha256 {expected}, found {found}; run the fetch stage again")
    return facts


def source(facts: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of where its text came from."""
    return {key: value for key, value in facts.items() if key not in ("deviations", "floors", "counts")}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def read_lines(path: Path) -> list[str]:
    """Lines as `\\n` alone divides them: text may hold other characters that Python takes for line ends.

    Raises:
        UserError: no UTF-8 text.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from None
    return lines[:-1] if lines[-1] == "" else lines


def write_reviews(path: Path, reviews: Iterable[tuple[int, str]]) -> None:
    """(label, text) in canonical order, white space around a text cut off: every route gives the same bytes."""
    ordered = sorted((text.strip(), int(label)) for label, text in reviews)
    write_lines(path, (json.dumps({"label": label, "text": text}, ensure_ascii=False) for text, label in ordered))


def one_line(text: str) -> str:
    """Text with every run of white space made one space."""
    return " ".join(text.split())


def spread(wanted: int | None, total: int) -> Iterator[int]:
    """`wanted` of `total` row numbers at even steps, so that a cut corpus still has something of every part."""
    count = total if wanted is None else min(wanted, total)
    return (index * total // count for index in range(count))
