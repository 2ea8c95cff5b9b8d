"""What the paper leaves open, or can be read in more than one way, and how the trials of a report decided it: read from
their records, never from a file of parameters that may have changed since."""

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.params import KINDS, with_defaults
from pipeline.report import layout as layouts
from pipeline.report.tables import counted
from pipeline.report.text import code, grid, joined, plain, shown

Record = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One such point, for the tasks that it concerns.

    `parameter` is a name in params.yaml, or a count of the data; `where` its place in a record. `others` says what else
    could be, where the parameter's type does not list it. A record has a say where it has every figure of `needs`.
    """

    point: str
    parameter: str
    tasks: tuple[str, ...]
    others: str = ""
    where: Literal["config", "data.parameters", "data.counts"] = "config"
    needs: tuple[str, ...] = ()

    def concerns(self, task: str, record: Record) -> bool:
        """Whether the choice decides anything in this record's trial."""
        family, kinds = layouts.dig(record, "config.family"), KINDS[task]
        if self.where == "config" and family in kinds.alone:  # a recipe of its own
            there = self.parameter in typing.get_type_hints(kinds.alone[family])
        else:
            there = family in kinds.recipe.FAMILIES_WITH.get(self.parameter, (family,))
        return there and all(layouts.dig(record, path) for path in self.needs)

    def value(self, record: Record) -> str:
        parameters = layouts.dig(record, self.where) or {}
        return shown(parameters[self.parameter]) if self.parameter in parameters else "not recorded"

    def alternatives(self, task: str, chosen: Sequence[str]) -> str:
        if self.others:
            return self.others
        kind = KINDS[task].recipe if self.where == "config" else KINDS[task].preprocess
        return ", ".join(option for option in map(shown, options(typing.get_type_hints(kind)[self.parameter]))
                         if option not in chosen)  # fmt: skip


IMDB, PTB, IWSLT = ("imdb",), ("ptb",), ("iwslt",)
EVERY = (*IMDB, *PTB, *IWSLT)
SILENT = (
    Choice("Pooling (eq. 8 wants an output gate)", "pooling", IWSLT),
    Choice("Pooling (the paper's 18M parameters fit fo: 17.7M by count)", "pooling", PTB),
    Choice("Pooling", "pooling", IMDB),
    Choice("Biases of the gates, which eq. 1 has not", "bias", EVERY),
    Choice("Initialisation from U(-r, r)", "initial_range", EVERY, "any r above 0; none: each layer's own"),
    Choice("Softmax layer shares its weights with the embedding", "tied", PTB),
    Choice("Loss over the timesteps of a window", "loss_reduction", PTB),
    Choice("L2 penalty before or after the rescaling of the gradient", "l2_order", PTB,
           needs=("config.l2", "config.clip_norm")),
    Choice("Zoneout in evaluation (Krueger et al. (2016), whose zoneout the paper extends, take the expectation)",
           "zoneout_evaluation", PTB, needs=("config.zoneout",)),
    Choice("Epochs without a better validation after which training ends", "patience", PTB, "1 and more"),
    Choice("Inputs before a window of truncated backpropagation (x[t-1] in eq. 2)", "window_inputs", PTB),
    Choice("Size of the development set, stratified, as a share of train", "dev_fraction", IMDB,
           "any share below 1", "data.parameters"),
    Choice("Seed of that split", "split_seed", IMDB, "any whole number", "data.parameters"),
    Choice("Tokenisation (the paper's 231 words a review fit splitting at white space; the timesteps in Figure 3's "
           "caption runs of letters and digits, of which a review has 235)",
           "tokeniser", IMDB, where="data.parameters"),
    Choice("Least count of a word in train, below which it is unknown", "minimum_count", IMDB, "1 and more",
           "data.parameters"),
    Choice("What the classifier reads of the last layer's output", "readout", IMDB),
    Choice("Word vectors are trained further", "trainable_embeddings", IMDB),
    Choice("Words without a pretrained vector", "unknown_vectors", IMDB, needs=("data.counts.words_with_vector",)),
    Choice("Epochs", "epochs", IMDB, "1 and more"),
    Choice("Epoch that is tested", "selection", (*IMDB, *IWSLT)),
    Choice("Width of the character embeddings", "embedding", IWSLT, "1 and more"),
    Choice("Eq. 7: decoder layers that see the encoder's state (by the text each)", "context_layers", IWSLT),
    Choice("Eq. 7 and 8: which encoder states (by the text hidden ones)", "encoder_states", IWSLT),
    Choice("Eq. 8 for an LSTM, whose output gate is in the cell: what joins context and state", "attentional", IWSLT),
    Choice("Loss: mean over characters, or their sum and the mean over pairs, which the clipping at 5 meets more often",
           "loss_reduction", IWSLT),
    Choice("Side of the odd step of padding of unmasked filters", "extra_padding", IWSLT),
    Choice("Eq. 9: target length above the source's (beyond it the factor is read as 1)", "target_margin", IWSLT,
           "0 and more; the paper has 5"),
    Choice("Training pairs, before long ones are left out", "train_raw_pairs", IWSLT,
           "the paper has 209,772; no archive found has that count",
           "data.counts"),
)  # fmt: skip


