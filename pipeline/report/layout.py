"""What the tables look like: metrics, columns, floors and the paper's own figures.

A column is named by the path of its figure in a record, such as `test.accuracy`.
"""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

PUBLISHED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Metric:
    """A kind of figure: its name in words, which direction is better (None: neither), and its least decimals."""

    name: str
    label: str
    better: Literal["higher", "lower"] | None
    decimals: int = 0

    def beats(self, value: float, other: float) -> bool:
        return value > other if self.better == "higher" else value < other

    def places(self, value: float) -> int:
        """Decimals that a figure of this size deserves: three digits in all, or more where the metric has them."""
        digits = 2 - math.floor(math.log10(abs(value))) if value else 0
        return max(self.decimals, min(digits, 4))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy (%)", "higher", 2),
        Metric("perplexity", "perplexity", "lower", 1),
        Metric("bleu", "BLEU", "higher", 2),
        Metric("bits_per_character", "bits per character", "lower", 3),
        Metric("parameters", "parameters", None),
        Metric("epoch_s", "time per epoch", None),
    )
}


@dataclass(frozen=True)
class Column:
    """One column of a table; `path` is where its figure stands in a record. `scaled`: figures carry their own unit."""

    path: str
    heading: str = ""
    scaled: bool = False

    @property
    def metric(self) -> Metric:
        name = self.path.rpartition(".")[2]
        return METRICS.get(name) or Metric(name, name.replace("_", " "), None)

    @property
    def name(self) -> str:
        """The metric, and the split unless it is test."""
        split = self.path.rpartition(".")[0]
        return self.metric.label if split in ("", "test") else f"{self.metric.label}, {split}"

    @property
    def timed(self) -> bool:
        return self.path.startswith("timing.")

    def figure(self, record: dict[str, Any]) -> float | None:
        """The column's figure in a record, None where it has none."""
        return number(dig(record, self.path))

    def text(self, mean: float, std: float | None = None) -> str:
        """A figure with the digits it deserves, and its spread with the same."""
        divisor, unit = self._unit(mean)
        places = self.metric.places(mean / divisor)
        texts = [f"{value / divisor:.{places}f}" if abs(value) < 1e7 * divisor else f"{value / divisor:.2e}"
                 for value in (mean, std) if value is not None]  # fmt: skip
        return " ± ".join(texts) + unit

    def _unit(self, value: float) -> tuple[float, str]:
        if self.path == "parameters":
            return (1e6, "M") if value >= 1e6 else (1e3, "k") if value >= 1e4 else (1, "")
        if self.scaled:
            return (3600, " h") if value >= 3600 else (1, " s")
        return 1, ""


@dataclass(frozen=True)
class Layout:
    """One task's table: `headlines` are the columns that models are compared by, `curve` the metric by epoch."""

    title: str
    columns: tuple[Column, ...]
    headlines: tuple[str, ...]
    curve: str
    comparisons: tuple[tuple[str, str], ...] = ()

    def column(self, path: str) -> Column:
        return next(column for column in self.columns if column.path == path)


LAYOUTS = {
    "imdb": Layout(
        "IMDB: sentiment classification",
        (Column("parameters", "parameters"), Column("timing.epoch_s", "time / epoch (s)"),
         Column("test.accuracy", "test accuracy (%)")),
        ("test.accuracy",), "accuracy", (("qrnn", "lstm"), ("qrnn-k4", "qrnn"), ("qrnn", "nbsvm-bi")),
    ),
    "ptb": Layout(
        "PTB: language modelling",
        (Column("parameters", "parameters"), Column("valid.perplexity", "validation perplexity"),
         Column("test.perplexity", "test perplexity")),
        ("test.perplexity", "valid.perplexity"), "perplexity", (("qrnn", "lstm"), ("qrnn-zoneout", "qrnn")),
    ),
    "iwslt": Layout(
        "IWSLT: German to English, by character",
        (Column("parameters", "parameters"), Column("timing.epoch_s", "train time / epoch", scaled=True),
         Column("test.bleu", "BLEU"), Column("test.bits_per_character", "bits per character")),
        ("test.bleu", "test.bits_per_character"), "bits_per_character", (("qrnn", "lstm"),),
    ),
}  # fmt: skip


def layout(task: str, records: list[dict[str, Any]]) -> Layout:
    """The table of a task; of one that the paper does not have, a table made of what its records measure."""
    if task in LAYOUTS:
        return LAYOUTS[task]
    done = next((record for record in records if record["status"] == "done"), {})
    tested = [name for name in measures(done.get("test")) if name in METRICS] or list(measures(done.get("test")))
    columns = tuple(Column(f"test.{name}", f"test {Column(name).metric.label}") for name in tested)
    curve = next(iter(measures(done.get("valid"))), "loss")
    times = (Column("timing.epoch_s", "time / epoch (s)"),)
    return Layout(task, times + columns, tuple(column.path for column in columns), curve)


@functools.cache
def published() -> dict[str, Any]:
    """The paper's figures, by task and model, each as a number and as the paper prints it."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def measures(metrics: dict[str, Any] | None) -> dict[str, float]:
    """The measured figures among a record's metrics; whole numbers there count what was measured on."""
    return {name: value for name, value in (metrics or {}).items() if isinstance(value, float)}


def dig(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def number(value: Any) -> float | None:
    """A finite number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


@dataclass(frozen=True)
class Floor:
    """A figure to judge models by. A `bound` is the best that any model can reach; others are there to be beaten."""

    label: str
    path: str
    value: float
    bound: bool


_FLOOR_LABELS = {
    "unigram": "Unigram model",
    "entropy_floor": "Exact entropy of the source",
    "true_grammar": "The source's own grammar on this text",
    "bag_of_words": "Bag-of-words classifier",
    "majority": "Majority class",
    "source_copy": "Copying the source",
}
_BOUNDS = ("entropy_floor", "true_grammar")
_SPLITS = {"valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}


def floors(manifest: dict[str, Any] | None) -> list[Floor]:
    """The floors of a manifest. A name such as `unigram_perplexity` says what, by which metric, and of which split."""
    named = flat((manifest or {}).get("floors") or {})
    return [_floor(name, value) for name, value in named if number(value) is not None]


def flat(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their names joined by `_`."""
    for name, item in value.items():
        if isinstance(item, dict):
            yield from flat(item, f"{before}{name}_")
        else:
            yield f"{before}{name}", item


def _floor(name: str, value: float) -> Floor:
    rest, metric = f"_{name}_", ""
    for known in sorted(METRICS, key=len, reverse=True):
        if f"_{known}_" in rest:
            rest, metric = rest.replace(f"_{known}_", "_", 1), known
            break
    split = "test"
    for word, meant in _SPLITS.items():
        if f"_{word}_" in rest:
            rest, split = rest.replace(f"_{word}_", "_", 1), meant
            break
    kind = rest.strip("_") or name
    label = _FLOOR_LABELS.get(kind) or kind.replace("_", " ").capitalize()
    return Floor(label, f"{split}.{metric}" if metric else name, value, kind in _BOUNDS)
