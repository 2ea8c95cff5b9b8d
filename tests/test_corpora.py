"""From raw text to processed data: layouts, splits, vocabularies, floors; every route gives the same bytes."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_mirror

from pipeline import files, params, paths, processed, sources
from pipeline.corpora import corpus, imdb, iwslt, loading, ptb, raw, vectors
from pipeline.corpora.progress import Progress
from pipeline.corpora.sample import translation
from pipeline.corpora.sample.draws import Draws
from pipeline.errors import UserError
from pipeline.params import Fetch, ImdbFetch, ImdbPreprocess, IwsltPreprocess, PtbPreprocess
from pipeline.processed import Processed
from pipeline.sources import Address, Hub, Packed

IMDB = ImdbPreprocess(
    dev_fraction=0.25, split_seed=1, minimum_count=1, vocabulary_size=None, train_reviews=None, test_reviews=None
)
IWSLT = IwsltPreprocess(max_characters=12, train_pairs=None, dev_pairs=None, test_pairs=None)
REVIEWS = [
    (n % 2, f"Film {n}<br /><br />was {'good' if n % 2 else 'bad'}, wasn't it? Seen on day {n}.") for n in range(40)
]
PAIRS = [(f"Haus {n} &amp; so", f"House {n} &amp; so") for n in range(9)]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path / "project"))
    if not any(mark.name == "skipif" for mark in request.node.iter_markers()):
        monkeypatch.delenv("QRNN_DATA_MIRROR", raising=False)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def write_raw(folder: Path, texts: dict[str, str], route: str = "sample", **facts: object) -> Path:
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
    raw.seal(folder, route, facts.pop("deviations", []), **facts)
    return folder


def pack(folder: Path, name: str, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a mirror in `folder`, named by QRNN_DATA_MIRROR and pinned."""
    folder.mkdir(exist_ok=True)
    packed = lzma.compress(text)
    (folder / name).write_bytes(packed)
    monkeypatch.setitem(sources.MIRROR, name, Packed(sha256(packed), len(packed), sha256(text), len(text)))
    monkeypatch.setenv("QRNN_DATA_MIRROR", str(folder))


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def at(path: Path) -> Address:
    return Address(path.as_uri(), f"sha256:{files.sha256_file(path)}", path.stat().st_size)


def tar(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode("utf-8"))
            archive.addfile(member, io.BytesIO(text.encode("utf-8")))
    return path


# ------------------------------------------------------------------------------------------------------------- ptb


