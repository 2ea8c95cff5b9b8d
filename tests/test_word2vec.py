"""Word vectors of the training text: the step against torch, draws by hand, the same bytes anywhere, the data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_corpora import IMDB, REVIEWS, imdb_raw
from torch.nn.functional import logsigmoid

from pipeline import paths
from pipeline.corpora import imdb, raw, vectors, word2vec
from pipeline.errors import UserError
from pipeline.params import ImdbPreprocess
from pipeline.processed import Processed

PROGRAM = """
import hashlib, numpy as np
from pipeline.corpora import word2vec
documents = [np.arange(100) * (n + 3) % 50 for n in range(20)]
print(hashlib.sha256(word2vec.train(documents, 50, 12).tobytes()).hexdigest())
"""
# As found where this was written (AMD, AVX512). Another value on another machine means data of another hash there.
EXPECTED = "6895800114a48825b2ef44ba89cef23921d87d5b4106e1a82001512f32e3d5ef"


def test_step_is_gradient_descent() -> None:
    """Against torch; the step adds the mean's whole gradient to every word of the context, as word2vec does."""
    random = np.random.default_rng(0)
    before, outputs = (random.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
    mean, other = (torch.tensor(before[[1, 3]]).mean(0).requires_grad_(), torch.tensor(outputs).requires_grad_())
    (-logsigmoid(other[2] @ mean) - word2vec.NEGATIVES * logsigmoid(-other[4] @ mean)).backward()
    after, changed, rate = before.copy(), outputs.copy(), np.float32(1e-3)
    state, scratch = np.array([7], dtype=np.uint64), np.empty((2, 4), np.float32)
    word2vec._guess(
        np.array([1, 2, 3]), 1, np.array([4]), word2vec._sigmoid(), after, changed, state, rate, scratch[0], scratch[1]
    )
    # 1e-2: the sigmoid's steps, and that the five draws of word 4 come one after the other
    np.testing.assert_allclose((before - after)[[1, 3]] / rate, [mean.grad.numpy()] * 2, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose((outputs - changed) / rate, other.grad.numpy(), rtol=1e-2, atol=1e-3)
    assert (after[[0, 2, 4, 5]] == before[[0, 2, 4, 5]]).all()


def test_noise_by_hand() -> None:
    drawn = np.bincount(word2vec._noise(np.array([0, 0, 16, 81])))  # 16 ** 0.75 = 8, 81 ** 0.75 = 27
    assert drawn.tolist() == [0, 0, 2**20 * 8 // 35, 2**20 - 2**20 * 8 // 35]


def test_kept_by_hand() -> None:
    # Shares 0.004 and 0.996 of the text: sqrt(1 / 4) + 1 / 4; sqrt(1 / 996) + 1 / 996.
    assert word2vec._kept(np.array([4, 996])).tolist() == [round(0.75 * 65536), round((996**-0.5 + 1 / 996) * 65536)]


def test_words_of_like_context_come_together() -> None:
    random = np.random.default_rng(0)
    topics = np.array([[2, 3, 4, 5], [6, 7, 8, 9]])
    documents = [random.choice(topics[n % 2], 30) for n in range(400)]
    found = word2vec.train(documents, 10, 8)
    assert (found[:2] == 0).all()
    unit = found[2:] / np.linalg.norm(found[2:], axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[:4, :4].min() > cosines[:4, 4:].max() + 0.5


@pytest.mark.parametrize(
    "changes",
    [{"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "2", "OMP_NUM_THREADS": "2"},
     {"NUMBA_CPU_NAME": "generic", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"}],
    ids=["process", "another", "older-processor"],
)  # fmt: skip
def test_the_same_bytes_in_every_process_and_on_every_machine(changes: dict[str, str]) -> None:
    environment = {**os.environ, **changes}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=paths.CODE, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == [EXPECTED], done.stderr


def test_data_with_vectors_of_their_own_text(tmp_path: Path) -> None:
    folder = imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS[:10])
    raw.seal(folder, "sample", [raw.deviation(imdb.NO_GLOVE, "vectors start at random")])
    imdb.process(ImdbPreprocess(**{**vars(IMDB), "corpus_vectors": 6}), folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    words = len(data.json("vocabulary"))
    assert data.array("embeddings.ids").tolist() == list(range(2, words))
    expected = word2vec.train(list(data.ragged("train")), words, 6)[2:]
    np.testing.assert_array_equal(data.array("embeddings"), expected)
    assert [named["id"] for named in data.manifest["deviations"]] == ["corpus-vectors"]
    assert "6-dimensional" in data.manifest["deviations"][0]["text"]


def test_two_kinds_of_vectors_are_refused(tmp_path: Path) -> None:
    folder = imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS[:10])
    (folder / vectors.FILE).write_text("good" + " 0.1" * 300 + "\n")
    raw.seal(folder, "sample", [])
    with pytest.raises(UserError, match="corpus_vectors: expected null beside embeddings glove, got 6"):
        imdb.process(ImdbPreprocess(**{**vars(IMDB), "corpus_vectors": 6}), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
