"""The sole reader of params.yaml: validated, frozen, unknown keys refused.

A trial's recipe is the `train` block of its task and scale, with the block of its model laid over it; a family of
`Kinds.alone` has a block of its own and takes nothing of `train`.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from pipeline import paths
from pipeline.errors import UserError
from pipeline.schema import Count, Natural, NonNegative, Positive, Probability, Share, build, defaults

Precision = Literal["auto", "float32", "tf32", "bfloat16"]
Compile = Literal["none", "default", "reduce-overhead"]
Tokeniser = Literal["moses", "whitespace", "words"]
SCALES = ("sample", "small", "paper")
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")  # of a task or a model; folders are called so
QRNN, LSTM, VARIATIONAL = ("qrnn",), ("lstm",), ("variational",)


@dataclass(frozen=True)
class Fetch:
    """Where the raw text comes from. `sample` is generated and needs sizes and a seed; `real` has its own."""

    source: Literal["sample", "real"]
    train: Count | None = None
    valid: Natural | None = None
    test: Count | None = None
    seed: Natural | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("train", "valid", "test", "seed")}
        missing = [name for name, size in sizes.items() if size is None]
        if self.source == "sample" and missing:
            raise ValueError(f"source sample needs {', '.join(missing)}")
        if self.source == "real" and len(missing) < len(sizes):
            raise ValueError("source real has its own sizes; train, valid, test and seed belong to source sample")


@dataclass(frozen=True)
class ImdbFetch(Fetch):
    embeddings: Literal["random", "glove"] = "random"


@dataclass(frozen=True)
class ImdbPreprocess:
    dev_fraction: Probability
    split_seed: Natural
    minimum_count: Count
    vocabulary_size: Count | None
    train_reviews: Count | None
    test_reviews: Count | None
    tokeniser: Tokeniser = "moses"
    corpus_vectors: Count | None = None


@dataclass(frozen=True)
class PtbPreprocess:
    train_tokens: Count | None


@dataclass(frozen=True)
class IwsltPreprocess:
    max_characters: Count
    train_pairs: Count | None
    dev_pairs: Count | None
    test_pairs: Count | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a trial's number besides data and seed."""

    DETERMINISTIC: ClassVar[bool] = False  # whether the seed decides nothing, so that the grid has one of them

    FAMILIES: ClassVar[tuple[str, ...]] = ("qrnn", "lstm")
    # What not every family has, and which ones do; the others have it at its default, where it asks for nothing.
    FAMILIES_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        "kernel_size": QRNN, "pooling": QRNN, "zoneout": QRNN, "zoneout_evaluation": QRNN,
    }  # fmt: skip

    family: str
    layers: Count
    hidden: Count
    embedding: Count
    dropout: Probability
    kernel_size: Count | tuple[Count, ...] | None = None
    pooling: Literal["f", "fo", "ifo"] | None = None
    zoneout: Probability = 0.0
    zoneout_evaluation: Literal["none", "scaled"] = "none"
    bias: bool = True
    initial_range: Positive | None = None
    optimiser: Literal["sgd", "rmsprop", "adam"]
    learning_rate: Positive
    alpha: Probability = 0.9
    betas: tuple[Probability, ...] = (0.9, 0.999)
    epsilon: Positive = 1e-8
    constant_epochs: Count
    decay: Positive
    l2: NonNegative
    l2_order: Literal["after_clip", "before_clip"] = "after_clip"
    clip_norm: Positive | None
    batch_size: Count
    epochs: Count
    selection: Literal["best", "last"]
    patience: Count | None = None

    def __post_init__(self) -> None:
        if self.family not in self.FAMILIES:
            raise ValueError(f"family: expected {' or '.join(self.FAMILIES)}, got {self.family!r}")
        if self.family == "qrnn" and (self.kernel_size is None or self.pooling is None):
            raise ValueError("family qrnn needs kernel_size and pooling")
        by_default = defaults(self)
        for name, families in self.FAMILIES_WITH.items():
            if self.family not in families and getattr(self, name) != by_default[name]:
                known = " or ".join(families) if len(families) > 1 else f"{families[0]} alone"
                raise ValueError(f"{name}: expected in family {known}, got family {self.family}")
        self.require_widths("kernel_size", self.kernel_size)
        if self.patience is not None and self.selection == "last":
            raise ValueError("patience: expected none with selection last, which trains to the last epoch")
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected 2 numbers, got {len(self.betas)}")

    def require_widths(self, name: str, widths: int | tuple[int, ...] | None) -> None:
        if isinstance(widths, tuple) and len(widths) != self.layers:
            raise ValueError(f"{name}: expected {self.layers} widths, one a layer, got {len(widths)}")