def test_ptb_is_one_stream_with_eos_and_a_vocabulary_from_train_alone(tmp_path, capsys):
    text = {"train.txt": " b a b \n <unk> a b \n", "valid.txt": " a new \n", "test.txt": " b \n a \n"}
    folder = write_raw(tmp_path / "raw", text)
    ptb.process(PtbPreprocess(None), folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert data.json("vocabulary") == ["b", "<eos>", "a", "<unk>"]  # by count, ties by word
    assert data.array("train").tolist() == [0, 2, 0, 1, 3, 2, 0, 1]
    assert data.array("valid").tolist() == [2, 3, 1]
    assert data.array("test").tolist() == [0, 1, 2, 1]
    assert {data.array(split).dtype for split in ptb.SPLITS} == {np.dtype(np.int32)}
    assert data.manifest["counts"]["valid_unknown"] == 1
    # add-one smoothed: b 4/12, <eos> 3/12, a 3/12, <unk> 2/12; the test stream is b <eos> a <eos>
    assert data.manifest["floors"] == {"unigram_perplexity": round((4 * 3 * 3 * 3 / 12**4) ** -0.25, 3)}
    assert "ptb: 8 / 3 / 4 tokens, vocabulary 4" in capsys.readouterr().out


def test_ptb_cut_is_named_and_unknown_words_have_a_place(tmp_path):
    folder = write_raw(tmp_path / "raw", {"train.txt": " a b \n c \n", "valid.txt": " c \n", "test.txt": " a \n"})
    ptb.process(PtbPreprocess(train_tokens=3), folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert data.json("vocabulary") == ["<eos>", "a", "b", "<unk>"]
    assert data.array("valid").tolist() == [3, 0]
    assert [d["id"] for d in data.manifest["deviations"]] == ["ptb-train-cut"]


def test_ptb_refuses_an_empty_sentence(tmp_path):
    folder = write_raw(tmp_path / "raw", {"train.txt": " a \n  \n", "valid.txt": " a \n", "test.txt": " a \n"})
    with pytest.raises(UserError, match=r"train.txt:2: empty sentence; expected at least one word"):
        ptb.process(PtbPreprocess(None), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def ptb_texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    texts = {f"{split}.txt": f" {split} a b \n c <unk> \n" for split in ptb.SPLITS}
    monkeypatch.setattr(ptb, "CONTENT", {name: sha256(text.encode()) for name, text in texts.items()})
    return texts


def test_ptb_is_the_same_by_every_route(tmp_path, monkeypatch):
    texts = ptb_texts(monkeypatch)
    places = {}
    for name, text in texts.items():
        (tmp_path / f"ptb.{name}").write_text(text)
        places[name] = at(tmp_path / f"ptb.{name}")
    monkeypatch.setattr(ptb, "OFFICIAL", places)
    hub = tmp_path / "hub" / "ptb-text-only" / "ptb_text_only@refs/convert/parquet/penn_treebank"
    for split, part in (("train", "train"), ("valid", "validation"), ("test", "test")):
        lines = [line.strip() for line in texts[f"{split}.txt"].splitlines()]
        write_parquet(hub / part / "0000.parquet", {"sentence": lines})
    monkeypatch.setattr(sources, "hub", lambda: Hub(f"{tmp_path}/hub/"))
    ptb.fetch(Fetch("real"), tmp_path / "by-hub")
    with pinned_otherwise(monkeypatch, ptb.CONTENT, "test.txt", "ptb: test.txt by route hub: expected sha256 0{64}"):
        ptb.fetch(Fetch("real"), tmp_path / "refused")
    for name, text in texts.items():
        pack(tmp_path / "mirror", f"ptb.{name}.xz", text.encode(), monkeypatch)
    ptb.fetch(Fetch("real"), tmp_path / "by-mirror")
    monkeypatch.delenv("QRNN_DATA_MIRROR")
    monkeypatch.setattr(sources, "hub", unanswered)
    ptb.fetch(Fetch("real"), tmp_path / "by-official")
    whence = {
        "hub": {"revision": "ptb-text-only/ptb_text_only@refs/convert/parquet"},
        "mirror": {"packed": {name: files.sha256_file(tmp_path / "mirror" / f"ptb.{name}.xz") for name in texts}},
        "official": {"addresses": [(tmp_path / f"ptb.{name}").as_uri() for name in texts]},
    }
    for route, place in whence.items():
        assert {n: (tmp_path / f"by-{route}" / n).read_text() for n in texts} == texts
        assert raw.provenance(tmp_path / f"by-{route}").items() >= {"route": route, **place}.items()
        ptb.process(PtbPreprocess(None), tmp_path / f"by-{route}", tmp_path / f"out-{route}")
    assert len({Processed(tmp_path / f"out-{route}").hash for route in whence}) == 1


@contextlib.contextmanager
def pinned_otherwise(monkeypatch: pytest.MonkeyPatch, pins: dict[str, str], name: str, message: str) -> Iterator[None]:
    """In it another hash is expected of a file, and the refusal that the message tells."""
    with monkeypatch.context() as other:
        other.setitem(pins, name, "0" * 64)
        with pytest.raises(UserError, match=message):
            yield


def unanswered() -> None:
    raise sources.Unanswered("not today")


def test_provenance_does_not_know_where_the_mirror_lies(tmp_path, monkeypatch):
    texts = ptb_texts(monkeypatch)
    for place in ("one", "two"):
        for name, text in texts.items():
            pack(tmp_path / place, f"ptb.{name}.xz", text.encode(), monkeypatch)
        ptb.fetch(Fetch("real"), tmp_path / f"raw-{place}")
    assert tree(tmp_path / "raw-one") == tree(tmp_path / "raw-two")


@needs_mirror
def test_ptb_of_the_real_mirror_has_the_known_counts(tmp_path, capsys):
    ptb.fetch(Fetch("real"), tmp_path / "raw")
    ptb.process(PtbPreprocess(None), tmp_path / "raw", tmp_path / "out")
    assert "ptb: 929,589 / 73,760 / 82,430 tokens, vocabulary 10,000" in capsys.readouterr().out
    data = Processed(tmp_path / "out")
    assert [len(data.array(split)) for split in ptb.SPLITS] == [929_589, 73_760, 82_430]
    assert len(data.json("vocabulary")) == 10_000
    assert data.manifest["counts"]["test_unknown"] == data.manifest["counts"]["valid_unknown"] == 0
    assert data.manifest["floors"]["unigram_perplexity"] == pytest.approx(639.79, abs=0.01)
    assert data.manifest["deviations"] == []


# ------------------------------------------------------------------------------------------------------------ imdb


def imdb_raw(folder: Path, train: list[tuple[int, str]], test: list[tuple[int, str]]) -> Path:
    folder.mkdir(parents=True)
    raw.write_reviews(folder / "train.jsonl", train)
    raw.write_reviews(folder / "test.jsonl", test)
    raw.seal(folder, "sample", [])
    return folder


def words(data: Processed, split: str) -> list[str]:
    vocabulary = data.json("vocabulary")
    return [" ".join(vocabulary[index] for index in row) for row in data.ragged(split)]


def test_imdb_is_tokenised_with_case_kept_and_split_by_class(tmp_path):
    imdb.process(IMDB, imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS[:10]), tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert [len(data.ragged(split)) for split in ("train", "dev", "test")] == [30, 10, 10]
    for split, share in (("train", 15), ("dev", 5), ("test", 5)):
        labels = data.array(f"{split}.labels")
        assert labels.dtype == np.int64
        assert labels.sum() == share
        assert [("good" in row) for row in words(data, split)] == (labels == 1).tolist()
    row = next(row for row in words(data, "train") if "good" in row).split()
    assert [row[0], *row[2:9]] == ["Film", "was", "good", ",", "wasn", "'t", "it", "?"]
    assert data.json("vocabulary")[:2] == ["<pad>", "<unk>"]
    assert data.ragged("train").values.dtype == np.int32
    assert data.manifest["floors"] == {"majority_accuracy": 50.0, "bag_of_words_accuracy": 100.0}


def test_imdb_vocabulary_knows_the_training_part_alone(tmp_path):
    train = [(n % 2, f"common word{n}") for n in range(40)]
    imdb.process(IMDB, imdb_raw(tmp_path / "raw", train, [(0, "common strange"), (1, "word0")]), tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert len(data.json("vocabulary")) == 2 + 1 + 30
    assert {row.split()[1] for row in words(data, "dev")} == {"<unk>"}
    assert "common <unk>" in words(data, "test")
    assert data.manifest["counts"]["dev_unknown"] == 10


def test_imdb_counts_the_reviews_that_training_has_too(tmp_path):
    """Of 40 training reviews 10 are set aside for dev; each is a test review too. If the 40 are alike, dev's are in
    training, and test has one more of them."""
    for name, train, expected in (
        ("apart", [(n % 2, f"common word{n}") for n in range(40)], (0, 30)),
        ("alike", [(n % 2, "common") for n in range(40)], (10, 41)),
    ):
        folder = imdb_raw(tmp_path / name, train, [*train, (0, "common"), (1, "common common")])
        imdb.process(IMDB, folder, tmp_path / f"{name}-out")
        counts = Processed(tmp_path / f"{name}-out").manifest["counts"]
        assert (counts["dev_reviews_also_in_train"], counts["test_reviews_also_in_train"]) == expected


@pytest.mark.parametrize(("change", "size"), [({"minimum_count": 2}, 3), ({"vocabulary_size": 5}, 7)])
def test_imdb_vocabulary_can_be_cut(tmp_path, change, size):
    train = [(n % 2, f"common word{n}") for n in range(40)]
    config = params.ImdbPreprocess(**{**vars(IMDB), **change})
    imdb.process(config, imdb_raw(tmp_path / "raw", train, train[:4]), tmp_path / "out")
    vocabulary = Processed(tmp_path / "out").json("vocabulary")
    assert len(vocabulary) == size
    assert vocabulary[2] == "common"


def test_imdb_cuts_are_stratified_nested_and_named(tmp_path):
    labels = np.array([0, 1] * 50)
    whole = imdb.split_rows(IMDB, labels, labels)
    config = params.ImdbPreprocess(**{**vars(IMDB), "train_reviews": 20, "test_reviews": 11})
    cut = imdb.split_rows(config, labels, labels)
    assert {name: len(rows) for name, rows in cut.items()} == {"train": 20, "dev": 25, "test": 11}
    assert labels[cut["train"]].sum() == 10
    assert set(cut["train"]) <= set(whole["train"])
    assert not set(whole["train"]) & set(whole["dev"])
    assert (np.diff(cut["train"]) > 0).all()
    other = imdb.split_rows(params.ImdbPreprocess(**{**vars(IMDB), "split_seed": 2}), labels, labels)
    assert set(other["dev"]) != set(whole["dev"])
    imdb.process(config, imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS), tmp_path / "out")
    assert [d["id"] for d in Processed(tmp_path / "out").manifest["deviations"]] == ["imdb-train-cut", "imdb-test-cut"]


def test_tokens_are_those_of_sacremoses():
    from sacremoses import MosesTokenizer

    texts = [text for _, text in REVIEWS] + [
        "Mr. Smith vs. the U.S. army... No. 5 isn't “cheap” -- it cost $3.50!",
        "e.g. this etc. and so on. über. École. ÉCOLE. naïve & 'quoted' [x] #1 50% a.b.c. Ph.D. dot.",
    ]
    moses = MosesTokenizer(lang="en")
    expected = [" ".join(moses.tokenize(text.replace("<br />", " "), escape=False)) for text in texts]
    assert imdb.tokenize({"text": texts})["tokens"] == expected


def test_imdb_may_be_cut_in_other_ways(tmp_path):
    assert imdb.tokenize({"text": ["Well,\tit's<br />fine. "]}, "whitespace") == {"tokens": ["Well, it's fine."]}
    assert imdb.tokenize({"text": ["Well,\tit's<br />à_B2 . 3.5"]}, "words") == {"tokens": ["Well it s à B2 3 5"]}
    reviews = [(n % 2, "Well,\tit's<br />fine. ") for n in range(8)]
    for tokeniser, words in (
        ("whitespace", {"Well,", "it's", "fine."}),
        ("moses", {"Well", ",", "it", "'s", "fine", "."}),
        ("words", {"Well", "it", "s", "fine"}),
    ):
        config = params.ImdbPreprocess(**{**vars(IMDB), "tokeniser": tokeniser})
        imdb.process(config, imdb_raw(tmp_path / "raw" / tokeniser, reviews, reviews), tmp_path / tokeniser)
        made = Processed(tmp_path / tokeniser)
        assert set(made.json("vocabulary")[2:]) == words
        assert made.manifest["parameters"] == vars(config)


def test_the_majority_is_the_training_parts():
    """Two of three there are good, and one of four of the test set."""
    encoded = {"train": [np.array([word]) for word in (2, 3, 2)], "test": [np.array([2])] * 4}
    labels = {"train": np.array([1, 0, 1]), "test": np.array([0, 0, 1, 0])}
    assert imdb._floors(encoded, labels, 4)["majority_accuracy"] == 25.0


def test_vectors_that_were_not_fetched_are_none(tmp_path):
    folder = imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS[:8])
    (folder / "glove.txt").write_text(f"Film {' '.join(['1.0'] * 300)}\n")
    imdb.process(IMDB, folder, tmp_path / "out")
    assert not (tmp_path / "out" / "embeddings.npy").exists()


@pytest.mark.parametrize(("wanted", "named"), [(8, True), (9, False), (1000, False)])
def test_what_cuts_nothing_is_no_deviation(tmp_path, wanted, named):
    """9 reviews, 9 pairs and 9 tokens, of which so many are wanted."""
    reviews = imdb_raw(tmp_path / "imdb", REVIEWS[:12], REVIEWS[:9])
    cut = {"train_reviews": wanted, "test_reviews": wanted}
    imdb.process(dataclasses.replace(IMDB, **cut), reviews, tmp_path / "out")
    found = deviations(tmp_path / "out")
    assert found == (["imdb-train-cut", "imdb-test-cut"] if named else [])
    sides = {f"{split}_{language}": [letter * 3 for letter in "abcdefghi"]
             for split in iwslt.SPLITS for language in ("de", "en")}  # fmt: skip
    cut = {"max_characters": 300, **dict.fromkeys(("train_pairs", "dev_pairs", "test_pairs"), wanted)}
    iwslt.process(IwsltPreprocess(**cut), iwslt_raw(tmp_path / "iwslt", **sides), tmp_path / "out")
    assert deviations(tmp_path / "out") == ([f"iwslt-{split}-cut" for split in iwslt.SPLITS] if named else [])
    text = {f"{split}.txt": " a b \n a b \n a b \n" for split in ptb.SPLITS}
    ptb.process(PtbPreprocess(wanted), write_raw(tmp_path / "ptb", text), tmp_path / "out")
    assert deviations(tmp_path / "out") == (["ptb-train-cut"] if named else [])


def deviations(folder: Path) -> list[str]:
    return [one["id"] for one in Processed(folder).manifest["deviations"]]


@pytest.mark.parametrize("text", ["", "  ", "<br /><br />"])
def test_an_empty_review_is_refused_by_file_and_line(tmp_path, text):
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [json.dumps({"label": 0, "text": t}) + "\n" for t in ("fine", text, "fine too")]
    write = {"train.jsonl": "".join(lines), "test.jsonl": lines[0]}
    folder.rmdir()
    write_raw(folder, write)
    with pytest.raises(UserError, match=r"raw/train.jsonl:2: empty document; expected a review with at least one word"):
        imdb.process(IMDB, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_none_is_refused(tmp_path):
    folder = imdb_raw(tmp_path / "raw", [(0, "fine"), (2, "odd")], [(0, "fine")])
    with pytest.raises(UserError, match=r"train.jsonl: expected the labels 0 and 1, got \[0, 2\]"):
        imdb.process(IMDB, folder, tmp_path / "out")


def imdb_archive(path: Path, reviews: dict[str, list[tuple[int, str]]]) -> Path:
    """The official archive's layout: aclImdb/<split>/<pos or neg>/<number>_<rating>.txt, and what else lies in it."""
    members = {
        "aclImdb/README": "read me",
        "aclImdb/train/unsup/0_0.txt": "no label",
        "aclImdb/train/labeledBow.feat": "0",
    }
    for split, rows in reviews.items():
        for number, (label, text) in enumerate(rows):
            members[f"aclImdb/{split}/{'pos' if label else 'neg'}/{number}_{9 if label else 2}.txt"] = text
    return tar(path, members)


def imdb_pins(monkeypatch: pytest.MonkeyPatch, reviews: dict[str, list[tuple[int, str]]], folder: Path) -> None:
    pins = {}
    for split, rows in reviews.items():
        raw.write_reviews(folder / "canonical", rows)
        pins[f"{split}.jsonl"] = files.sha256_file(folder / "canonical")
    monkeypatch.setattr(imdb, "CONTENT", pins)


def test_imdb_is_the_same_by_every_route(tmp_path, monkeypatch):
    odd = [(1, " spaces around\u2028and \u0085 inside "), (0, "Ümläut “quotes” \\ backslash")]
    reviews = {"train": REVIEWS + odd, "test": REVIEWS[:6]}
    imdb_pins(monkeypatch, reviews, tmp_path)
    monkeypatch.setattr(imdb, "ARCHIVE", at(imdb_archive(tmp_path / "aclImdb_v1.tar.gz", reviews)))
    monkeypatch.setattr(sources, "hub", unanswered)
    imdb.fetch(ImdbFetch("real"), tmp_path / "by-official")
    for split, rows in reviews.items():
        columns = {"text": [text for _, text in rows], "label": [label for label, _ in rows]}
        place = tmp_path / "hub" / "stanfordnlp" / f"{imdb.HUB.split('/')[1]}" / "plain_text"
        write_parquet(place.with_name(f"plain_text-{split}") / "x.parquet", columns)
        place.mkdir(exist_ok=True)
        (place.with_name(f"plain_text-{split}") / "x.parquet").rename(place / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(sources, "hub", lambda: Hub(f"{tmp_path}/hub/"))
    imdb.fetch(ImdbFetch("real"), tmp_path / "by-hub")
    with pinned_otherwise(monkeypatch, imdb.CONTENT, "test.jsonl", "imdb: test.jsonl by route hub: expected sha256 0"):
        imdb.fetch(ImdbFetch("real"), tmp_path / "refused")
    for split, rows in reviews.items():
        lines = [json.dumps({"id": f"{n}", "label": y, "rating": 1, "text": t}) for n, (y, t) in enumerate(rows)]
        pack(tmp_path / "mirror", f"imdb.{split}.jsonl.xz", "".join(f"{x}\n" for x in lines).encode(), monkeypatch)
    imdb.fetch(ImdbFetch("real"), tmp_path / "by-mirror")
    hashes, archive = set(), tmp_path / "aclImdb_v1.tar.gz"
    packed = {path.name: files.sha256_file(path) for path in (tmp_path / "mirror").iterdir()}
    whence = {
        "official": {"address": archive.as_uri(), "archive": f"sha256:{files.sha256_file(archive)}"},
        "hub": {"revision": "stanfordnlp/imdb@e6281661ce1c48d982bc483cf8a173c1bbeb5d31"},
        "mirror": {"packed": packed},
    }
    for route, place in whence.items():
        facts = raw.provenance(tmp_path / f"by-{route}")
        assert facts.items() >= {"route": route, "files": imdb.CONTENT, **place}.items()
        assert [d["id"] for d in facts["deviations"]] == ["no-glove"]
        imdb.process(IMDB, tmp_path / f"by-{route}", tmp_path / f"out-{route}")
        hashes.add(Processed(tmp_path / f"out-{route}").hash)
    assert len(hashes) == 1


@needs_mirror
@pytest.mark.slow
def test_imdb_of_the_real_mirror_by_the_official_layout_and_in_full(tmp_path, monkeypatch):
    """25k + 25k reviews: the mirror's text in the official archive's layout gives the pinned bytes, by either route."""
    imdb.fetch(ImdbFetch("real", embeddings="glove"), tmp_path / "by-mirror")
    reviews = {}
    for split in imdb.SPLITS:
        rows = [json.loads(line) for line in raw.read_lines(tmp_path / "by-mirror" / f"{split}.jsonl")]
        reviews[split] = [(row["label"], row["text"]) for row in rows]
    monkeypatch.setattr(imdb, "ARCHIVE", at(imdb_archive(tmp_path / "aclImdb_v1.tar.gz", reviews)))
    monkeypatch.delenv("QRNN_DATA_MIRROR")
    monkeypatch.setattr(sources, "hub", unanswered)
    imdb.fetch(ImdbFetch("real"), tmp_path / "by-official")
    for name in imdb.CONTENT:
        assert files.sha256_file(tmp_path / "by-official" / name) == imdb.CONTENT[name]
    config = params.load(paths.CODE / "params.yaml").task("paper", "imdb").preprocess
    imdb.process(config, tmp_path / "by-mirror", tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert [len(data.ragged(split)) for split in ("train", "dev", "test")] == [22_500, 2_500, 25_000]
    assert data.manifest["floors"]["bag_of_words_accuracy"] == pytest.approx(88.36, abs=0.1)
    assert [d["id"] for d in data.manifest["deviations"]] == ["glove-subset"]
    assert data.array("embeddings").shape == (len(data.array("embeddings.ids")), 300)
    assert 3000 < len(data.array("embeddings.ids")) <= 4036


# --------------------------------------------------------------------------------------------------------- vectors


def vector_line(word: str, value: float) -> str:
    return f"{word} " + " ".join(f"{value + 0.01 * n:.5f}" for n in range(300)) + "\n"


def test_words_that_have_a_vector_keep_it(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text(
        vector_line("it", 3.0) + vector_line(". . .", 0.5) + vector_line("<unk>", 7) + vector_line("Film", 1.0)
    )
    ids, found = vectors.known(path, ["<pad>", "<unk>", "Film", "film", "it"])
    assert ids.tolist() == [2, 4]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [v + 0.01 * np.arange(300) for v in (1.0, 3.0)], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Film 1 2 3\n", "glove.txt:1: expected a word and 300 numbers"),
        (vector_line("other", 0), "expected vectors for words of the vocabulary, found none"),
        (vector_line("Film", 0).replace("0.01000", "much"), "glove.txt:1: expected a word and 300 numbers"),
    ],
    ids=["short", "no word", "no number"],
)
def test_bad_vectors_are_refused(tmp_path, text, message):
    (tmp_path / "glove.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        vectors.known(tmp_path / "glove.txt", ["<pad>", "<unk>", "Film"])


def test_vectors_by_the_mirror_are_named_a_subset(tmp_path, monkeypatch):
    reviews = {"train": REVIEWS, "test": REVIEWS[:6]}
    imdb_pins(monkeypatch, reviews, tmp_path)
    for split, rows in reviews.items():
        lines = "".join(json.dumps({"label": label, "text": text}) + "\n" for label, text in rows)
        pack(tmp_path / "mirror", f"imdb.{split}.jsonl.xz", lines.encode(), monkeypatch)
    pack(tmp_path / "mirror", vectors.PACKED, (vector_line("good", 1) + vector_line("a", 2)).encode(), monkeypatch)
    imdb.fetch(ImdbFetch("real", embeddings="glove"), tmp_path / "raw")
    imdb.process(IMDB, tmp_path / "raw", tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert data.manifest["deviations"][0]["id"] == "glove-subset"
    assert "2 of 2.2 million" in data.manifest["deviations"][0]["text"]
    assert data.manifest["counts"]["words_with_vector"] == 1
    assert data.array("embeddings.ids").tolist() == [data.json("vocabulary").index("good")]


def test_the_official_vectors_are_cut_to_the_words_of_the_reviews(tmp_path, monkeypatch):
    reviews = {"train": REVIEWS, "test": REVIEWS[:6]}
    imdb_pins(monkeypatch, reviews, tmp_path)
    monkeypatch.setattr(imdb, "ARCHIVE", at(imdb_archive(tmp_path / "a.tar.gz", reviews)))
    with zipfile.ZipFile(tmp_path / "glove.840B.300d.zip", "w") as archive:
        archive.writestr("glove.840B.300d.txt", "".join(vector_line(w, 1) for w in ("good", ". . .", "zebra", "Film")))
    monkeypatch.setattr(vectors, "ARCHIVE", at(tmp_path / "glove.840B.300d.zip"))
    monkeypatch.setattr(sources, "hub", unanswered)
    imdb.fetch(ImdbFetch("real", embeddings="glove"), tmp_path / "raw")
    assert [line.split()[0] for line in raw.read_lines(tmp_path / "raw" / "glove.txt")] == ["good", "Film"]
    facts = raw.provenance(tmp_path / "raw")
    assert facts["deviations"] == []
    assert facts["vectors"]["words"] == 2


def test_a_sample_has_no_vectors(tmp_path):
    config = ImdbFetch("sample", train=2, valid=0, test=2, seed=1, embeddings="glove")
    with pytest.raises(UserError, match="embeddings: expected random"):
        imdb.fetch(config, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


# ----------------------------------------------------------------------------------------------------------- iwslt


def iwslt_raw(folder: Path, route: str = "sample", **sides: list[str]) -> Path:
    texts = {f"{split}.{language}": "die katze\n" if language == "de" else "the cat\n"
             for split, language in itertools.product(iwslt.SPLITS, ("de", "en"))}  # fmt: skip
    texts |= {name.replace("_", "."): "".join(f"{line}\n" for line in lines) for name, lines in sides.items()}
    return write_raw(folder, texts, route)


def characters(data: Processed, name: str) -> list[str]:
    vocabulary = data.json("vocabulary")
    return ["".join(vocabulary[index] for index in row) for row in data.ragged(name)]


def test_iwslt_is_character_ids_over_one_vocabulary_from_train_alone(tmp_path):
    folder = iwslt_raw(
        tmp_path / "raw", train_de=["abc d", "ab"], train_en=["xya", "x"], test_de=["aQ"], test_en=["xQ y"]
    )
    iwslt.process(IWSLT, folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert data.json("vocabulary") == ["<pad>", "<unk>", "<s>", "</s>", "a", "b", "x", " ", "c", "d", "y"]
    assert characters(data, "train.source") == ["abc d", "ab"]
    assert characters(data, "train.target") == ["xya", "x"]
    assert characters(data, "test.source") == ["a<unk>"]
    assert data.lines("test.references") == ["xQ y"]
    assert data.lines("test.sources") == ["aQ"]
    assert data.lines("dev.references") == ["the cat"]
    assert data.ragged("train.source").values.dtype == np.int32
    # train targets: x 2, y 1, a 1, </s> 2 of 6; add one over 9 symbols; test: x, <unk>, space, y, </s>
    bits = -sum(math.log2(n / 15) for n in (3, 1, 1, 2, 3)) / 5
    assert data.manifest["floors"]["unigram_bits_per_character"] == round(bits, 4)
    assert data.manifest["floors"]["source_copy_bleu"] == 0.0
    assert "tok:13a" in data.manifest["floors"]["source_copy_signature"]


def test_iwslt_drops_long_pairs_from_training_only(tmp_path):
    long = "x" * 13
    just = long[:12]
    train = {"train_de": ["ab", long, "cd", just], "train_en": ["a", "b", long, just]}
    folder = iwslt_raw(tmp_path / "raw", **train, test_de=[long], test_en=[long])
    iwslt.process(IWSLT, folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert characters(data, "train.source") == ["ab", just]
    assert len(data.ragged("test.source")[0]) == 13
    counts = data.manifest["counts"]
    assert (counts["train_raw_pairs"], counts["train_dropped_long"], counts["train_pairs"]) == (4, 2, 2)
    assert [d["id"] for d in data.manifest["deviations"]] == ["iwslt-length"]


def test_iwslt_counts_the_pairs_that_training_has_too(tmp_path):
    """Both sides are to be the same."""
    train = {"train_de": ["ab", "cd"], "train_en": ["a", "b"]}
    dev = {"dev_de": ["ab", "cd"], "dev_en": ["a", "a"]}
    test = {"test_de": ["cd", "ab", "ab"], "test_en": ["b", "a", "b"]}
    iwslt.process(IWSLT, iwslt_raw(tmp_path / "raw", **train, **dev, **test), tmp_path / "out")
    counts = Processed(tmp_path / "out").manifest["counts"]
    assert (counts["dev_pairs_also_in_train"], counts["test_pairs_also_in_train"]) == (1, 2)


def test_iwslt_cuts_take_pairs_at_even_steps_and_are_named(tmp_path):
    lines = [f"satz {n}" for n in range(10)]
    folder = iwslt_raw(tmp_path / "raw", train_de=lines, train_en=lines, test_de=lines, test_en=lines)
    config = IwsltPreprocess(max_characters=300, train_pairs=4, dev_pairs=None, test_pairs=5)
    iwslt.process(config, folder, tmp_path / "out")
    data = Processed(tmp_path / "out")
    assert data.lines("test.references") == [f"satz {n}" for n in (0, 2, 4, 6, 8)]
    assert characters(data, "train.target") == [f"satz {n}" for n in (0, 2, 5, 7)]
    assert [d["id"] for d in data.manifest["deviations"]] == ["iwslt-train-cut", "iwslt-test-cut"]


def test_iwslt_empty_sides(tmp_path):
    folder = iwslt_raw(tmp_path / "sample", train_de=["ab", " "], train_en=["a", "b"])
    with pytest.raises(UserError, match=r"train.de:2: empty document; expected a sentence"):
        iwslt.process(IWSLT, folder, tmp_path / "out")
    folder = iwslt_raw(tmp_path / "test", route="mirror", test_de=["ab", "c"], test_en=["", "b"])
    with pytest.raises(UserError, match=r"test.en:1: empty document"):
        iwslt.process(IWSLT, folder, tmp_path / "out")
    folder = iwslt_raw(tmp_path / "mirror", route="mirror", train_de=["ab", ""], train_en=["a", "b"])
    iwslt.process(IWSLT, folder, tmp_path / "out")
    assert Processed(tmp_path / "out").manifest["counts"]["train_dropped_empty"] == 1


def test_iwslt_sides_of_unequal_length_are_refused(tmp_path):
    folder = iwslt_raw(tmp_path / "raw", dev_de=["a", "b"])
    with pytest.raises(UserError, match="expected as many lines on both sides, got 2 de and 1 en"):
        iwslt.process(IWSLT, folder, tmp_path / "out")


def iwslt_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {f"{split}.{language}": [pair[index] for pair in PAIRS[start:end]]
             for split, start, end in (("dev", 2, 4), ("test", 4, 7))
             for index, language in enumerate(("de", "en"))}  # fmt: skip
    pins = {name: sha256("".join(f"{line}\n" for line in lines).encode()) for name, lines in sides.items()}
    monkeypatch.setattr(iwslt, "CASED", pins)


def test_iwslt_by_the_official_archive(tmp_path, monkeypatch):
    iwslt_pins(monkeypatch)
    members = {}
    for index, language in enumerate(("de", "en")):
        talk = [f"<url>http://x/{language}</url>", "<title>A talk</title>"]
        talk += [f" {pair[index]}  " for pair in PAIRS]
        members[f"de-en/train.tags.de-en.{language}"] = "".join(f"{line}\n" for line in talk)
        for name, start, end in (("tst2013", 2, 4), ("tst2014", 4, 7), ("tst2010", 0, 2)):
            segments = "".join(f'<seg id="{n}"> {pair[index]} </seg>\n' for n, pair in enumerate(PAIRS[start:end], 1))
            text = f'<?xml version="1.0"?>\n<doc><title>T</title>\n<p>\n{segments}</p></doc>\n'
            members[f"de-en/IWSLT17.TED.{name}.de-en.{language}.xml"] = text
    monkeypatch.setattr(iwslt, "ARCHIVE", at(tar(tmp_path / "de-en.tgz", members)))
    monkeypatch.setattr(sources, "hub", unanswered)
    iwslt.fetch(Fetch("real"), tmp_path / "raw")
    assert raw.read_lines(tmp_path / "raw" / "train.de") == [source for source, _ in PAIRS]
    assert raw.read_lines(tmp_path / "raw" / "test.en") == [target for _, target in PAIRS[4:7]]
    facts = raw.provenance(tmp_path / "raw")
    assert [d["id"] for d in facts["deviations"]] == ["iwslt-training-pairs"]
    assert "9 training pairs before length filtering, in the paper 209,772" in facts["deviations"][0]["text"]
    with pinned_otherwise(monkeypatch, iwslt.CASED, "dev.en", "iwslt: dev.en of file:.*: expected sha256 0"):
        iwslt.fetch(Fetch("real"), tmp_path / "refused")
    archive = tmp_path / "de-en.tgz"
    assert (facts["address"], facts["archive"]) == (archive.as_uri(), f"sha256:{files.sha256_file(archive)}")


def test_iwslt_by_the_hub_takes_its_slices_of_the_test_split(tmp_path, monkeypatch):
    iwslt_pins(monkeypatch)
    rows = [{"de": f"{source} ", "en": target} for source, target in PAIRS]
    base = tmp_path / "hub" / "IWSLT" / "iwslt2017@refs/convert/parquet/iwslt2017-de-en"
    for split in ("train", "test"):
        write_parquet(base / split / "0000.parquet", {"translation": rows})
    monkeypatch.setattr(sources, "hub", lambda: Hub(f"{tmp_path}/hub/"))
    monkeypatch.setattr(iwslt, "HUB_TEST_ROWS", 9)
    monkeypatch.setattr(iwslt, "HUB_SLICES", {"dev": (2, 4), "test": (4, 7)})
    with pytest.raises(UserError, match="train: expected 206112 rows, found 9"):
        iwslt.fetch(Fetch("real"), tmp_path / "raw")
    monkeypatch.setattr(iwslt, "PAIRS_2017", 9)
    with monkeypatch.context() as other:
        other.setattr(iwslt, "HUB_TEST_ROWS", 10)
        with pytest.raises(UserError, match="test: expected 10 rows, found 9"):
            iwslt.fetch(Fetch("real"), tmp_path / "raw")
    with pinned_otherwise(monkeypatch, iwslt.CASED, "test.de", "iwslt: test.de of IWSLT/.*: expected sha256 0"):
        iwslt.fetch(Fetch("real"), tmp_path / "raw")
    iwslt.fetch(Fetch("real"), tmp_path / "raw")
    assert raw.read_lines(tmp_path / "raw" / "dev.de") == [source for source, _ in PAIRS[2:4]]
    facts = raw.provenance(tmp_path / "raw")
    ids = [d["id"] for d in facts["deviations"]]
    assert ids == ["iwslt-training-pairs", "iwslt-training-text-unpinned"]
    assert facts["revision"] == "IWSLT/iwslt2017@refs/convert/parquet"


def test_lines_of_metadata_are_no_pairs_on_either_side(tmp_path):
    sides = [["<title>T</title>", "eins", "zwei"], ["one", "<title>T</title>", "two"]]
    assert iwslt._untagged(sides, tmp_path) == [("zwei", "two")]
    with pytest.raises(UserError, match="expected as many lines on both sides, got 3 and 2"):
        iwslt._untagged([sides[0], sides[1][1:]], tmp_path)


def test_the_hub_slices_are_those_of_the_six_test_sets():
    sizes = dict(zip(range(2010, 2016), (1568, 1433, 1700, 993, 1305, 1080), strict=True))
    starts = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))
    assert {"dev": (starts[2013], starts[2014]), "test": (starts[2014], starts[2015])} == iwslt.HUB_SLICES
    assert sum(sizes.values()) == iwslt.HUB_TEST_ROWS


@needs_mirror
def test_iwslt_of_the_real_mirror_names_what_deviates(tmp_path):
    iwslt.fetch(Fetch("real"), tmp_path / "raw")
    iwslt.process(IwsltPreprocess(300, None, None, None), tmp_path / "raw", tmp_path / "out")
    manifest = Processed(tmp_path / "out").manifest
    counts = manifest["counts"]
    assert (counts["train_raw_pairs"], counts["train_pairs"]) == (77_299, 75_218)
    assert (counts["dev_pairs"], counts["test_pairs"]) == (993, 1305)
    assert [d["id"] for d in manifest["deviations"]] == ["iwslt-training-pairs", "iwslt-lowercased-tokenised"]
    mirror, packed = Path(os.environ["QRNN_DATA_MIRROR"]), manifest["source"]["packed"]
    assert len(packed) == 6
    assert packed == {name: files.sha256_file(mirror / name) for name in packed}


# ----------------------------------------------------------------------------------------------------- determinism

SAMPLE = """
import sys
from pathlib import Path
from pipeline import params, paths
from pipeline.corpora import corpus
for task in params.TASKS:
    fetch = params.KINDS[task].fetch("sample", train=60, valid=6, test=10, seed=5)
    preprocess = params.load(paths.CODE / "params.yaml").task("sample", task).preprocess
    corpus(task).fetch(fetch, Path(sys.argv[1]) / "raw" / task)
    corpus(task).process(preprocess, Path(sys.argv[1]) / "raw" / task, Path(sys.argv[1]) / "processed" / task)
"""


def test_the_sample_is_the_same_bytes_in_every_process_and_leaves_no_cache(tmp_path):
    running = []
    for seed in ("1", "2"):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path / "tmp"),
        }
        environment.pop("HF_HOME", None)
        (tmp_path / "tmp").mkdir(exist_ok=True)
        command = [sys.executable, "-c", SAMPLE, str(tmp_path / f"run-{seed}")]
        running.append(subprocess.Popen(command, cwd=paths.CODE, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    first, second = tree(tmp_path / "run-1"), tree(tmp_path / "run-2")
    assert first == second
    assert tree(tmp_path / "home") == {}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {name: first[f"raw/{name}"][:16] for name in GOLDEN} == GOLDEN


# Raw text of the first version: Python's own random numbers alone make it, so it is the same everywhere.
GOLDEN = {
    "imdb/test.jsonl": "e8fd4e56f2063f35",
    "imdb/train.jsonl": "1e9875c637bf3462",
    "ptb/test.txt": "d07a867a24ae9a38",
    "ptb/train.txt": "d870c2cbf1dfafb6",
    "iwslt/test.en": "16c7d5162244903f",
    "iwslt/train.de": "6d7441d57d7b169c",
}


def test_more_generated_translations_than_there_are_are_refused():
    """All sentences of the grammar, counted: [time] [adjective] subject [adjective] object verb."""
    adjectives = ["", *(f"{word} " for word in translation.ADJECTIVES)]
    times = ["", *(f"{word} " for word in translation.TIMES)]
    words = (times, adjectives, translation.SUBJECTS, adjectives, translation.OBJECTS, translation.VERBS)
    sources_ = (f"{t}{a}{s} {b}{o} {v}" for t, a, s, b, o, v in itertools.product(*words))
    assert sum(20 <= len(source) <= 50 for source in sources_) == translation.SOURCES
    with pytest.raises(UserError, match="the generated translations: expected at most 80,096 pairs, got 80,097"):
        translation.pairs(80_096, Draws(1), {"one"})


def test_every_task_has_a_corpus_of_the_same_form():
    for task in params.TASKS:
        assert callable(corpus(task).fetch)
        assert callable(corpus(task).process)
    with pytest.raises(UserError, match="unknown task 'mnist'"):
        corpus("mnist")


@pytest.mark.slow
def test_mapping_in_several_processes_keeps_order_and_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_workers", lambda rows: 2)
    monkeypatch.setattr(loading, "ROWS_AT_A_TIME", 15)
    environment = os.environ
    folder = imdb_raw(tmp_path / "raw", REVIEWS, REVIEWS[:10])
    imdb.process(IMDB, folder, tmp_path / "by-two")
    assert os.environ is environment
    monkeypatch.undo()
    imdb.process(IMDB, folder, tmp_path / "by-one")
    assert tree(tmp_path / "by-one") == tree(tmp_path / "by-two")


def test_trials_import_nothing_of_the_corpora():
    script = (
        f"import sys, pipeline.trial; [pipeline.trial.task_class(task) for task in {params.TASKS}]\n"
        "print([m for m in sys.modules if 'corpora' in m or m == 'datasets'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=paths.CODE, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


# -------------------------------------------------------------------------------------------------------- progress


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = itertools.count(0, 6)
    monkeypatch.setattr("pipeline.corpora.progress.time.monotonic", lambda: float(next(clock)))
    with Progress("tokenise", 40, "rows") as progress:
        for _ in range(4):
            progress.add(10)
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert lines[0].startswith("tokenise: 20 of 40 rows, about ")
    assert lines[-1].startswith("tokenise: 40 of 40 rows, ")


def test_spread_takes_rows_at_even_steps():
    assert list(raw.spread(None, 3)) == [0, 1, 2]
    assert list(raw.spread(5, 3)) == [0, 1, 2]
    assert list(raw.spread(2, 9)) == [0, 4]


def test_an_empty_folder_is_no_processed_data(tmp_path):
    with pytest.raises(UserError, match="no processed data"):
        processed.Processed(tmp_path)
