"""Token arrays, vocabulary and manifest of a task: data/<scale>/processed/<task>."""

import sys

from pipeline import paths
from pipeline.corpora import corpus
from pipeline.errors import guarded
from pipeline.params import load
from stages import arguments


def main() -> None:
    chosen = arguments(__doc__)
    config = load().task(chosen.scale, chosen.task).preprocess
    raw, processed = paths.raw(chosen.scale, chosen.task), paths.processed(chosen.scale, chosen.task)
    corpus(chosen.task).process(config, raw, processed)


if __name__ == "__main__":
    sys.exit(guarded(main))
