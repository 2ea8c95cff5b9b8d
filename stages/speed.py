"""Figure 4 and training steps, timed on this machine unless the ledger has it; what it has: data/<scale>/speed.json."""

import sys

from pipeline import figure4, files, measurements, paths, tracking
from pipeline.errors import guarded
from pipeline.params import load
from stages import arguments


def main() -> None:
    chosen = arguments(__doc__, task=False)
    file = figure4.run(load(), chosen.scale)
    tracking.show([], measurements.all_of(chosen.scale))
    files.write_json(paths.speed(chosen.scale), {
        "sources": measurements.fingerprint(),  # the report, which depends on this file, marks measurements of others
        "file": file.name,
        "sha256": files.sha256_file(file),
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(guarded(main))