@dataclass(frozen=True, kw_only=True)
class ImdbRecipe(Recipe):
    dense: bool
    max_tokens: Count | None
    readout: Literal["last", "mean", "max"] = "last"
    trainable_embeddings: bool = True
    unknown_vectors: Literal["drawn", "zero"] = "drawn"


@dataclass(frozen=True, kw_only=True)
class NbsvmRecipe:
    """NBSVM (`pipeline/nbsvm.py`): fitted once, so it shares nothing with the networks' recipes."""

    DETERMINISTIC: ClassVar[bool] = True

    family: Literal["nbsvm"]
    ngrams: Count
    alpha: Positive
    cost: Positive
    tolerance: Positive
    beta: Share
    lowercase: bool
    train_on_dev: bool


@dataclass(frozen=True, kw_only=True)
class PtbRecipe(Recipe):
    FAMILIES: ClassVar[tuple[str, ...]] = (*Recipe.FAMILIES, *VARIATIONAL)
    FAMILIES_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        **Recipe.FAMILIES_WITH, "window_inputs": QRNN,
        "zoneout": (*QRNN, *VARIATIONAL), "recurrent_dropout": VARIATIONAL, "mc_samples": VARIATIONAL,
    }  # fmt: skip

    unroll: Count
    tied: bool
    loss_reduction: Literal["sum", "mean"] = "sum"
    window_inputs: Literal["carry", "zero"] = "carry"
    recurrent_dropout: Probability = 0.0
    word_dropout: Probability = 0.0
    mc_samples: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied and self.embedding != self.hidden:
            raise ValueError(f"tied: expected an embedding as wide as the layers, {self.hidden}, got {self.embedding}")
        if self.mc_samples is not None and not (self.dropout or self.recurrent_dropout):
            raise ValueError("mc_samples: expected dropout or recurrent_dropout above 0, else all samples are the same")


@dataclass(frozen=True, kw_only=True)
class IwsltRecipe(Recipe):
    FAMILIES_WITH: ClassVar[dict[str, tuple[str, ...]]] = {
        **Recipe.FAMILIES_WITH, "extra_padding": QRNN, "context_layers": QRNN, "encoder_states": QRNN,
        "attentional": LSTM,
    }  # fmt: skip

    encoder_kernel_size: Count | tuple[Count, ...] | None = None
    extra_padding: Literal["left", "right"] = "left"
    context_layers: Literal["all", "last"] = "all"
    encoder_states: Literal["h", "c"] = "h"
    attentional: Literal["linear", "tanh"] = "linear"
    loss_reduction: Literal["mean", "sum"] = "mean"
    beam_width: Count
    length_alpha: NonNegative
    target_margin: Natural = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_widths("encoder_kernel_size", self.encoder_kernel_size)
        if (self.family == "qrnn") != (self.encoder_kernel_size is not None):
            raise ValueError("encoder_kernel_size: family qrnn needs it, family lstm has none")


@dataclass(frozen=True)
class Task:
    """One task at one scale: blocks as written; `recipe` gives a model's whole recipe."""

    name: str
    fetch: Any
    preprocess: Any
    recipes: dict[str, Recipe | NbsvmRecipe]


