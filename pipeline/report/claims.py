"""The paper's claims, each beside what the tables and measurements say of it.

The words of a verdict:

borne out, refuted: between models, the 95 % confidence interval of the difference of their means lies wholly on the
    claim's side of zero, or wholly on the other (Welch's interval over seeds, scipy). Of speed, every CUDA device
    that was measured reaches the claim's figure, or none does. Of a count, that it is so, or not.
undecided: there are figures, and they settle nothing: the interval has zero within it, one of the models has a single
    seed, or devices differ.
not tested: a figure is missing. The claims of speed are about a GPU; what a CPU does is told and decides nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    """A claim in our words, where the paper makes it, and how it is judged from the report's numbers."""

    name: str
    text: str
    place: str
    judge: Callable[[Made], Finding]


# Models


def better(task: str, model: str, other: str, path: str, made: Made) -> Finding:
    """Judges whether a model's figure is at least as good as another's, over seeds."""
    column = layouts.LAYOUTS[task].column(path)
    rows = [_row(made, task, name) for name in (model, other)]
    ours, theirs = (row["cells"].get(path, _NOTHING) for row in rows)
    sign = 1.0 if column.metric.better == "higher" else -1.0
    gains = [[sign * value for value in cell["seeds"].values()] for cell in (ours, theirs)]
    deviations = sorted({item["id"] for row in rows for item in row["deviations"]})
    return Finding(_over_seeds(*gains), _beside(column, ours, theirs), _printed(ours, theirs), tuple(deviations))


def _over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """The verdict on ours being the larger; figures of one seed have no spread to judge by."""
    if not ours or not theirs:
        return "not tested"
    if min(len(ours), len(theirs)) < 2:
        return "undecided"
    if len({*ours}) == len({*theirs}) == 1:  # no spread at all: the interval is a point
        return "borne out" if ours[0] >= theirs[0] else "refuted"
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    return "borne out" if interval.low >= 0 else "refuted" if interval.high < 0 else "undecided"


def fewer_parameters(task: str, model: str, other: str, made: Made) -> Finding:
    """Judges whether a model has fewer parameters than another; they do not depend on the seed."""
    ours, theirs = (_row(made, task, name)["cells"].get("parameters", _NOTHING) for name in (model, other))
    known = ours["n"] and theirs["n"]
    verdict: Verdict = "not tested" if not known else "borne out" if ours["mean"] < theirs["mean"] else "refuted"
    return Finding(verdict, _beside(Column("parameters"), ours, theirs), _printed(ours, theirs))


_NOTHING: dict[str, Any] = {"n": 0, "seeds": {}, "paper": None}


def _row(made: Made, task: str, model: str) -> dict[str, Any]:
    """A model's row, an empty one where the report has none."""
    rows = made["tables"].get(task, {"models": []})["models"]
    return next((row for row in rows if row["model"] == model), {"cells": {}, "deviations": []})


