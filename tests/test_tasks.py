"""How tasks cut their data into batches, and that what they say of it is what their models are given."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import paths
from pipeline.params import load
from pipeline.processed import Processed
from pipeline.tasks import Task, imdb, iwslt, task_class
from pipeline.tasks.base import Shape, by_positions, padded_shapes, padding_share
from pipeline.tasks.ptb import Ptb, windows

TASKS = ("imdb", "ptb", "iwslt")


def task_of(name: str, device: str = "cpu", model: str = "qrnn") -> Task:
    recipe = load().task("sample", name).recipes[model]
    return task_class(name)(Processed(paths.processed("sample", name)), recipe, torch.device(device))


def given(model: torch.nn.Module, padded: bool) -> list[Shape]:
    """Filled while the model runs: the shapes of its inputs, where those that are padded hold no other token 0."""
    seen: list[Shape] = []

    def look(_: Any, inputs: tuple[Any, ...]) -> None:
        *source, read = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2]
        filled = sum(int((x != 0).sum()) if padded else x.numel() for x in (*source, read))
        seen.append(Shape(read.shape[1], len(read), len(source[0]) if source else 0, filled))

    model.register_forward_pre_hook(look)
    return seen


@pytest.mark.parametrize(("name", "kind"), [*((name, "qrnn") for name in TASKS), ("ptb", "qrnn-zoneout")])
def test_shapes_are_those_of_the_batches(data: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, whose batches are so small here that there are several."""
    monkeypatch.setattr(imdb, "EVALUATION_BATCH", 5)
    monkeypatch.setattr(iwslt, "EVALUATION_POSITIONS", 20)
    monkeypatch.setattr(iwslt.Iwslt, "translate", lambda *_: [""] * 12)  # decoding runs no whole batch
    task = task_of(name, model=kind)
    model = task.model()
    seen = given(model, padded=name != "ptb")
    steps = sum(1 for _ in task.steps(model, np.random.default_rng(3)))
    assert seen == task.shapes(np.random.default_rng(3))
    assert len(seen) == steps == task.steps_per_epoch()
    for test, score in ((False, task.validate), (True, task.test)):
        seen.clear()
        score(model.eval())
        assert seen == task.evaluation_shapes(test=test)
        assert len(seen) > 1 or name == "ptb"


class Known(torch.nn.Module):
    """Predicts the same probabilities everywhere, by logits that are 3 too high."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).log() + 3

    def forward(self, read: torch.Tensor, second: torch.Tensor | None, target: torch.Tensor | None = None) -> Any:
        """As the models of the tasks are called: (reviews, lengths), (tokens, state) or (source, lengths, target)."""
        if target is not None:
            return self.logits.expand(*target.shape, -1)
        if second is None:
            return self.logits.expand(*read.shape, -1), None
        return self.logits.expand(len(second), -1)


def test_figures_of_known_predictions_by_hand(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 16 reviews are good; of 100 tokens 34 are a, 33 b and 33 <eos>; each of 12 translations ends once."""
    monkeypatch.setattr(imdb, "EVALUATION_BATCH", 5)
    monkeypatch.setattr(iwslt, "EVALUATION_POSITIONS", 20)
    found, outputs = task_of("imdb").test(Known(1 / 4, 3 / 4))
    assert outputs == "1" * 16
    assert found == {"accuracy": 50.0, "loss": pytest.approx(math.log(16 / 3) / 2), "reviews": 16}
    ptb = {"perplexity": pytest.approx(2 ** (34 / 100) * 4 ** (66 / 100)), "tokens": 100}
    assert task_of("ptb").test(Known(1 / 4, 1 / 2, 1 / 4))[0] == ptb
    assert task_of("ptb").validate(Known(1 / 4, 1 / 2, 1 / 4)) == ptb
    characters = int(task_of("iwslt").data.ragged("dev.target").lengths.sum())
    bits = (12 * 1 + characters * math.log2(14)) / (12 + characters)
    found = task_of("iwslt").validate(Known(*[1 / 14] * 3, 1 / 2, *[1 / 14] * 4))
    assert found == {"bits_per_character": pytest.approx(bits), "characters": 12 + characters}