@dataclass(frozen=True)
class Compute:
    """Where trials run. No part of a trial's identity; the record says what was used."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Count
    precision: Precision
    compile: Compile
    gpus_per_trial: Positive
    max_failures: Natural


@dataclass(frozen=True)
class Speed:
    """What stage `speed` measures."""

    batch_sizes: tuple[Count, ...]
    lengths: tuple[Count, ...]
    repeats: Count
    steps: Count

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "lengths"):
            sizes = getattr(self, name)
            if not sizes or len(set(sizes)) != len(sizes):
                raise ValueError(f"{name}: expected one or more distinct whole numbers, got {list(sizes)}")


@dataclass(frozen=True)
class Kinds:
    fetch: type
    preprocess: type
    recipe: type
    alone: dict[str, type] = field(default_factory=dict)  # by family: recipes that take nothing of the train block


KINDS = {
    "imdb": Kinds(ImdbFetch, ImdbPreprocess, ImdbRecipe, {"nbsvm": NbsvmRecipe}),
    "ptb": Kinds(Fetch, PtbPreprocess, PtbRecipe),
    "iwslt": Kinds(Fetch, IwsltPreprocess, IwsltRecipe),
}
TASKS = tuple(KINDS)


def trial_name(task: str, model: str, seed: int) -> str:
    """What a trial is called within its scale."""
    return f"{task}/{model}/seed-{seed}"


@dataclass(frozen=True)
class Cell:
    """Task x model at a scale: one row of a table."""

    scale: str
    task: str
    model: str


@dataclass(frozen=True)
class Trial:
    """Cell x seed: one training run, with everything it needs to know."""

    cell: Cell
    seed: int
    recipe: Any  # a Recipe of the task, or an NbsvmRecipe
    preprocess: Any  # the task's block: what its processed data are to be made with

    @property
    def name(self) -> str:
        return trial_name(self.cell.task, self.cell.model, self.seed)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe as plain values, for the record and for the trial's identity."""
        return plain(dataclasses.asdict(self.recipe))


class Params:
    """params.yaml, validated as a whole when read."""

    def __init__(self, values: dict[str, Any], file: str = "params.yaml") -> None:
        if not isinstance(values, dict):
            raise UserError(f"{file}: expected a mapping, got {type(values).__name__}")
        known = ("scale", "tasks", "seeds", "compute", "speed", *TASKS)
        for key in values:
            if key not in known:
                raise UserError(f"{file}: {key}: unknown parameter")
        for key in known:
            if key not in values:
                raise UserError(f"{file}: {key}: missing")
        self.scale: str = build(Literal[SCALES], values["scale"], "scale")  # type: ignore[valid-type]
        if values["tasks"] != list(TASKS):
            raise UserError(f"tasks: expected {list(TASKS)}, got {values['tasks']!r}")
        self._seeds = {s: _seeds(v, f"seeds.{s}") for s, v in _scales(values["seeds"], "seeds").items()}
        compute = _scales(values["compute"], "compute")
        self._compute = {s: build(Compute, v, f"compute.{s}") for s, v in compute.items()}
        speed = _scales(values["speed"], "speed")
        self._speed = {s: build(Speed, v, f"speed.{s}") for s, v in speed.items()}
        self._tasks = {(task, scale): _task(task, block, f"{task}.{scale}")
                       for task in TASKS for scale, block in _scales(values[task], task).items()}  # fmt: skip

    def task(self, scale: str, task: str) -> Task:
        require(scale, SCALES, "scale")
        require(task, TASKS, "task")
        return self._tasks[task, scale]

    def compute(self, scale: str) -> Compute:
        return self._compute[require(scale, SCALES, "scale")]

    def speed(self, scale: str) -> Speed:
        return self._speed[require(scale, SCALES, "scale")]

    def trial(self, scale: str, task: str, model: str, seed: int) -> Trial:
        block = self.task(scale, task)
        require(model, tuple(block.recipes), f"model of {task}")
        if seed < 0:
            raise UserError(f"seed: expected a whole number of at least 0, got {seed}")
        return Trial(Cell(scale, task, model), seed, block.recipes[model], block.preprocess)

    def cells(self, scale: str, task: str | None = None) -> list[Cell]:
        tasks = TASKS if task is None else (require(task, TASKS, "task"),)
        return [Cell(scale, name, model) for name in tasks for model in self.task(scale, name).recipes]

    def grid(self, scale: str, task: str | None = None) -> list[Trial]:
        """All trials of a scale (of one task, where given), seed by seed so that every cell has a number early.

        A deterministic recipe has the first seed alone.
        """
        trials = [self.trial(scale, cell.task, cell.model, seed)
                  for seed in self.seeds(scale) for cell in self.cells(scale, task)]  # fmt: skip
        return [trial for trial in trials if trial.seed == self.seeds(scale)[0] or not trial.recipe.DETERMINISTIC]

    def seeds(self, scale: str) -> tuple[int, ...]:
        return self._seeds[require(scale, SCALES, "scale")]


