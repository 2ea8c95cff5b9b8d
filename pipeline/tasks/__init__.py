"""The tasks, by name: what the training loop needs to know of each. How their data come about is in `corpora`."""

from pipeline.params import TASKS, require
from pipeline.tasks.base import Task


def task_class(name: str) -> type[Task]:
    """The class of a task; raises UserError for a name that is none."""
    from pipeline.tasks.imdb import Imdb
    from pipeline.tasks.iwslt import Iwslt
    from pipeline.tasks.ptb import Ptb

    return {"imdb": Imdb, "ptb": Ptb, "iwslt": Iwslt}[require(name, TASKS, "task")]


__all__ = ["Task", "task_class"]
