"""IWSLT German-English TED talks, by character, one vocabulary for both sides (section 3.3)."""

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files, processed, sources
from pipeline.corpora import raw as layout
from pipeline.corpora.loading import library
from pipeline.errors import UserError
from pipeline.params import Fetch, IwsltPreprocess

SPLITS = ("train", "dev", "test")
SOURCE, TARGET = "de", "en"
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
UNKNOWN, END = 1, 3
PAPER_CHARACTERS = 300

PAPER_PAIRS = 209_772
PAIRS_2017 = 206_112
# The hub's test split is tst2010 .. tst2015, one after another; tst2013 is the dev set, tst2014 the test set.
HUB_TEST_ROWS = 8079
HUB_SLICES = {"dev": (4701, 5694), "test": (5694, 6999)}
HUB = "IWSLT/iwslt2017@refs/convert/parquet"
ARCHIVE = sources.Address(
    "https://raw.githubusercontent.com/hlt-mt/WIT3/master/archive/2017-01-trnted/texts/de/en/de-en.tgz",
    "sha256:ebcd53c53c8df742437e3a0fb964772e78764c3f6d4e38df0b6a2f71abc3a8b4",
    16751373,
)
SETS = {"dev": "tst2013", "test": "tst2014"}
# Cased, untokenised tst2013 and tst2014 with every run of spaces made one.
CASED = {
    "dev.de": "8714f060ef14504194868e4733e0e643248fa01577dcfeff0bdcb345b7a5622b",
    "dev.en": "15fd15e5cda7ddad9d5c589ebb25ddd0a602626f34cba8616a39f2d8a60041f6",
    "test.de": "66aa2e5c16a1c0e04b6c58e263e448edb6992f639736b57daf5c26733140c928",
    "test.en": "e82bfa58d4a170573826999a4852c496162a229f405eb488b3d6d385dbabcbaa",
}

Pairs = list[tuple[str, str]]


def fetch(config: Fetch, folder: Path) -> None:
    """Raw text into `folder`: {train,dev,test}.{de,en}, line by line.

    Raises:
        UserError: no route answers, or bytes differ from their pinned hash.
    """
    if config.source == "sample":
        with files.replacing_folder(folder) as temporary:
            _sample(config, temporary)
    else:
        routes = {"mirror": _mirror, "hub": _hub, "official": _official}
        sources.first_answering("iwslt", routes, folder, {})


