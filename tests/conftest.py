"""Shared by the tests: a project root of their own, tiny processed data and recipes."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import params, paths, processed

MIRROR = os.environ.get("QRNN_DATA_MIRROR")
needs_mirror = pytest.mark.skipif(not MIRROR, reason="QRNN_DATA_MIRROR is unset: the real corpora are not at hand")

ray_by_turns = pytest.mark.xdist_group("ray")  # each Ray takes every core of the machine for its own

TINY = {"hidden": 8, "embedding": 8, "layers": 1, "epochs": 2, "batch_size": 4}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` share the device by turns, and skip where there is none; none passes by the reference."""
    import torch

    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.xdist_group("gpu"))
            item.add_marker(pytest.mark.filterwarnings("error:pool:UserWarning"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, so that an element nobody wrote cannot pass; and one seed."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # cuBLAS asks for a setting
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_seed_one_thread() -> Iterator[None]:
    """For models that are too small for threads to help: threads that wait for one another spin."""
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def values() -> dict:
    """params.yaml as plain values, to be changed by a test."""
    return yaml.safe_load((paths.CODE / "params.yaml").read_text())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict) -> Path:
    """An empty project root whose params.yaml has tiny models at scale sample and one seed."""
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    values = copy.deepcopy(values)
    values["seeds"]["sample"] = [1]
    for task in params.TASKS:
        values[task]["sample"]["train"].update(TINY)
    values["imdb"]["sample"]["models"]["qrnn-k4"]["kernel_size"] = [4]
    values["iwslt"]["sample"]["models"]["qrnn"]["encoder_kernel_size"] = [3]
    values["iwslt"]["sample"]["train"]["beam_width"] = 2
    values["ptb"]["sample"]["train"]["unroll"] = 5
    values["speed"]["sample"] = {"batch_sizes": [1], "lengths": [2, 10], "repeats": 1, "steps": 2}
    write_params(tmp_path, values)
    return tmp_path


def write_params(root: Path, values: dict) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(values))


def write_ptb(folder: Path, tokens: int = 200) -> None:
    """A stream that alternates, so that a model can learn it."""
    stream = np.tile(np.array([1, 2, 0], dtype=np.int32), tokens // 3 + 1)
    with processed.writing(folder) as writer:
        for split, length in (("train", tokens), ("valid", tokens // 2), ("test", tokens // 2)):
            writer.array(split, stream[:length])
        writer.json("vocabulary", ["<eos>", "a", "b"])
        describe(writer, floors={"unigram_perplexity": 3.0})


def write_imdb(folder: Path, reviews: int = 16) -> None:
    random = np.random.default_rng(0)
    with processed.writing(folder) as writer:
        for split in ("train", "dev", "test"):
            labels = np.arange(reviews) % 2
            rows = [[2 + label, *random.integers(4, 8, size=random.integers(1, 6)), 2 + label] for label in labels]
            writer.ragged(split, rows)
            writer.array(f"{split}.labels", labels.astype(np.int64))
        writer.json("vocabulary", ["<pad>", "<unk>", "bad", "good", "a", "b", "c", "d"])
        describe(writer, floors={"majority_accuracy": 50.0})


def write_iwslt(folder: Path, pairs: int = 12) -> None:
    """So many pairs a split, with references that know their split and place and are long enough for a BLEU."""
    random = np.random.default_rng(0)
    vocabulary = ["<pad>", "<unk>", "<s>", "</s>", "a", "b", "c", "d"]
    with processed.writing(folder) as writer:
        for split in ("train", "dev", "test"):
            sources = [random.integers(4, 8, size=random.integers(1, 6)).tolist() for _ in range(pairs)]
            targets = [source[::-1] for source in sources]
            writer.ragged(f"{split}.source", sources)
            writer.ragged(f"{split}.target", targets)
            writer.lines(f"{split}.references", [f"{split} b c d {n}" for n in range(pairs)])
        writer.json("vocabulary", vocabulary)
        describe(writer, floors={"source_copy_bleu": 0.0})


def made_with(folder: Path, **parameters: Any) -> None:
    """Writes into the manifest of processed data what they were made with."""
    file = folder / processed.MANIFEST
    file.write_text(json.dumps({**read_json(file), "parameters": parameters}))


def describe(writer: processed.Writer, floors: dict) -> None:
    writer.describe(source={"route": "sample"}, counts={"train": 1}, floors=floors, deviations=[])


LSTMS = ("lstm", "variational")  # the families that evaluate by nn.LSTM


def skip_without_bfloat16_lstm(family: str) -> None:
    """Skips an LSTM's test in bfloat16 where torch has none for this CPU; other families run everywhere."""
    from pipeline.machine import bfloat16_lstm_runs

    if family in LSTMS and not bfloat16_lstm_runs():
        pytest.skip("torch has no bfloat16 LSTM for this CPU, which wants AVX-512")


@pytest.fixture
def data(root: Path) -> Path:
    """The root with tiny processed data for all three tasks."""
    write_ptb(paths.processed("sample", "ptb"))
    write_imdb(paths.processed("sample", "imdb"))
    write_iwslt(paths.processed("sample", "iwslt"))
    return root


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=paths.CODE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