def test_zoneout_is_evaluated_by_both_readings(data: Path) -> None:
    """As two models of the same weights are that have one reading each; a model without zoneout has one."""
    task = task_of("ptb", model="qrnn-zoneout")
    model = task.model().eval()
    scaled = Ptb(task.data, dataclasses.replace(task.recipe, zoneout_evaluation="scaled"), task.device)
    other = scaled.model().eval()
    other.load_state_dict(model.state_dict())
    for score, split in (("validate", "valid"), ("test", "test")):
        found, alone = (getattr(one, score)(net) for one, net in ((task, model), (scaled, other)))
        found, alone = (found[0], alone[0]) if split == "test" else (found, alone)
        assert found.keys() == {"perplexity", "perplexity_scaled", "tokens"}
        assert alone == {"perplexity": found["perplexity_scaled"], "tokens": found["tokens"]}
        assert found["perplexity"] != found["perplexity_scaled"]
    assert task_of("ptb").validate(model).keys() == {"perplexity", "tokens"}


def test_outputs_of_ptb_are_nats_by_sentence(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens, a b <eos> over and over, of 1, 2, 3 ... nats: 1 + 2 + 3, 4 + 5 + 6, ... 97 + 98 + 99, 100."""
    monkeypatch.setattr(Ptb, "_nats", lambda *_: torch.arange(1.0, 101.0))
    _, outputs = task_of("ptb").test(torch.nn.Identity())
    assert outputs == [*(3.0 * middle for middle in range(2, 100, 3)), 100.0]


def test_decoded_batches_are_of_all_sentences(data: Path) -> None:
    """12 pairs in one batch of at most 32, as in evaluation with room for all."""
    assert task_of("iwslt").decoding_shapes() == task_of("iwslt").evaluation_shapes(test=True)
    assert task_of("ptb").decoding_shapes() == []


def test_batches_of_so_many_positions_by_hand() -> None:
    """12 positions: 1 x 9, 2 x 6 (18 would be 3), 4 x 3 (one more is left), 1 x 1."""
    lengths = np.array([3, 6, 1, 9, 3, 5, 2, 3])
    batches = by_positions(lengths, 12)
    assert [b.tolist() for b in batches] == [[3], [1, 5], [0, 4, 7, 6], [2]]
    assert [b.tolist() for b in by_positions(lengths, 1)] == [[i] for i in (3, 1, 5, 0, 4, 7, 6, 2)]
    assert [b.tolist() for b in by_positions(np.array([0, 0]), 4)] == [[0, 1]]


def test_padding_by_hand() -> None:
    """Rows of 3 and 2 after sources of 5 and 8, then a row alone: 2 (3 + 8) + (9 + 4) = 35 positions, 31 filled."""
    lengths, source = np.array([3, 9, 2]), np.array([5, 4, 8])
    batches = [np.array([0, 2]), np.array([1])]
    shapes = padded_shapes(lengths, batches, source)
    assert shapes == [Shape(2, 3, 8, 18), Shape(1, 9, 4, 13)]
    assert padding_share(shapes) == pytest.approx(4 / 35)
    assert padded_shapes(lengths, batches) == [Shape(2, 3, 0, 5), Shape(1, 9, 0, 9)]


def test_windows_of_a_stream() -> None:
    """47 tokens in 4 streams are 11 steps: 5, 5 and 1."""
    assert windows(47, 4, 5) == [Shape(4, 5, 0, 20), Shape(4, 5, 0, 20), Shape(4, 1, 0, 4)]
    assert padding_share(windows(47, 4, 5)) == 0


@pytest.mark.parametrize(
    ("name", "module", "size"), [("imdb", imdb, "EVALUATION_BATCH"), ("iwslt", iwslt, "EVALUATION_POSITIONS")]
)
def test_how_evaluation_is_batched_changes_no_figure(
    data: Path, name: str, module: Any, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(name)
    model = task.model().eval()
    figures = []
    for count in (1, 13, 10**6):
        monkeypatch.setattr(module, size, count)
        figures.append(task.validate(model))
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)
    assert figures[2] == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.gpu
def test_tensors_reach_the_device_whole(data: Path) -> None:
    """Pinned copies do not wait, and the host's memory is not taken for the next batch before they are done."""
    task = task_of("ptb", "cuda")
    arrays = [np.full((1000, 1000), number) for number in range(20)]
    for number, tensor in enumerate([task.tensor(array) for array in arrays]):
        assert tensor.device.type == "cuda"
        assert (tensor == number).all()
