"""The paper's claims, each beside what the tables and measurements say of it.

The words of a verdict:

borne out, refuted: between models, the 95 % confidence interval of the difference of their means lies wholly on the
    claim's side of zero, or wholly on the other (Welch's interval over seeds, scipy), and the one that
    is worse has not fallen short of its own figure in the paper by more than the paper's gap. Of speed,
    every CUDA device that was measured reaches the figure that stands under "judged by", or none does. Of a count,
    that it is so of all that was counted, or not. Of states over a review, that it is so in every seed, or in none.
undecided: there are figures, and they settle nothing: the interval has zero within it, a model has a single seed, the
    model that came off worse fell short, training was stopped before it could overfit, or devices, or states by seed,
    differ.
not tested: a figure is missing. The claims of speed are about a GPU; what a CPU does is shown but not judged.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from scipy import stats

from pipeline.report import layout as layouts
from pipeline.report import reading, speed
from pipeline.report.layout import Column
from pipeline.report.section import STALE
from pipeline.report.text import capital, grid, joined, plain

Verdict = Literal["borne out", "refuted", "undecided", "not tested"]
Made = dict[str, Any]
Lines = list[str]
CONFIDENCE = 0.95
MARK = STALE["sources"][0]
_NOT_RUN = "not run"
# Of the best validation: what the last epoch's may be worse by and count as no worse. Set when PTB's first LSTM (1.9 %)
# and QRNN (0.1 %) were known, and the QRNN with zoneout was not.
_AT_ITS_BEST = 0.01
_UP_TO = layouts.published()["source"]["up_to"]  # times as fast


@dataclass(frozen=True)
class Finding:
    """What there is of a claim: the verdict, our figures and the paper's in words, and what deviates behind ours."""

    verdict: Verdict
    here: str
    paper: str
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim in our words, where the paper makes it, and how it is judged from the report's numbers, also in words."""

    name: str
    text: str
    place: str
    rule: str
    judge: Callable[[Made], Finding]


# Models


def better(task: str, model: str, other: str, path: str, made: Made, printed: str | None = None) -> Finding:
    """Judges whether a model's figure is better than another's, over seeds.

    `printed` is the row with the paper's figure of the first, where it is another.
    """
    column = layouts.LAYOUTS[task].column(path)
    rows = [_row(made, task, name) for name in (model, other)]
    cells = [row["cells"].get(path, _NOTHING) for row in rows]
    paper = [_row(made, task, name)["cells"].get(path, _NOTHING)["paper"] for name in (printed or model, other)]
    sign = 1.0 if column.metric.better == "higher" else -1.0
    values = [list(cell["seeds"].values()) for cell in cells]
    here = " against ".join(_figure(column, row) for row in rows)
    interval = _interval(*values)
    if interval:
        here += f", difference {interval[0]:.2f} to {interval[1]:.2f}"
    verdict = _over_seeds(*values, sign=sign)
    if all(values) and (short := _falls_short([cell["mean"] for cell in cells], paper, sign)):
        here += f"; the {short[0]} is {short[1]:.2f} short of the paper's"
        verdict = "undecided"
    return Finding(verdict, here, _printed(*paper), _deviations(*rows))


def _falls_short(
    means: list[float], paper: list[dict[str, Any] | None], sign: float
) -> tuple[Literal["former", "latter"], float] | None:
    """The worse of two models, and by how much it is worse than in the paper, if by more than the paper's gap.

    To be better than a model that did not become what it is in the paper says nothing of the two.
    """
    former, latter = paper
    if former is None or latter is None:
        return None
    is_former = sign * means[0] < sign * means[1]
    published = (former if is_former else latter)["value"]
    short = sign * (published - means[0 if is_former else 1])
    gap = abs(former["value"] - latter["value"])
    # A hair's breadth, so that the very figures of the paper, exchanged, do not fall short by rounding.
    return ("former" if is_former else "latter", short) if short > gap * (1 + 1e-9) else None


