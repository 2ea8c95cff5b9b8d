"""Tables, figures, metrics and report.md of a scale, from the ledger: results/<scale>."""

import sys

from pipeline.errors import guarded
from pipeline.params import load
from pipeline.report import write
from stages import arguments


def main() -> None:
    chosen = arguments(__doc__, task=False)
    print(f"report: {write(load(), chosen.scale)}")


if __name__ == "__main__":
    sys.exit(guarded(main))
