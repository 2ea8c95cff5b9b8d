"""The tasks, by name: what the training loop needs to know of each. How their data come about is in `corpora`."""

import importlib

from pipeline.params import TASKS, require
from pipeline.tasks.base import Task


def task_class(name: str) -> type[Task]:
    """The class of a task (imdb: `pipeline.tasks.imdb.Imdb`); raises UserError for a name that is none."""
    module = importlib.import_module(f"pipeline.tasks.{require(name, TASKS, 'task')}")
    return getattr(module, name.capitalize())


__all__ = ["Task", "task_class"]
