"""Large Movie Review Dataset: sentiment of whole reviews, case kept (section 3.1)."""

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline import files, processed, sources
from pipeline.corpora import raw as layout
from pipeline.corpora import vectors, word2vec
from pipeline.corpora.loading import Library, library
from pipeline.errors import UserError
from pipeline.params import ImdbFetch, ImdbPreprocess, Tokeniser

SPLITS = ("train", "test")
PAD, UNKNOWN = "<pad>", "<unk>"
NO_GLOVE = "no-glove"  # the deviation of vectors that start at random
TOKENISERS = get_args(Tokeniser)

# Of the raw layout, so that every route has to give the same reviews.
CONTENT = {
    "train.jsonl": "2570d69a7e02d38761d9e57f5c5aaf470924861e152ef644935f7f80031b77fb",
    "test.jsonl": "e0ee3568eb54bda012bc698ac949015e19e66438976493f55465ba316966f2f1",
}
ARCHIVE = sources.Address(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    "sha256:c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    84125825,
)
HUB = "stanfordnlp/imdb@e6281661ce1c48d982bc483cf8a173c1bbeb5d31"


def fetch(config: ImdbFetch, folder: Path) -> None:
    """Raw reviews into `folder`: train.jsonl, test.jsonl, and glove.txt where the configuration asks for vectors.

    Raises:
        UserError: no route answers, or bytes differ from their pinned hash.
    """
    if config.source == "sample":
        with files.replacing_folder(folder) as temporary:
            _sample(config, temporary)
        return
    glove = config.embeddings == "glove"
    routes = {
        name: functools.partial(route, glove=glove)
        for name, route in {"mirror": _mirror, "hub": _hub, "official": _official}.items()
    }
    sources.first_answering("imdb", routes, folder, CONTENT)