FIXED = (
    (EVERY, "Where no r is given, linear, QRNN and LSTM layers start uniform within 1 / sqrt(fan in) (an LSTM: of its "
            "units), embeddings normal. An LSTM's forget gates start at about one half, as a QRNN's do."),
    ((*IMDB, *IWSLT), "Reviews, or pairs, of a batch are of similar length: 64 batches at a time are drawn, sorted by "
                      "length and cut up."),
    (IMDB, "The LSTM has the QRNN's dropout, penalty, learning rate and batch size, which the paper gives for the QRNN "
           "alone."),
    (IMDB, "Dropout acts on the embeddings, between layers and on what the classifier reads; the paper has it between "
           "layers."),
    (IMDB, "By Moses don't is don and 't, where GloVe has do and n't: contractions start without a pretrained vector. "
           "HTML's line breaks are read as spaces."),
    (IMDB, "Words that training has not are read as one unknown word, even those that have a pretrained vector; where "
           "every word of training is kept, nothing trains that word's own."),
    (PTB, "Dropout acts on the embeddings, between layers and on the last layer's output, as in Zaremba et al. (2014); "
          "Table 2 names the first two."),
    ((*IMDB, *PTB), "The L2 penalty is on every parameter, embeddings and biases too."),
    (PTB, "The LSTM has the QRNN's number of units, dropout, schedule, penalty and windows and is tested at its best "
          "epoch; the paper gives none of these for it, and the 20M parameters it prints are nearer to 650 units "
          "(19.8M) than to the QRNN's 640 (19.4M). Embeddings are as wide as the layers."),
    (PTB, "Validation reads the text in 20 streams, test in one, in which every token has its whole history."),
    (IWSLT, "Source and target share one embedding. The LSTM's dropout is on embeddings and between layers, and its "
            "decoder starts from its encoder's last states, in place of eq. 7. In eq. 8 it asks with its output, after "
            "its gate, a QRNN with its state before."),
    (IWSLT, "The best epoch is that of the fewest bits a character on validation. Of BLEU the paper names neither case "
            "nor tokenisation; ours are in the signature."),
    (IWSLT, "The length of an output in eq. 9 counts its end, that of a source does not. An output ends at twice the "
            "target length at the latest."),
    (IWSLT, "Beam search ends when as many hypotheses as the beam is wide are finished and the best of them is above "
            "the best unfinished one, though eq. 9 might still have raised that."),
)  # fmt: skip
"""What else the paper leaves open, and the code has one way for: tasks, and the way in words."""


def options(kind: Any) -> tuple[Any, ...]:
    """The values that a parameter's type lists: those of a Literal, true and false; none for numbers."""
    if kind is bool:
        return (True, False)
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(value for one in typing.get_args(kind) for value in options(one))
    return ()


def section(tables: dict[str, Any], records: Sequence[Record]) -> list[str]:
    """Lines of the section; `tables` as `tables.tables` makes them, by task. The records behind their cells speak."""
    rows = [row for task, table in tables.items() for row in _rows(task, table, records)]
    heading = ["Task", "Point", "Parameter", "Here", "Alternatives"]
    return [
        "## Choices where the paper is silent, or can be read otherwise", "",
        "As the records behind the tables have them. Each is a parameter in `params.yaml`, except what is counted in "
        "the data.", "",
        *(grid(heading, rows, left=range(5)) if rows else ["No trial stands in the tables yet."]), "",
        *_fixed({row[0] for row in rows}),
    ]  # fmt: skip


def _fixed(tasks: set[str]) -> list[str]:
    said = [f"- {joined([task.upper() for task in concerned if task in tasks])}: {plain(text)}"
            for concerned, text in FIXED if tasks & {*concerned}]  # fmt: skip
    return ["Without a parameter, because the code has one way for it:", "", *said, ""] if said else []


def _rows(task: str, table: dict[str, Any], records: Sequence[Record]) -> Iterator[list[str]]:
    mine = counted(table["models"], [record for record in records if record["task"] == task])
    labels = {row["model"]: row["label"] for row in table["models"]}
    for choice in SILENT:
        if not mine or task not in choice.tasks:
            continue
        found: dict[str, dict[str, None]] = {}  # models by value, in their order
        implied = set()  # values of which a record says nothing, being older than the parameter
        for record in mine:
            whole = {**record, "config": with_defaults(task, record["config"])}
            if choice.concerns(task, whole):
                value = choice.value(whole)
                found.setdefault(value, {})[labels[record["model"]]] = None
                implied |= {value} - {choice.value(record)}
        yield [task, plain(choice.point), code(choice.parameter), plain(_here(found, implied)),
               plain(choice.alternatives(task, list(found)))]  # fmt: skip


def _here(found: dict[str, dict[str, None]], implied: set[str]) -> str:
    """The value chosen; where models differ each with its models."""
    said = {value: f"{value}, the default where not recorded" if value in implied else value for value in found}
    if len(found) < 2:
        return next(iter(said.values()), "no effect here")
    return "; ".join(f"{said[value]} ({', '.join(models)})" for value, models in found.items())
