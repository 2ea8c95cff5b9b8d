"""What dvc.yaml calls: each stage parses, calls and writes."""

import argparse

from pipeline.params import SCALES, TASKS


def arguments(description: str | None, task: bool = True) -> argparse.Namespace:
    """--scale, and --task where the stage is one of a task."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--scale", required=True, choices=SCALES)
    if task:
        parser.add_argument("--task", required=True, choices=TASKS)
    return parser.parse_args()