def zoneout_helps(made: Made) -> Finding:
    """Judges the reading of zoneout in evaluation that is the better on validation, of those that every trial has."""
    literal, expected = "qrnn-zoneout", "qrnn-zoneout-scaled"
    one, two = (_row(made, "ptb", name)["cells"].get("valid.perplexity", _NOTHING) for name in (literal, expected))
    taken = expected if two["n"] and two["n"] == one["n"] and two["mean"] < one["mean"] else literal
    found = better("ptb", taken, "qrnn", "test.perplexity", made, printed=literal)
    return replace(found, here=f"expected gate: {found.here}") if taken == expected else found


def ends_at_its_best(task: str, model: str, whether: bool, made: Made) -> Finding:
    """Judges whether a model's validation is at its best, or not, when its epochs are over: by the mean over seeds.

    Of training that was stopped while it was, nothing is known.
    """
    row = _row(made, task, model)
    courses = row.get("course", {}).values()
    if not courses:
        return Finding("not tested", _NOT_RUN, "—")
    away = sum(abs(one["last"] / one["best"] - 1) for one in courses) / len(courses)
    run, epochs = min(one["epochs"] for one in courses), row["config"]["epochs"]
    here = f"{away:.2%} (n = {len(courses)}){_mark(row)}"
    here += f"; stopped after {run} of {epochs} epochs" if run < epochs else ""
    at_its_best = away <= _AT_ITS_BEST
    verdict: Verdict = "borne out" if at_its_best is whether else "refuted"
    if len(courses) < 2 or (at_its_best and run < epochs):
        verdict = "undecided"
    return Finding(verdict, here, "—", _deviations(row))


def _over_seeds(ours: Sequence[float], theirs: Sequence[float], sign: float) -> Verdict:
    """The verdict on ours being the larger (sign 1) or smaller (-1); figures of one seed have no spread to judge by."""
    if not ours or not theirs:
        return "not tested"
    interval = _interval(ours, theirs)
    if not interval:
        return "undecided"
    low, high = sorted(sign * end for end in interval)
    return "borne out" if low > 0 else "refuted" if high < 0 else "undecided"


def _interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """Welch's interval of the difference of the means; None with fewer than two seeds on a side."""
    if min(len(ours), len(theirs)) < 2:
        return None
    if len({*ours}) == len({*theirs}) == 1:  # no spread at all: the interval is a point
        return ours[0] - theirs[0], ours[0] - theirs[0]
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def fewer_parameters(tasks: Sequence[str], model: str, other: str, made: Made) -> Finding:
    """Judges whether a model has fewer parameters than another, at every task; they do not depend on the seed."""
    pairs = [[_row(made, task, name) for name in (model, other)] for task in tasks]
    known = [[row["cells"]["parameters"]["mean"] for row in pair] for pair in pairs if all(map(_counted, pair))]
    verdict: Verdict = "borne out" if len(known) == len(tasks) else "undecided" if known else "not tested"
    if any(ours >= theirs for ours, theirs in known):
        verdict = "refuted"
    texts = [" against ".join(_figure(Column("parameters"), row) for row in pair) for pair in pairs]
    names = [f"{task.upper()} " if len(tasks) > 1 else "" for task in tasks]
    paper = [row["cells"].get("parameters", _NOTHING)["paper"] for row in pairs[0]]
    printed = _printed(*paper) if len(tasks) == 1 else "—"
    return Finding(verdict, joined([name + text for name, text in zip(names, texts, strict=True)]), printed)


def _counted(row: dict[str, Any]) -> bool:
    return row["cells"].get("parameters", _NOTHING)["n"] > 0


_NOTHING: dict[str, Any] = {"n": 0, "seeds": {}, "paper": None}


def _row(made: Made, task: str, model: str) -> dict[str, Any]:
    """A model's row, an empty one where the report has none."""
    rows = made["tables"].get(task, {"models": []})["models"]
    return next((row for row in rows if row["model"] == model), {"cells": {}, "deviations": [], "stale": _CURRENT})


_CURRENT: dict[str, list[int]] = {"sources": []}


