"""Raw text of a task, from its source, checked against pinned hashes: data/<scale>/raw/<task>."""

import sys

from pipeline import paths
from pipeline.corpora import corpus
from pipeline.errors import guarded
from pipeline.params import load
from stages import arguments


def main() -> None:
    chosen = arguments(__doc__)
    config = load().task(chosen.scale, chosen.task).fetch
    corpus(chosen.task).fetch(config, paths.raw(chosen.scale, chosen.task))


if __name__ == "__main__":
    sys.exit(guarded(main))
