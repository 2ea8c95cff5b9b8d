"""The trials of a task that the ledger lacks, fanned out by Ray Tune; the list of what is done: data/<scale>/trials."""

import sys

from pipeline.errors import guarded
from pipeline.params import load
from pipeline.tune import run
from stages import arguments


def main() -> None:
    chosen = arguments(__doc__)
    run(load(), chosen.scale, chosen.task)


if __name__ == "__main__":
    sys.exit(guarded(main))