def _figure(column: Column, row: dict[str, Any]) -> str:
    """A row's figure with the number of its seeds, marked where one is of other sources."""
    cell = row["cells"].get(column.path, _NOTHING)
    if not cell["n"]:
        return _NOT_RUN
    return f"{reading.figure(column, cell)} (n = {cell['n']}){_mark(row)}"


def _mark(row: dict[str, Any]) -> str:
    """What marks a figure where a trial behind its row is of other sources."""
    return MARK if row["stale"]["sources"] else ""


def _deviations(*rows: dict[str, Any]) -> tuple[str, ...]:
    """Names of what deviates behind rows, sorted, each once."""
    return tuple(sorted({item["id"] for row in rows for item in row["deviations"]}))


def _printed(*figures: dict[str, Any] | None) -> str:
    """Figures of the paper as it prints them."""
    return " against ".join(figure["printed"] if figure else "—" for figure in figures)


# Speed


def fastest(mode: str, made: Made) -> Finding:
    """Judges the largest ratio of Figure 4's grid, in inference or training, against that of the paper's abstract.

    The paper prints the ratios of inference alone, and says of those of training that they are similar.
    """
    paper = _published(made, max) if mode == "inference" else "similar"
    return _devices(made, lambda one: max(_ratios(one, mode)), lambda value: value >= _UP_TO, paper)


def nowhere_slower(made: Made) -> Finding:
    """Judges the smallest ratio of Figure 4's grid, in inference."""
    return _devices(made, lambda one: min(_ratios(one, "inference")), lambda value: value > 1, _published(made, min))


def epoch(task: str, times: float, made: Made) -> Finding:
    """Judges whether a task's training steps take the LSTM so many times as long, as an epoch does in the paper."""
    paper = speed.paper_ratio(task) or math.nan

    def ratio(one: dict[str, Any]) -> float | None:
        return one["steps"].get(task, {}).get("ratio")

    return _devices(made, ratio, lambda value: value >= times, f"{paper:.1f}")


def no_bottleneck(made: Made) -> Finding:
    """Judges the recurrent layers' share of what they, softmax and optimisation take of a step, LSTM's and QRNN's."""

    def shares(split: dict[str, dict[str, float]]) -> tuple[float, float]:
        return _recurrent_share(split["lstm"]), _recurrent_share(split["qrnn"])

    def text(both: tuple[float, float]) -> str:
        return f"{both[0]:.2f} against {both[1]:.2f}"

    paper = f"{text(shares(layouts.published()['split']))}, read off the picture"
    return _devices(made, lambda one: shares(one["split"]), lambda both: both[0] > 0.5 > both[1], paper, text)


def _recurrent_share(parts: dict[str, float]) -> float:
    return parts[speed.RNN] / (parts[speed.RNN] + parts[speed.SOFTMAX] + parts[speed.OPTIMISER])


def _ratios(one: dict[str, Any], mode: str) -> list[float]:
    return [cell[mode]["ratio"] for cell in one["grid"]]


def _published(made: Made, pick: Callable[[Iterable[float]], float]) -> str:
    """The paper's largest or smallest ratio at the shapes that were measured."""
    ratios = [cell["paper_inference_ratio"] for one in made["speed"] for cell in one["grid"]
              if "paper_inference_ratio" in cell]  # fmt: skip
    return f"{pick(ratios)}" if ratios else "—"


def _devices(
    made: Made,
    figure: Callable[[dict[str, Any]], Any],
    reached: Callable[[Any], bool],
    paper: str,
    text: Callable[[Any], str] = "{:.2f}".format,
) -> Finding:
    """The verdict over CUDA devices of a figure that each measurement has.

    As with trials at this scale, a measurement by other sources counts and is marked; one of other sizes, recipes or
    data does not.
    """
    found = [(one, value) for one in made["speed"]
             if "settings" not in one["differs"] and (value := figure(one)) is not None]  # fmt: skip
    verdicts = {reached(value) for one, value in found if one["environment"]["device"] == "cuda"}
    verdict: Verdict = "not tested"
    if verdicts:
        verdict = "undecided" if len(verdicts) > 1 else "borne out" if verdicts == {True} else "refuted"
    texts = [f"{text(value)} ({one['machine']}){MARK if one['differs'] else ''}" for one, value in found]
    return Finding(verdict, joined(texts) if texts else "not measured", paper)


