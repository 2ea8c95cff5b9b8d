"""Figure 3 in the report: what a classifier's last layer does over the review that the paper shows."""

from collections.abc import Sequence
from typing import Any

from pipeline import figure3
from pipeline.report.text import plain

NAME = "states"  # of its picture among the report's

Record = dict[str, Any]
Row = dict[str, Any]


def turns(done: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By seed, of the trials whose records have states: `figure3.turns`."""
    return {str(record["seed"]): figure3.turns(record["states"]) for record in done if record.get("states")}


def shown(rows: Sequence[Row], records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Label and record of the first seed of each model that has states, in the table's order."""
    found = []
    for row in rows:
        if row["turns"]:
            first = (row["model"], min(map(int, row["turns"])))
            record = next(record for record in records if (record["model"], record["seed"]) == first)
            found.append((f"{row['label']}, seed {record['seed']}", record))
    return found


def section(rows: Sequence[Row], figure: str | None) -> list[str]:
    """Lines of the section; none where no record has states."""
    if figure is None:
        return []
    return [
        "## Figure 3. Hidden states over one review", "",
        "The last layer's states (of a QRNN c, of an LSTM h) over the review of the test set that the paper's Figure 3 "
        f"shows, found by what its caption quotes. By the cosine to the state before *{figure3.WEAK}*:", "",
        *(f"- {plain(row['label'])}: {_cosines(row['turns'])}" for row in rows if row["turns"]), "",
        f"![states over one review]({figure})", "",
    ]  # fmt: skip


def _cosines(by_seed: dict[str, dict[str, float]]) -> str:
    return "; ".join(f"{one['fallen']:.2f} after *{figure3.BAD}*, {one['recovered']:.2f} after *{figure3.RECOMMENDED}* "
                     f"(seed {seed})" for seed, one in by_seed.items())  # fmt: skip
