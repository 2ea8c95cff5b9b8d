"""The corpora: raw text from its source, and processed data from raw text. One module a task, with one contract:

    fetch(config, folder)          raw text, by whichever route, in one layout; the folder is whole or absent
    process(config, raw, folder)   processed data with its manifest (pipeline/processed.py)

Trials read processed data and import nothing from here.
"""

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from pipeline.params import TASKS, require


class Corpus(Protocol):
    """What the module of a task has. `config` is the task's `fetch` or `preprocess` block of params.yaml."""

    def fetch(self, config: Any, folder: Path) -> None: ...

    def process(self, config: Any, raw: Path, folder: Path) -> None: ...


def corpus(task: str) -> Corpus:
    """The module of a task.

    Raises:
        UserError: unknown task.
    """
    return cast(Corpus, importlib.import_module(f"{__name__}.{require(task, TASKS, 'task')}"))