def process(config: IwsltPreprocess, raw: Path, folder: Path) -> None:
    """Character ids `<split>.source`, `<split>.target` (ragged int32, without <s> and </s>) and `vocabulary`; the text
    as lines `dev.references`, `test.references` and `test.sources`.

    Raises:
        UserError: the raw text is missing or altered, the sides differ in lines, or a side of a dev or test pair (in
            the sample: of any pair) is empty.
    """
    facts = layout.provenance(raw)
    pairs = {split: _pairs(raw, split) for split in SPLITS}
    counts: dict[str, int] = {}
    whole = {split: len(rows) for split, rows in pairs.items()}
    pairs["train"] = _training(pairs["train"], config, counts, strict=facts["route"] == "sample", raw=raw)
    whole["train"] -= counts["train_dropped_empty"] + counts["train_dropped_long"]
    for split, wanted in (("dev", config.dev_pairs), ("test", config.test_pairs)):
        _require_content(pairs[split], raw, split)
        pairs[split] = [pairs[split][row] for row in layout.spread(wanted, len(pairs[split]))]
    vocabulary = build_vocabulary(pairs["train"])
    ids = {character: index for index, character in enumerate(vocabulary)}
    counts |= _counts(pairs, vocabulary)
    print("iwslt: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()), flush=True)
    floors = _floors(pairs, vocabulary)
    print("iwslt floors: " + ", ".join(f"{name} {value}" for name, value in floors.items()), flush=True)
    with processed.writing(folder) as writer:
        for split, rows in pairs.items():
            writer.ragged(f"{split}.source", [_encode(source, ids) for source, _ in rows])
            writer.ragged(f"{split}.target", [_encode(target, ids) for _, target in rows])
            if split != "train":
                writer.lines(f"{split}.references", [target for _, target in rows])
        writer.lines("test.sources", [source for source, _ in pairs["test"]])
        writer.json("vocabulary", vocabulary)
        writer.describe(task="iwslt", source=layout.source(facts), deviations=_deviations(config, facts, whole),
                        counts=counts, floors=floors, parameters=dataclasses.asdict(config))  # fmt: skip


def _counts(pairs: dict[str, Pairs], vocabulary: list[str]) -> dict[str, int]:
    counts = {"vocabulary": len(vocabulary)}
    seen = set(pairs["train"])
    for split, rows in pairs.items():
        counts[f"{split}_pairs"] = len(rows)
        counts[f"{split}_source_characters"] = sum(len(source) for source, _ in rows)
        counts[f"{split}_target_characters"] = sum(len(target) for _, target in rows)
        if split != "train":
            counts[f"{split}_pairs_also_in_train"] = sum(pair in seen for pair in rows)
    return counts


def build_vocabulary(pairs: Pairs) -> list[str]:
    """<pad>, <unk>, <s>, </s>, then the characters of both sides by falling count, ties by code point."""
    counts: Counter[str] = Counter()
    for source, target in pairs:
        counts.update(source)
        counts.update(target)
    return [*SPECIAL, *sorted(counts, key=lambda character: (-counts[character], character))]


def source_copy(pairs: Pairs) -> tuple[float, str]:
    """BLEU (0 to 100) of the untranslated source against the target, and sacrebleu's signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(force=True)  # no remark on tokenised text, which the deviations name
    score = metric.corpus_score([source for source, _ in pairs], [[target for _, target in pairs]])
    return score.score, str(metric.get_signature())


def unigram_bits(train: Pairs, test: Pairs, vocabulary: list[str]) -> float:
    """Bits a target character of `test`, each line's </s> counted, by the frequencies in the targets of `train`.

    Add-one smoothed over the vocabulary less <pad> and <s>; a character outside the vocabulary is <unk>.
    """
    known = set(vocabulary)
    seen = [_symbols([target for _, target in pairs], known) for pairs in (train, test)]
    log_total = math.log2(seen[0].total() + len(vocabulary) - 2)
    code = math.fsum(count * (log_total - math.log2(seen[0][symbol] + 1)) for symbol, count in sorted(seen[1].items()))
    return code / seen[1].total()


def _symbols(lines: list[str], known: set[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(character if character in known else SPECIAL[UNKNOWN] for character in line)
    counts[SPECIAL[END]] += len(lines)
    return counts


def _pairs(raw: Path, split: str) -> Pairs:
    sides = [layout.read_lines(raw / f"{split}.{language}") for language in (SOURCE, TARGET)]
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{raw / split}.*: expected as many lines on both sides, "
                        f"got {len(sides[0])} {SOURCE} and {len(sides[1])} {TARGET}")  # fmt: skip
    return list(zip(*sides, strict=True))


def _training(pairs: Pairs, config: IwsltPreprocess, counts: dict[str, int], strict: bool, raw: Path) -> Pairs:
    """Training pairs that are kept; `counts` takes what was dropped. `strict`: an empty side is an error."""
    if strict:
        _require_content(pairs, raw, "train")
    full = [pair for pair in pairs if all(side.strip() for side in pair)]
    short = [pair for pair in full if max(map(len, pair)) <= config.max_characters]
    counts["train_raw_pairs"] = len(pairs)
    counts["train_dropped_empty"] = len(pairs) - len(full)
    counts["train_dropped_long"] = len(full) - len(short)
    return [short[row] for row in layout.spread(config.train_pairs, len(short))]


def _require_content(pairs: Pairs, raw: Path, split: str) -> None:
    for number, pair in enumerate(pairs, 1):
        for language, text in zip((SOURCE, TARGET), pair, strict=True):
            if not text.strip():
                raise UserError(f"{raw / split}.{language}:{number}: empty document; expected a sentence")


def _encode(text: str, ids: dict[str, int]) -> np.ndarray:
    return np.array([ids.get(character, UNKNOWN) for character in text], dtype=np.int32)


def _floors(pairs: dict[str, Pairs], vocabulary: list[str]) -> dict[str, Any]:
    score, signature = source_copy(pairs["test"])
    bits = unigram_bits(pairs["train"], pairs["test"], vocabulary)
    return {
        "source_copy_bleu": round(score, 3),
        "source_copy_signature": signature,
        "unigram_bits_per_character": round(bits, 4),
    }


def _deviations(config: IwsltPreprocess, facts: dict[str, Any], whole: dict[str, int]) -> list[dict[str, str]]:
    """`whole`: the number of pairs that each split has before any cut."""
    found = list(facts["deviations"])
    if config.max_characters != PAPER_CHARACTERS:
        text = f"training pairs over {config.max_characters} characters dropped, in the paper over {PAPER_CHARACTERS}"
        found.append(layout.deviation("iwslt-length", text))
    wanted = {"train": config.train_pairs, "dev": config.dev_pairs, "test": config.test_pairs}
    return found + layout.cuts("iwslt", "pairs", wanted, whole)


def _write(folder: Path, split: str, pairs: Pairs) -> None:
    for index, language in enumerate((SOURCE, TARGET)):
        layout.write_lines(folder / f"{split}.{language}", (layout.one_line(pair[index]) for pair in pairs))


def _sample(config: Fetch, folder: Path) -> None:
    from pipeline.corpora.sample import translation
    from pipeline.corpora.sample.draws import Draws

    draws, taken = Draws(config.seed), set()
    for split, size in (("train", config.train), ("dev", config.valid), ("test", config.test)):
        _write(folder, split, translation.pairs(size, draws, taken))
    layout.seal(
        folder, "sample",
        [layout.deviation("sample-corpus", "sentences of two made-up languages, not German and English TED talks")],
        seed=config.seed,
    )  # fmt: skip


def _mirror(folder: Path) -> None:
    mirror, packed = sources.mirror(), {}
    for split, name in {"train": "train", **SETS}.items():
        for language in (SOURCE, TARGET):
            file = f"iwslt.{name}.lctok.{language}.xz"
            packed[file] = mirror.unpack(file, folder / f"{split}.{language}")
    pairs = len(layout.read_lines(folder / f"train.{TARGET}"))
    deviations = [
        _fewer_pairs(pairs, "; some are of later collections of the talks or of other years' dev and test sets"),
        layout.deviation(
            "iwslt-lowercased-tokenised",
            "text lowercased and Moses-tokenised; BLEU is computed on lowercased, tokenised text and is not comparable "
            "with BLEU on cased text",
        ),
    ]
    layout.seal(folder, "mirror", deviations, packed=packed)


def _hub(folder: Path) -> None:
    hub = sources.hub()
    with library() as datasets:
        base = f"{HUB}/iwslt2017-{SOURCE}-{TARGET}"
        rows = {split: hub.rows(datasets, f"{base}/{split}/*.parquet")["translation"] for split in ("train", "test")}
        for split, expected in (("train", PAIRS_2017), ("test", HUB_TEST_ROWS)):
            if len(rows[split]) != expected:
                raise UserError(f"{base}/{split}: expected {expected} rows, found {len(rows[split])}")
        texts = {split: [(row[SOURCE], row[TARGET]) for row in part] for split, part in rows.items()}
    _write(folder, "train", texts["train"])
    for split, (start, end) in HUB_SLICES.items():
        _write(folder, split, texts["test"][start:end])
    _require_cased(folder, HUB)
    unpinned = layout.deviation(
        "iwslt-training-text-unpinned", "training text by a moving revision: its number of pairs was checked, no hash"
    )
    layout.seal(folder, "hub", [_fewer_pairs(len(texts["train"])), unpinned], revision=HUB)


def _official(folder: Path) -> None:
    archive = sources.download(ARCHIVE)
    with sources.extracted(archive, lambda name: "train.tags." in name or "tst201" in name) as extracted:
        sides = [layout.read_lines(_only(extracted, f"train.tags.*.{language}")) for language in (SOURCE, TARGET)]
        _write(folder, "train", _untagged(sides, archive))
        for split, name in SETS.items():
            texts = [_segments(_only(extracted, f"*.{name}.*.{language}.xml")) for language in (SOURCE, TARGET)]
            _write(folder, split, list(zip(*texts, strict=False)))
    _require_cased(folder, ARCHIVE.url)
    pairs = len(layout.read_lines(folder / f"train.{TARGET}"))
    layout.seal(folder, "official", [_fewer_pairs(pairs)], address=ARCHIVE.url, archive=ARCHIVE.hash)


def _fewer_pairs(pairs: int, aside: str = "") -> dict[str, str]:
    text = f"{pairs:,} training pairs before length filtering, in the paper {PAPER_PAIRS:,}{aside}"
    return layout.deviation("iwslt-training-pairs", text)


def _require_cased(folder: Path, what: str) -> None:
    for name, expected in CASED.items():
        sources.require_hash(folder / name, f"sha256:{expected}", f"iwslt: {name} of {what}")


def _untagged(sides: list[list[str]], archive: Path) -> Pairs:
    """The sentence pairs of WIT3's training files, in which lines of talk metadata begin with a tag."""
    if len(sides[0]) != len(sides[1]):
        raise UserError(f"{archive}: expected as many lines on both sides, got {len(sides[0])} and {len(sides[1])}")
    return [pair for pair in zip(*sides, strict=True) if not any(side.lstrip().startswith("<") for side in pair)]


def _segments(path: Path) -> list[str]:
    """Texts of the <seg> elements, entities left as they stand, as the hub's copy has them."""
    return [text.strip() for text in re.findall(r"<seg[^>]*>([^<]*)</seg>", path.read_bytes().decode("utf-8"))]


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{pattern}: expected one such file in the archive, found {len(found)}")
    return found[0]
