"""The models can learn: one batch by heart, and to copy and to reverse strings they have not seen."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import paths, processed
from pipeline.optimise import Optimiser, initialise
from pipeline.params import load
from pipeline.processed import Processed
from pipeline.tasks import Task, task_class
from qrnn import make_stack
from qrnn.models import Seq2Seq, beam_search
from qrnn.models.seq2seq import pad_rows

PARAMS = load(paths.CODE / "params.yaml")
CELLS = [(cell.task, cell.model) for cell in PARAMS.cells("sample")]
WORDS = 20  # of the vocabularies here; the first 4 are reserved
BATCH = 8
UNROLL = 12
EOS, BOS, IGNORED = 0, 1, -100
SYMBOLS = range(2, 12)
HIDDEN, EMBEDDING = 64, 16  # of the translators

Strings = list[tuple[int, ...]]

pytestmark = pytest.mark.usefixtures("one_seed_one_thread")


def strings(random: np.random.Generator) -> list[list[int]]:
    return [random.integers(4, WORDS, size=random.integers(4, 9)).tolist() for _ in range(BATCH)]


def write_noise(folder: Path) -> None:
    """One batch for any task, in which nothing follows from anything: it can only be learnt by heart."""
    random = np.random.default_rng(0)
    with processed.writing(folder) as writer:
        # The stream's columns begin after unlike tokens, else their first targets could not be told apart.
        stream = random.integers(1, WORDS, size=(BATCH, UNROLL))
        stream[:, -1] = random.permutation(np.arange(1, WORDS))[:BATCH]
        writer.array("train", stream.flatten().astype(np.int32))
        writer.ragged("train", strings(random))
        writer.array("train.labels", random.permutation(np.arange(BATCH) % 2).astype(np.int64))
        writer.ragged("train.source", strings(random))
        writer.ragged("train.target", strings(random))
        writer.json("vocabulary", ["<eos>", *(f"w{i}" for i in range(1, WORDS))])


def batch_by_heart(task: str, model: str, folder: Path, **changes: Any) -> Task:
    """The task of a row of params.yaml on one batch: small, with all that the row says of layers and optimiser."""
    recipe = PARAMS.trial("sample", task, model, 1).recipe
    small = {"hidden": 32, "embedding": 16, "batch_size": BATCH, "learning_rate": 0.01}
    if task == "ptb":
        small["unroll"] = UNROLL
    write_noise(folder)
    return task_class(task)(Processed(folder), dataclasses.replace(recipe, **small, **changes), torch.device("cpu"))


def nats(task: Task, model: torch.nn.Module) -> float:
    """A prediction's mean negative log-likelihood over the training data, without dropout and zoneout."""
    model.eval()
    with torch.no_grad():
        (step,) = task.steps(model, np.random.default_rng(0))
    model.train()
    return step.nats.item() / step.weight


@pytest.mark.parametrize(("name", "row"), CELLS)
def test_every_model_learns_a_batch_by_heart(tmp_path: Path, name: str, row: str) -> None:
    """From chance to next to nothing. Dropout and zoneout are the row's own while it trains."""
    assert_learns(batch_by_heart(name, row, tmp_path / "data"), np.log(2 if name == "imdb" else WORDS))


@pytest.mark.parametrize("noise", [{"recurrent_dropout": 0.1, "word_dropout": 0.1}, {"zoneout": 0.1}], ids=str)
def test_a_variational_lstm_learns_a_batch_by_heart(tmp_path: Path, noise: dict) -> None:
    task = batch_by_heart("ptb", "lstm", tmp_path / "data", family="variational", **noise)
    assert_learns(task, np.log(WORDS))


def assert_learns(task: Task, chance: float) -> None:
    model = task.model()
    initialise(model, task.recipe)
    assert nats(task, model) == pytest.approx(chance, rel=0.25)
    optimiser = Optimiser(model, task.recipe)
    optimiser.start_epoch(1)
    for _ in range(300):
        (step,) = task.steps(model, np.random.default_rng(0))
        optimiser.step(step.loss)
    assert nats(task, model) < 0.01 * chance


def translator(family: str) -> Seq2Seq:
    wide = {"causal": False, "kernel_size": [3, 2]} if family == "qrnn" else {}
    encoder = make_stack(family, EMBEDDING, HIDDEN, 2, **wide)
    decoder = make_stack(family, EMBEDDING, HIDDEN, 2, context_size=HIDDEN)
    return Seq2Seq(SYMBOLS.stop, None, EMBEDDING, encoder, decoder)


def draw(random: np.random.Generator, count: int) -> Strings:
    """Strings of 3 to 8 symbols."""
    lengths = random.integers(3, 9, size=count)
    return [tuple(random.integers(SYMBOLS.start, SYMBOLS.stop, size=length).tolist()) for length in lengths]


def loss(model: Seq2Seq, sources: Strings, order: int) -> Tensor:
    """Cross-entropy, 0-d, in nats a symbol, of the sources in that order: 1 copies, -1 reverses."""
    targets = [row[::order] for row in sources]
    before, _ = pad_rows([(BOS, *row) for row in targets], EOS)
    after, _ = pad_rows([(*row, EOS) for row in targets], IGNORED)
    logits = model(*pad_rows(sources, EOS), before)
    return F.cross_entropy(logits.flatten(0, 1), after.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def matches(model: Seq2Seq, order: int, sources: Strings) -> float:
    """The share of strings whose greedy translation is exactly the string in that order."""
    model.eval()
    found = beam_search(model, *pad_rows(sources, EOS), bos=BOS, eos=EOS, width=1)
    return float(np.mean([tuple(target) == row[::order] for target, row in zip(found, sources, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1], ids=["copy", "reverse"])
@pytest.mark.parametrize("family", ["qrnn", "lstm"])
def test_a_translator_learns_to_copy_and_to_reverse(family: str, order: int) -> None:
    """Strings held out of training come out right; of an untrained model, or in the other order, they do not."""
    model, random = translator(family), np.random.default_rng(1)
    held_out = draw(random, 200)
    assert matches(model, order, held_out) == 0.0
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.005)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=500)
    for _ in range(500):
        optimiser.zero_grad()
        loss(model, [row for row in draw(random, 64) if row not in held_out], order).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        falling.step()
    assert matches(model, order, held_out) >= 0.9
    assert matches(model, -order, held_out) < 0.1  # but for palindromes