def states_turn_and_return(task: str, model: str, made: Made) -> Finding:
    """Judges whether the states over the paper's review are nearer to what they were once it has turned back."""
    row = _row(made, task, model)
    found = list(row.get("turns", {}).values())
    if not found:
        return Finding("not tested", "not looked at", "a picture")
    returned = {one["recovered"] > one["fallen"] for one in found}
    verdict: Verdict = "undecided" if len(returned) > 1 else "borne out" if returned == {True} else "refuted"
    fallen, recovered = (sum(one[name] for one in found) / len(found) for name in ("fallen", "recovered"))
    here = f"{fallen:.2f}, then {recovered:.2f} (n = {len(found)}){_mark(row)}; Figure 3"
    return Finding(verdict, here, "a picture", _deviations(row))


_INTERVAL = "interval of the difference; the worse one not short of the paper's"
CLAIMS = (
    Claim("imdb-accuracy", "On IMDB a densely connected QRNN is more accurate than an LSTM of its size",
          "Table 1, test accuracy (%)", _INTERVAL, partial(better, "imdb", "qrnn", "lstm", "test.accuracy")),
    Claim("imdb-filter", "On IMDB a QRNN is less accurate with a wider first filter",
          "Table 1, test accuracy (%); printed, not said", _INTERVAL,
          partial(better, "imdb", "qrnn", "qrnn-k4", "test.accuracy")),
    Claim("ptb-perplexity", "On PTB a QRNN has a lower perplexity than an LSTM of its size",
          "Table 2, test perplexity", _INTERVAL, partial(better, "ptb", "qrnn", "lstm", "test.perplexity")),
    Claim("ptb-zaremba", "On PTB a QRNN has a lower perplexity than the LSTM of Zaremba et al. (2014)",
          "Section 3.2; Table 2, test perplexity", _INTERVAL,
          partial(better, "ptb", "qrnn", "lstm-zaremba", "test.perplexity")),
    Claim("ptb-zoneout", "Zoneout lowers the QRNN's perplexity",
          "Table 2, test perplexity", f"{_INTERVAL}; of two readings of zoneout the better on validation",
          zoneout_helps),
    Claim("ptb-overfitting", "Without zoneout the QRNN begins to overfit, so that early stopping is needed",
          "Section 3.2", f"last epoch's validation perplexity, more than {_AT_ITS_BEST:.0%} above the best",
          partial(ends_at_its_best, "ptb", "qrnn", False)),
    Claim("ptb-early-stopping", "With zoneout the QRNN needs no early stopping", "Section 3.2",
          f"last epoch's validation perplexity, at most {_AT_ITS_BEST:.0%} above the best",
          partial(ends_at_its_best, "ptb", "qrnn-zoneout", True)),
    Claim("iwslt-bleu", "A QRNN translates characters better than an LSTM of its size",
          "Table 3, BLEU", _INTERVAL, partial(better, "iwslt", "qrnn", "lstm", "test.bleu")),
    Claim("ptb-parameters", "On PTB the QRNN has fewer parameters than the LSTM of its size",
          "Table 2, parameters", "the count", partial(fewer_parameters, ["ptb"], "qrnn", "lstm")),
    Claim("parameters", "QRNNs have fewer parameters than LSTMs of equal hidden size",
          "Section 5", "the count, every task", partial(fewer_parameters, ["imdb", "ptb", "iwslt"], "qrnn", "lstm")),
    Claim("speed-up-to-16", f"A QRNN layer is up to {_UP_TO} times as fast as cuDNN's LSTM",
          "Abstract; Figure 4, right, the largest ratio of inference", f"at least {_UP_TO}",
          partial(fastest, "inference")),
    Claim("speed-up-to-16-training", f"A QRNN layer is up to {_UP_TO} times as fast in training too",
          "Abstract; the largest ratio of training at Figure 4's shapes", f"at least {_UP_TO}",
          partial(fastest, "training")),
    Claim("speed-everywhere", "A QRNN layer is faster at every batch size and length",
          "Figure 4, right; inference, the smallest ratio", "above 1", nowhere_slower),
    Claim("speed-imdb", "An epoch of IMDB takes the LSTM 3.2 times as long",
          "Table 1; here by training steps", "at least 3.2", partial(epoch, "imdb", 3.2)),
    Claim("speed-iwslt", "An epoch of IWSLT takes the LSTM four times as long",
          "Table 3; here by training steps", "at least 4", partial(epoch, "iwslt", 4.0)),
    Claim("speed-bottleneck",
          "The recurrent layers dominate the LSTM language model's time, and the QRNN's not",
          "Figure 4, left; their share of the time of RNN, softmax and optimisation",
          "LSTM's above 0.5, QRNN's below", no_bottleneck),
    Claim("states", "As a review turns and turns back, the last layer's states return towards what they were",
          "Figure 3", "cosine to the state before the turn, after each turn: the second is higher; one review",
          partial(states_turn_and_return, "imdb", "qrnn")),
)  # fmt: skip


