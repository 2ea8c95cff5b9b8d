"""Hugging Face `datasets` as the pipeline uses it: no cache that outlives the work, no bars, errors in one line."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.corpora.progress import Progress
from pipeline.corpora.raw import one_line
from pipeline.errors import UserError

ROWS_AT_A_TIME = 2500


class Library:
    """Loads and maps tables in a cache folder of their own."""

    def __init__(self, cache: Path) -> None:
        import datasets
        import datasets.exceptions

        datasets.disable_progress_bars()
        self._datasets, self._cache = datasets, str(cache)

    def load(self, kind: str, files: str | list[str], **options: Any) -> Any:
        """Rows of files of one kind: json | parquet.

        Raises:
            OSError: a file cannot be read, or the disk of the cache is full.
            UserError: anything else that `datasets` says of it.
        """
        with self._plainly():
            return self._datasets.load_dataset(kind, data_files=files, split="train", cache_dir=self._cache, **options)

    def map(self, rows: Any, function: Callable[..., dict[str, Any]], what: str, **options: Any) -> Any:
        """`rows.map` over batches, in several processes where there are rows enough, with progress shown.

        Raises:
            OSError, UserError: as `load`.
        """
        parts, workers = [], _workers(len(rows))
        with self._plainly(), Progress(what, len(rows), "rows") as progress, _environment():
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                part = rows.select(range(start, min(start + ROWS_AT_A_TIME, len(rows))))
                parts.append(part.map(function, batched=True, batch_size=250, num_proc=workers, **options))
                progress.add(len(part))
        return self._datasets.concatenate_datasets(parts)

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        """Has the cause of an error of the library's told in its place."""
        try:
            yield
        except FileNotFoundError:  # of the library's errors those that say enough
            raise
        except self._datasets.exceptions.DatasetsError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise UserError(one_line(str(error.__cause__ or error))) from None


def _workers(rows: int) -> int | None:
    """Processes for a map; None: in this one, which is faster for few rows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) if rows > 2 * ROWS_AT_A_TIME and cores > 1 else None


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Keeps the object `os.environ`: a map in several processes leaves a copy in its place, and who holds the old one
    no longer sees or makes changes."""
    environment = os.environ
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003


@contextlib.contextmanager
def library() -> Iterator[Library]:
    """A `Library` whose cache is removed when the block ends."""
    with tempfile.TemporaryDirectory(prefix="qrnn-datasets-") as cache:
        yield Library(Path(cache))