def _beside(column: Column, ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return " against ".join(f"{reading.figure(column, cell)} (n = {cell['n']})" if cell["n"] else "nothing"
                            for cell in (ours, theirs))  # fmt: skip


def _printed(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return " against ".join(cell["paper"]["printed"] if cell["paper"] else "—" for cell in (ours, theirs))


# Speed


def fastest(made: Made) -> Finding:
    """Judges the largest ratio of Figure 4's grid, in inference, against that of the paper's abstract."""
    return _devices(made, lambda one: max(_inference(one)), lambda value: value >= _UP_TO, _published(made, max))


def nowhere_slower(made: Made) -> Finding:
    """Judges the smallest ratio of Figure 4's grid, in inference."""
    return _devices(made, lambda one: min(_inference(one)), lambda value: value > 1, _published(made, min))


def epoch(task: str, made: Made) -> Finding:
    """Judges the ratio of a task's training steps against the paper's of an epoch."""
    paper = speed.paper_ratio(task) or math.nan

    def ratio(one: dict[str, Any]) -> float | None:
        return one["steps"].get(task, {}).get("ratio")

    return _devices(made, ratio, lambda value: value >= paper, f"{paper:.1f}")


def no_bottleneck(made: Made) -> Finding:
    """Judges the share of the recurrent layers in what they, softmax and optimisation take of a QRNN's step."""
    paper = _recurrent_share(layouts.published()["split"]["qrnn"])
    return _devices(made, lambda one: _recurrent_share(one["split"]["qrnn"]), lambda value: value < 0.5, f"{paper:.2f}")


def _recurrent_share(parts: dict[str, float]) -> float:
    return parts[speed.RNN] / (parts[speed.RNN] + parts[speed.SOFTMAX] + parts[speed.OPTIMISER])


def _inference(one: dict[str, Any]) -> list[float]:
    return [cell["inference"]["ratio"] for cell in one["grid"]]


def _published(made: Made, pick: Callable[[Iterable[float]], float]) -> str:
    """The paper's largest or smallest ratio at the shapes that were measured."""
    ratios = [cell["paper_inference_ratio"] for one in made["speed"] for cell in one["grid"]
              if "paper_inference_ratio" in cell]  # fmt: skip
    return f"{pick(ratios)}" if ratios else "—"


def _devices(
    made: Made, figure: Callable[[dict[str, Any]], float | None], reached: Callable[[float], bool], paper: str
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
    texts = [f"{value:.2f} ({one['machine']}){MARK if one['differs'] else ''}" for one, value in found]
    return Finding(verdict, joined(texts) if texts else "nothing", paper)


def by_eye(made: Made) -> Finding:
    """A claim that the paper shows by a picture, without a figure that could be held against another."""
    return Finding("not tested", "nothing", "a picture")


CLAIMS = (
    Claim("imdb-accuracy", "On IMDB a densely connected QRNN is at least as accurate as an LSTM of its size",
          "Table 1, test accuracy (%)", partial(better, "imdb", "qrnn", "lstm", "test.accuracy")),
    Claim("imdb-filter", "A wider first filter makes the QRNN no more accurate on IMDB",
          "Table 1, test accuracy (%)", partial(better, "imdb", "qrnn", "qrnn-k4", "test.accuracy")),
    Claim("ptb-perplexity", "On PTB a QRNN has a lower perplexity than an LSTM of its size",
          "Table 2, test perplexity", partial(better, "ptb", "qrnn", "lstm", "test.perplexity")),
    Claim("ptb-zoneout", "Zoneout lowers the QRNN's perplexity",
          "Table 2, test perplexity", partial(better, "ptb", "qrnn-zoneout", "qrnn", "test.perplexity")),
    Claim("ptb-parameters", "The QRNN has fewer parameters than the LSTM of its size",
          "Table 2, parameters", partial(fewer_parameters, "ptb", "qrnn", "lstm")),
    Claim("iwslt-bleu", "A QRNN translates characters better than an LSTM of its size",
          "Table 3, BLEU", partial(better, "iwslt", "qrnn", "lstm", "test.bleu")),
    Claim("speed-up-to-16", f"A QRNN layer is up to {_UP_TO} times as fast as cuDNN's LSTM",
          "Figure 4, right; inference, the largest ratio", fastest),
    Claim("speed-everywhere", "It is faster at every batch size and length",
          "Figure 4, right; inference, the smallest ratio", nowhere_slower),
    Claim("speed-imdb", "An epoch of IMDB takes the LSTM 3.2 times as long",
          "Table 1; here by training steps", partial(epoch, "imdb")),
    Claim("speed-iwslt", "An epoch of IWSLT takes the LSTM four times as long",
          "Table 3; here by training steps", partial(epoch, "iwslt")),
    Claim("speed-bottleneck",
          "The recurrent layers of a QRNN language model take less time than softmax and optimisation",
          "Figure 4, left; their share of the three", no_bottleneck),
    Claim("states", "Single hidden states of the last layer show where the sentiment of a review changes",
          "Figure 3", by_eye),
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
        [plain(one["claim"]), plain(one["place"]), plain(one["paper"]), plain(one["here"]), f"**{one['verdict']}**",
         plain(", ".join(one["deviations"]))]
        for one in found
    ]  # fmt: skip
    heading = ["The paper claims", "Where", "Paper", "Here", "Verdict", "Deviations"]
    return [
        "## Claims", "",
        *grid(heading, rows, left=range(len(heading))), "",
        "- Between models, *borne out* and *refuted* mean that Welch's 95 % confidence interval of the difference of"
        " their means over seeds lies wholly on one side of zero; with a single seed on a side nothing is decided.",
        "- The claims of speed are about a GPU: they are borne out if every CUDA device that was measured reaches the"
        " claim's figure, refuted if none does. What a CPU does is told and decides nothing.",
        f"- {MARK} {capital(STALE['sources'][1])}.", "",
    ]  # fmt: skip