def findings(made: Made) -> list[dict[str, Any]]:
    """Every claim with its finding, as `claims.json` has them; none at a scale that is not the paper's."""
    if not made["comparable"]:
        return []
    judged = [(claim, claim.judge(made)) for claim in CLAIMS]
    return [
        {
            "name": claim.name,
            "claim": claim.text,
            "place": claim.place,
            "rule": claim.rule,
            "verdict": finding.verdict,
            "here": finding.here,
            "paper": finding.paper,
            "deviations": list(finding.deviations),
        }
        for claim, finding in judged
    ]


def section(found: Sequence[dict[str, Any]]) -> Lines:
    """Lines of the report's section; none where no claim is judged."""
    if not found:
        return []
    rows = [
        [plain(one[name]) for name in ("claim", "place", "paper", "here", "rule")]
        + [f"**{one['verdict']}**", plain(", ".join(one["deviations"]))]
        for one in found
    ]
    heading = ["The paper claims", "Where", "Paper", "Here", "Judged by", "Verdict", "Deviations"]
    return [
        "## Claims", "",
        *grid(heading, rows, left=range(len(heading))), "",
        "- Between models, *borne out* and *refuted* mean that Welch's 95 % confidence interval of the difference of"
        " their means over seeds lies wholly on one side of zero; with a single seed on a side nothing is decided:"
        " *undecided* says then that no spread is known, not that the figures are close. Nor is anything decided where"
        " the model that is worse falls short of its own figure in the paper by more than the paper's gap, which at"
        " IWSLT, where neither text nor BLEU is the paper's, may be for the data alone."
        " Seeds are all that varies in it: the sampling error of a test set is not in it, nor a correction for the"
        " number of claims. With three seeds a side the interval reaches some 2.3 standard deviations between seeds to"
        " either side, so only larger gaps are settled.",
        f"- The claims of speed are about a GPU (the paper names an {layouts.published()['split']['device']} for its"
        " times of IMDB and PTB, and none for the others): they are borne out if every CUDA device that was measured"
        " reaches the figure they are judged by, refuted on such devices if none does. What a CPU does is shown but not"
        " judged.",
        "- The claims on overfitting are judged by the mean over seeds, with the gate as it is in evaluation. Their"
        f" limit of {_AT_ITS_BEST:.0%} was set when the first LSTM (1.9 %) and the first QRNN without zoneout (0.1 %,"
        " until early stopping ended it) were known. If both QRNNs end within it, zoneout makes no difference that this"
        " shows.",
        "- The claim on states is about one review: borne out if it is so in every seed, refuted if in none.",
        f"- {MARK} {capital(STALE['sources'][1])}.", "",
    ]  # fmt: skip