def process(config: ImdbPreprocess, raw: Path, folder: Path) -> None:
    """Token ids `train`, `dev`, `test` (ragged int32; 0 padding, 1 unknown), `<split>.labels` (int64, 0 or 1) and
    `vocabulary`; with vectors `embeddings` (K, n) float32 of the words `embeddings.ids` (K,) int64: GloVe's where the
    raw text came with them, n = 300, or those that `corpus_vectors` asks for.

    Raises:
        UserError: the raw text is missing or altered, or holds an empty document; or both kinds of vectors are there.
    """
    facts = layout.provenance(raw)
    pretrained = vectors.FILE in facts["files"]
    if pretrained and config.corpus_vectors is not None:
        raise UserError(f"corpus_vectors: expected null beside embeddings glove, got {config.corpus_vectors}")
    with library() as datasets:
        tokens, labels = {}, {}
        for split in SPLITS:
            tokens[split], labels[split] = _reviews(datasets, raw / f"{split}.jsonl", config.tokeniser)
    rows = split_rows(config, labels["train"], labels["test"])
    parts = {name: "test" if name == "test" else "train" for name in rows}
    vocabulary = build_vocabulary((tokens["train"][row] for row in rows["train"]), config)
    ids = {word: index for index, word in enumerate(vocabulary)}
    encoded = {name: [_encode(tokens[part][row], ids) for row in rows[name]] for name, part in parts.items()}
    answers = {name: labels[part][rows[name]] for name, part in parts.items()}
    found = vectors.known(raw / vectors.FILE, vocabulary) if pretrained else None
    if config.corpus_vectors is not None:
        found = _corpus_vectors(encoded["train"], vocabulary, config.corpus_vectors)
    counts = _counts(encoded, vocabulary, None if found is None else found[0])
    print("imdb: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), flush=True)
    floors = _floors(encoded, answers, len(vocabulary))
    whole = {"train": len(labels["train"]) - len(rows["dev"]), "test": len(labels["test"])}
    print("imdb floors: " + ", ".join(f"{name} {value:g} %" for name, value in floors.items()), flush=True)
    with processed.writing(folder) as writer:
        for name, documents in encoded.items():
            writer.ragged(name, documents)
            writer.array(f"{name}.labels", answers[name])
        writer.json("vocabulary", vocabulary)
        if found is not None:
            writer.array("embeddings.ids", found[0])
            writer.array("embeddings", found[1])
        writer.describe(task="imdb", source=layout.source(facts), deviations=_deviations(config, facts, whole),
                        counts=counts, floors=floors, parameters=dataclasses.asdict(config))  # fmt: skip


def tokenize(batch: dict[str, list[str]], tokeniser: str = "moses") -> dict[str, list[str]]:
    """Tokens of a batch of texts, joined by one space; `<br />` counts as a space.

    Args:
        tokeniser: "moses" (sacremoses, English, nothing escaped), "whitespace", between which stands a token, or
            "words", runs of letters and digits.
    """
    split = _SPLIT[tokeniser]
    return {"tokens": [" ".join(split(text.replace("<br />", " "))) for text in batch["text"]]}


def split_rows(config: ImdbPreprocess, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers of train, dev (out of train) and test, ascending; each stratified and by `split_seed` alone.

    Args:
        train, test: labels, (n,) int64.
    """
    random = np.random.Generator(np.random.PCG64(config.split_seed))
    orders = [np.argsort(random.random(len(labels)), kind="stable") for labels in (train, test)]
    dev = _stratified(train, orders[0], int(config.dev_fraction * len(train) + 0.5))
    rest = orders[0][~np.isin(orders[0], dev)]
    return {
        "train": _stratified(train, rest, config.train_reviews),
        "dev": dev,
        "test": _stratified(test, orders[1], config.test_reviews),
    }


def build_vocabulary(documents: Iterator[str], config: ImdbPreprocess) -> list[str]:
    """<pad>, <unk>, then words by falling count, ties by word; `vocabulary_size` counts the words alone."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.split(" "))
    words = [word for word, count in counts.items() if count >= config.minimum_count and word not in (PAD, UNKNOWN)]
    words.sort(key=lambda word: (-counts[word], word))
    return [PAD, UNKNOWN, *words[: config.vocabulary_size]]


def bag_of_words_accuracy(
    train: list[np.ndarray], train_labels: np.ndarray, test: list[np.ndarray], test_labels: np.ndarray, size: int
) -> float:
    """Test accuracy (%) of a logistic regression on which of `size` words a document holds; order is lost to it."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(solver="liblinear", C=0.1, random_state=0)
    model.fit(_presence(train, size), train_labels)
    return 100 * float((model.predict(_presence(test, size)) == test_labels).mean())


@functools.cache
def _moses() -> Any:
    from sacremoses import MosesTokenizer

    lower = frozenset(MosesTokenizer.IsLower)

    class Tokenizer(MosesTokenizer):
        """sacremoses builds the set of lower-case letters anew for every word before a full stop; that took half
        the time."""

        def islower(self, text: str) -> bool:
            return lower.issuperset(text)

    return Tokenizer(lang="en")


_SPLIT: dict[str, Callable[[str], list[str]]] = {
    "moses": lambda text: _moses().tokenize(text, escape=False),
    "whitespace": str.split,
    "words": re.compile(r"[^\W_]+").findall,
}


def _reviews(datasets: Library, path: Path, tokeniser: str) -> tuple[list[str], np.ndarray]:
    """Tokens of every review, joined by spaces, and the labels."""
    rows = datasets.load("json", str(path))
    _require_content(rows, path, "text")
    split = functools.partial(tokenize, tokeniser=tokeniser)
    rows = datasets.map(rows, split, f"imdb: tokenise {path.name}", remove_columns=["text"])
    _require_content(rows, path, "tokens")
    labels = np.asarray(rows["label"], dtype=np.int64)
    if not np.isin(labels, (0, 1)).all():
        raise UserError(f"{path}: expected the labels 0 and 1, got {sorted(set(labels.tolist()))}")
    return list(rows["tokens"]), labels


def _require_content(rows: Any, path: Path, column: str) -> None:
    for number, text in enumerate(rows[column], 1):
        if not (text or "").strip():
            raise UserError(f"{path}:{number}: empty document; expected a review with at least one word")


def _stratified(labels: np.ndarray, order: np.ndarray, wanted: int | None) -> np.ndarray:
    """The first `wanted` rows of `order` with its shares of the labels kept, ascending; None: all."""
    if wanted is None or wanted >= len(order):
        return np.sort(order)
    groups = [order[labels[order] == label] for label in (0, 1)]
    first = wanted * len(groups[0]) // len(order)
    return np.sort(np.concatenate([groups[0][:first], groups[1][: wanted - first]]))


def _encode(tokens: str, ids: dict[str, int]) -> np.ndarray:
    return np.array([ids.get(word, 1) for word in tokens.split(" ")], dtype=np.int32)


def _presence(documents: list[np.ndarray], size: int) -> Any:
    from scipy.sparse import csr_matrix

    rows = [np.unique(document) for document in documents]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    columns = np.concatenate(rows)
    return csr_matrix((np.ones(len(columns)), columns, offsets), shape=(len(rows), size))


def _counts(encoded: dict[str, list[np.ndarray]], vocabulary: list[str], ids: np.ndarray | None) -> dict[str, int]:
    """Sizes for the manifest; `ids` are the words that have a vector, None where vectors are not used."""
    counts = {"vocabulary": len(vocabulary)}
    seen = {document.tobytes() for document in encoded["train"]}
    for name, documents in encoded.items():
        counts[f"{name}_reviews"] = len(documents)
        counts[f"{name}_tokens"] = sum(map(len, documents))
        counts[f"{name}_unknown"] = sum(int((document == 1).sum()) for document in documents)
        if name != "train":
            counts[f"{name}_reviews_also_in_train"] = sum(document.tobytes() in seen for document in documents)
    if ids is not None:
        known = np.isin(np.arange(len(vocabulary)), ids)
        counts["words_with_vector"] = len(ids)
        counts["train_tokens_with_vector"] = sum(int(known[document].sum()) for document in encoded["train"])
    return counts


def _corpus_vectors(train: list[np.ndarray], vocabulary: list[str], dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all words but padding and the unknown one, in the form of `vectors.known`."""
    print(f"imdb: {dimensions}-dimensional vectors of {len(vocabulary) - 2:,} words", flush=True)
    return np.arange(2, len(vocabulary)), word2vec.train(train, len(vocabulary), dimensions)[2:]


def _floors(encoded: dict[str, list[np.ndarray]], labels: dict[str, np.ndarray], size: int) -> dict[str, float]:
    majority = np.bincount(labels["train"], minlength=2).argmax()
    accuracy = bag_of_words_accuracy(encoded["train"], labels["train"], encoded["test"], labels["test"], size)
    return {
        "majority_accuracy": round(100 * float((labels["test"] == majority).mean()), 2),
        "bag_of_words_accuracy": round(accuracy, 2),
    }


def _deviations(config: ImdbPreprocess, facts: dict[str, Any], whole: dict[str, int]) -> list[dict[str, str]]:
    """`whole`: the number of reviews that train and test have before any cut."""
    found = [named for named in facts["deviations"] if config.corpus_vectors is None or named["id"] != NO_GLOVE]
    if config.corpus_vectors is not None:
        text = f"{config.corpus_vectors}-dimensional word2vec vectors of the training text in place of GloVe 840B's 300"
        found.append(layout.deviation("corpus-vectors", text))
    wanted = {"train": config.train_reviews, "test": config.test_reviews}
    return found + layout.cuts("imdb", "reviews", wanted, whole)


def _sample(config: ImdbFetch, folder: Path) -> None:
    from pipeline.corpora.sample import sentiment
    from pipeline.corpora.sample.draws import Draws

    if config.embeddings != "random":
        raise UserError("imdb.sample.fetch.embeddings: expected random, for the words of source sample are generated")
    draws, taken = Draws(config.seed), set()
    for split in SPLITS:
        layout.write_reviews(folder / f"{split}.jsonl", sentiment.reviews(getattr(config, split), draws, taken))
    layout.seal(
        folder, "sample",
        [layout.deviation("sample-corpus", "reviews generated from a grammar of the project, not those of IMDB")],
        seed=config.seed,
    )  # fmt: skip


def _seal(folder: Path, route: str, vector_facts: dict[str, Any] | None, **facts: Any) -> None:
    """Seals real reviews; `vector_facts`: what `vectors` said of glove.txt, None without it."""
    if vector_facts is None:
        text = "word vectors start at random in place of 300-dimensional GloVe 840B"
        layout.seal(folder, route, [layout.deviation(NO_GLOVE, text)], **facts)
    else:
        deviations = vector_facts.pop("deviations")
        layout.seal(folder, route, deviations, vectors=vector_facts, **facts)


def _mirror(folder: Path, glove: bool) -> None:
    mirror, packed = sources.mirror(), {}
    for split in SPLITS:
        name, plain = f"imdb.{split}.jsonl.xz", folder / "mirror.jsonl"
        packed[name] = mirror.unpack(name, plain)
        rows = (json.loads(line) for line in layout.read_lines(plain))
        layout.write_reviews(folder / f"{split}.jsonl", ((row["label"], row["text"]) for row in rows))
        plain.unlink()
    _seal(folder, "mirror", vectors.from_mirror(mirror, folder) if glove else None, packed=packed)


def _hub(folder: Path, glove: bool) -> None:
    hub = sources.hub()
    with library() as datasets:
        for split in SPLITS:
            rows = hub.rows(datasets, f"{HUB}/plain_text/{split}-*.parquet")
            layout.write_reviews(folder / f"{split}.jsonl", zip(rows["label"], rows["text"], strict=True))
    _seal(folder, "hub", _official_vectors(folder) if glove else None, revision=HUB)


def _official(folder: Path, glove: bool) -> None:
    archive = sources.download(ARCHIVE)
    with sources.extracted(archive, lambda name: name.endswith(".txt") and "/unsup/" not in name) as extracted:
        for split in SPLITS:
            layout.write_reviews(folder / f"{split}.jsonl", _labelled_texts(extracted / "aclImdb" / split))
    _seal(folder, "official", _official_vectors(folder) if glove else None, address=ARCHIVE.url, archive=ARCHIVE.hash)


def _labelled_texts(folder: Path) -> Iterator[tuple[int, str]]:
    for label, name in enumerate(("neg", "pos")):
        for path in sorted((folder / name).glob("*.txt")):
            yield label, path.read_bytes().decode("utf-8")


def _official_vectors(folder: Path) -> dict[str, Any]:
    """Only the vectors of words that the training reviews hold, by any tokeniser: the whole file has 2.2 million."""
    wanted: set[str] = set()
    with library() as datasets:
        for tokeniser in TOKENISERS:
            tokens, _ = _reviews(datasets, folder / "train.jsonl", tokeniser)
            wanted.update(word for document in tokens for word in document.split(" "))
    return vectors.from_official(folder, wanted)