def off_default(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """What a recipe, as plain values, sets off the defaults of its class.

    It is what identifies the recipe: a parameter added later, whose default is what was done before, changes nothing of
    it. So the default of a parameter that records were made with is not to be changed.
    """
    by_default = _defaults(task, config)
    return {name: value for name, value in config.items() if name not in by_default or value != by_default[name]}


def with_defaults(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """A recipe, as plain values, with the defaults of the parameters that its record is older than."""
    return {**config, **{name: value for name, value in _defaults(task, config).items() if name not in config}}


def _defaults(task: str, config: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a recipe's class, as plain values; none for a task that is known from records alone."""
    if task not in KINDS:
        return {}
    kinds = KINDS[task]
    return plain(defaults(kinds.alone.get(config.get("family", ""), kinds.recipe)))


def load(path: Path | None = None) -> Params:
    """Reads and validates params.yaml.

    Raises:
        UserError: no such file, no YAML, or a parameter that is unknown, missing, ill-typed or out of range.
    """
    path = path or paths.params_file()
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from a checkout of the project") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    return Params(values, path.name)


class _OnceEach(yaml.SafeLoader):
    """A loader that refuses a key that stands twice in one block, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.composer.ComposerError(
                None, None, f"the key {twice!r} stands twice in one block", node.start_mark
            )
        return node


def require(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise UserError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")
    return value


def _scales(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict) or set(block) != set(SCALES):
        got = ", ".join(map(str, block)) if isinstance(block, dict) else repr(block)
        raise UserError(f"{where}: expected the scales {', '.join(SCALES)}, got {got}")
    return block


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = build(tuple[Natural, ...], value, where)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"{where}: expected one or more distinct whole numbers, got {value!r}")
    return seeds


def _task(name: str, block: Any, where: str) -> Task:
    expected = ("fetch", "preprocess", "train", "models")
    if not isinstance(block, dict) or set(block) != set(expected):
        got = ", ".join(map(str, block)) if isinstance(block, dict) else repr(block)
        raise UserError(f"{where}: expected the blocks {', '.join(expected)}, got {got}")
    kinds = KINDS[name]
    models = block["models"]
    if not isinstance(models, dict) or not models:
        raise UserError(f"{where}.models: expected at least one model, got {models!r}")
    for model in models:
        if not NAME.fullmatch(str(model)):
            raise UserError(f"{where}.models: expected names of small letters, digits and hyphens, got {model!r}")
    task = Task(
        name=name,
        fetch=build(kinds.fetch, block["fetch"], f"{where}.fetch"),
        preprocess=build(kinds.preprocess, block["preprocess"], f"{where}.preprocess"),
        recipes={model: _recipe(kinds, block["train"], own, f"{where}.models.{model}")
                 for model, own in models.items()},
    )  # fmt: skip
    vectors = getattr(task.preprocess, "corpus_vectors", None)
    for model, recipe in task.recipes.items():
        if vectors is not None and isinstance(recipe, Recipe) and recipe.embedding != vectors:
            raise UserError(
                f"{where}.models.{model}.embedding: expected {vectors}, as corpus_vectors, got {recipe.embedding}"
            )
    return task


def _recipe(kinds: Kinds, shared: Any, own: Any, where: str) -> Recipe | NbsvmRecipe:
    for part, name in ((shared, where.rsplit(".", 2)[0] + ".train"), (own, where)):
        if not isinstance(part, dict):
            raise UserError(f"{name}: expected a mapping, got {part!r}")
    family = own.get("family")
    if isinstance(family, str) and family in kinds.alone:
        return build(kinds.alone[family], own, where)
    return build(kinds.recipe, {**shared, **own}, where)


def plain(value: Any) -> Any:
    """Tuples as lists, so that a config compares equal to its copy read back from JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
