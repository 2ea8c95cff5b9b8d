"""Loss curves of every cell of scale sample as this code gave them once: `python -m tests.golden_curves` writes them.

A guard against changes that nobody meant, and no proof of anything: the curves come from the code under test. Where a
change of the numbers is meant, write them anew, and say why in the commit.

A curve is of the trial itself (`pipeline.trial.Training`: its seed, order, warm start and update) with the recipe of
params.yaml, on the CPU with one thread in float32: the loss of each of the first steps, then one validation. The data
are the generated corpora of scale sample, cut short. Of clipping only PTB's curves know: the gradients of the other
tasks stay below their thresholds.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline import files, machine, paths
from pipeline.corpora import corpus
from pipeline.params import Params, Trial, load
from pipeline.trial import Training

FILE = paths.CODE / "tests" / "golden" / "curves.json"
COMMAND = "python -m tests.golden_curves"
STEPS = 20
SEED = 1
DIGITS = 8  # significant ones, all that a float32 has
# Relative. All curves agreed to 5e-7 between 1 and 2 threads, between MKL's and oneDNN's products, and with torch and
# oneDNN held to AVX2, or those and numba to SSE4 (an AMD EPYC, torch 2.13; no other maker's processor was at hand).
# 1 % off the learning rate moves each curve by 3e-4 or more.
TOLERANCE = 1e-5
VALIDATION = {"imdb": "loss", "ptb": "perplexity", "iwslt": "bits_per_character"}
Curve = dict[str, Any]
SIZES = {  # of the corpora: enough for STEPS batches of an epoch
    "imdb": {"train": 720, "test": 2},
    "ptb": {"train": 1400, "valid": 100, "test": 2},
    "iwslt": {"train": 400, "valid": 40, "test": 2},
}


@contextlib.contextmanager
def corpora(params: Params) -> Iterator[None]:
    """A root of its own with the processed data of all three tasks; gone at the end."""
    before = os.environ.get("QRNN_ROOT")
    with tempfile.TemporaryDirectory() as root:
        os.environ["QRNN_ROOT"] = root
        try:
            for task, sizes in SIZES.items():
                blocks, raw = params.task("sample", task), paths.raw("sample", task)
                corpus(task).fetch(dataclasses.replace(blocks.fetch, **sizes), raw)
                corpus(task).process(blocks.preprocess, raw, paths.processed("sample", task))
            yield
        finally:
            del os.environ["QRNN_ROOT"]
            if before is not None:
                os.environ["QRNN_ROOT"] = before


def curve(trial: Trial, threads: int = 1) -> Curve:
    """The data's hash, the mean loss of each step in nats, and the validation after the last, as `VALIDATION` names it.

    The recipe is the trial's own, so that a test can change it.
    """
    training = Training(trial, machine.select("cpu", threads, "float32"), report=lambda _: None)
    training.optimiser.start_epoch(1)
    training.warm_up()
    losses = [step.nats.item() / step.weight for step in itertools.islice(training.descend(1), STEPS)]
    training.model.eval()
    valid = training.task.validate(training.model)[VALIDATION[trial.cell.task]]
    return {"data": training.task.data.hash, "losses": [_short(loss) for loss in losses], "valid": _short(valid)}


def trials(params: Params) -> dict[str, Trial]:
    """Of all cells, by `task/model`."""
    cells = params.cells("sample")
    return {f"{cell.task}/{cell.model}": params.trial("sample", cell.task, cell.model, SEED) for cell in cells}


def differences(name: str, expected: Curve, got: Curve) -> list[str]:
    """What of a curve is off by more than TOLERANCE, a line each."""
    if got["data"] != expected["data"]:
        return [f"{name}: expected data {expected['data'][:12]}, got {got['data'][:12]}: the generated corpus changed"]
    steps = [(f"step {n}", *pair) for n, pair in enumerate(zip(expected["losses"], got["losses"], strict=True), 1)]
    valid = (f"validation {VALIDATION[name.partition('/')[0]]}", expected["valid"], got["valid"])
    return [f"{name} {what}: expected {old}, got {new} (off by {abs(new - old) / abs(old):.1e})"
            for what, old, new in (*steps, valid) if not abs(new - old) <= TOLERANCE * abs(old)]  # fmt: skip


def draws() -> str:
    """Hash of what torch's generator gives here for a fixed seed.

    Builds of torch differ in it (some take MKL's generator for dropout). Where it differs, dropout, zoneout and the
    weights' first values do, and no curve can be compared.
    """
    generator = torch.Generator().manual_seed(SEED)
    drawn = [
        torch.empty(4096).bernoulli_(0.9, generator=generator),
        torch.empty(4096).uniform_(-1, 1, generator=generator),
        torch.empty(4096).normal_(generator=generator).mul(1e3).round(),
        torch.randint(2**16, (4096,), generator=generator),
    ]
    return hashlib.sha256(b"".join(np.asarray(values).tobytes() for values in drawn)).hexdigest()[:20]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def main() -> None:
    params = load(paths.CODE / "params.yaml")
    with corpora(params):
        result = {name: curve(trial) for name, trial in trials(params).items()}
    files.write_json(FILE, {"torch": torch.__version__, "draws": draws(), "steps": STEPS, "curves": result})
    print(f"written: {FILE}")


if __name__ == "__main__":
    sys.exit(main())
