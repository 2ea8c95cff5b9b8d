"""params.yaml: what is refused, by name; what a recipe resolves to."""

import dataclasses

import pytest
import yaml
from conftest import write_params

from pipeline import params, paths
from pipeline.errors import UserError
from pipeline.params import Params, load


def refused(values: dict) -> str:
    with pytest.raises(UserError) as caught:
        Params(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("scale", params.SCALES)
def test_committed_file_has_the_cells_of_the_paper(scale: str) -> None:
    """The eight rows that are the paper's own; at scale paper also those that its tables cite and are run here."""
    ptb = [("ptb", f"lstm-{row}") for row in ("zaremba", "variational", "zoneout")]
    cited = {*ptb, ("imdb", "lstm-2"), ("imdb", "nbsvm-bi")} if scale == "paper" else set()
    cells = {(cell.task, cell.model) for cell in load().cells(scale)}
    assert cells == cited | {
        ("imdb", "lstm"), ("imdb", "qrnn"), ("imdb", "qrnn-k4"), ("ptb", "lstm"), ("ptb", "qrnn"),
        ("ptb", "qrnn-zoneout"), ("iwslt", "lstm"), ("iwslt", "qrnn"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("task", "model", "expected"),
    [
        # Section 3.1 to 3.3 of the paper.
        ("imdb", "qrnn", {"layers": 4, "hidden": 256, "embedding": 300, "dropout": 0.3, "l2": 4e-6, "batch_size": 24,
                          "optimiser": "rmsprop", "learning_rate": 1e-3, "alpha": 0.9, "epsilon": 1e-8,
                          "kernel_size": 2, "dense": True, "bias": True, "readout": "last",
                          "trainable_embeddings": True, "unknown_vectors": "drawn"}),
        ("imdb", "qrnn-k4", {"kernel_size": (4, 2, 2, 2)}),
        ("imdb", "lstm-2", {"family": "lstm", "layers": 2, "dense": False}),
        # Wang and Manning (2012), and their program (sidaw/nbsvm: src/master.m, src/trainMNBSVM.m).
        ("imdb", "nbsvm-bi", {"ngrams": 2, "alpha": 1.0, "cost": 1.0, "tolerance": 0.1, "beta": 0.25,
                              "lowercase": True, "train_on_dev": True}),
        ("ptb", "qrnn", {"layers": 2, "hidden": 640, "kernel_size": 2, "dropout": 0.5, "optimiser": "sgd",
                         "learning_rate": 1.0, "constant_epochs": 6, "decay": 0.95, "epochs": 72, "l2": 2e-4,
                         "clip_norm": 10.0, "batch_size": 20, "unroll": 105, "zoneout": 0.0, "selection": "best",
                         "patience": 6, "pooling": "fo", "tied": False, "loss_reduction": "sum",
                         "l2_order": "after_clip", "initial_range": 0.05, "zoneout_evaluation": "none",
                         "window_inputs": "carry", "bias": True}),
        ("ptb", "qrnn-zoneout", {"zoneout": 0.1, "selection": "last", "patience": None}),
        # Section 4.1 of Zaremba et al. (2014), "medium".
        ("ptb", "lstm-zaremba", {"family": "lstm", "layers": 2, "hidden": 650, "embedding": 650, "unroll": 35,
                                 "batch_size": 20, "dropout": 0.5, "initial_range": 0.05, "optimiser": "sgd",
                                 "learning_rate": 1.0, "constant_epochs": 6, "decay": 1 / 1.2, "epochs": 39,
                                 "clip_norm": 5.0, "l2": 0.0, "tied": False, "selection": "last"}),
        # Gal and Ghahramani (2016) change dropout and penalty of that; 0.2 and 1000 are in the QRNN's paper.
        ("ptb", "lstm-variational", {"family": "variational", "layers": 2, "hidden": 650, "embedding": 650,
                                     "unroll": 35, "batch_size": 20, "dropout": 0.35, "recurrent_dropout": 0.2,
                                     "word_dropout": 0.2, "zoneout": 0.0, "mc_samples": 1000, "decay": 1 / 1.2,
                                     "constant_epochs": 6, "epochs": 39, "clip_norm": 5.0, "selection": "last"}),
        ("ptb", "lstm-zoneout", {"family": "variational", "recurrent_dropout": 0.2, "word_dropout": 0.2,
                                 "zoneout": 0.1, "mc_samples": None}),
        ("iwslt", "qrnn", {"layers": 4, "hidden": 320, "encoder_kernel_size": (6, 2, 2, 2), "kernel_size": 2,
                           "dropout": 0.0, "optimiser": "adam", "learning_rate": 1e-3, "betas": (0.9, 0.999),
                           "epsilon": 1e-8, "batch_size": 16, "epochs": 10, "clip_norm": 5.0, "beam_width": 8,
                           "length_alpha": 0.6, "target_margin": 5, "context_layers": "all", "encoder_states": "h",
                           "extra_padding": "left", "bias": True, "loss_reduction": "mean", "attentional": "linear"}),
        ("iwslt", "lstm", {"dropout": 0.2, "attentional": "tanh"}),
    ],
)  # fmt: skip
def test_paper_scale_is_the_paper(task: str, model: str, expected: dict) -> None:
    recipe = load().trial("paper", task, model, 1).recipe
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("ptb.sample.train.hiden", 3, "ptb.sample.models.lstm.hiden: unknown parameter"),
        ("ptb.sample.train.hidden", "64", "hidden: expected a whole number at least 1, got '64'"),
        ("ptb.sample.train.hidden", 0, "hidden: expected a whole number at least 1, got 0"),
        ("ptb.sample.train.hidden", True, "hidden: expected a whole number at least 1, got True"),
        ("ptb.sample.train.learning_rate", 0, "learning_rate: expected a number above 0, got 0"),
        ("ptb.sample.train.learning_rate", 10**400, "learning_rate: expected a number above 0, got 10000"),
        ("ptb.sample.train.learning_rate", "1e-3", "above 0, got '1e-3' (text: write 0.001 with a dot"),
        ("ptb.sample.models.qrnn.kernel_size", 0, "kernel_size: expected a whole number at least 1, got 0"),
        ("ptb.sample.models.qrnn.kernel_size", [2, 0], "kernel_size[1]: expected a whole number at least 1, got 0"),
        ("ptb.sample.train.dropout", 1.0, "dropout: expected a number at least 0 and below 1, got 1.0"),
        ("ptb.sample.train.l2", "4e-6", "write 4e-06 with a dot"),
        ("ptb.sample.train.optimiser", "adagrad", "expected sgd or rmsprop or adam, got 'adagrad'"),
        ("imdb.sample.models.qrnn-k4.kernel_size", [4, 2, 2], "kernel_size: expected 2 widths, one a layer, got 3"),
        ("imdb.sample.models.lstm.zoneout", 0.1, "zoneout: expected in family qrnn alone, got family lstm"),
        ("ptb.sample.models.lstm.zoneout", 0.1, "zoneout: expected in family qrnn or variational, got family lstm"),
        ("ptb.sample.models.qrnn.recurrent_dropout", 0.1, "recurrent_dropout: expected in family variational alone"),
        ("ptb.sample.models.lstm.mc_samples", 9, "mc_samples: expected in family variational alone, got family lstm"),
        ("ptb.paper.models.lstm-variational.mc_samples", 0, "mc_samples: expected a whole number at least 1, got 0"),
        ("ptb.paper.models.lstm-variational.kernel_size", 2, "kernel_size: expected in family qrnn alone"),
        ("ptb.sample.train.word_dropout", 1.0, "word_dropout: expected a number at least 0 and below 1, got 1.0"),
        ("imdb.sample.models.lstm.word_dropout", 0.1, "imdb.sample.models.lstm.word_dropout: unknown parameter"),
        ("imdb.sample.models.lstm.family", "variational", "family: expected qrnn or lstm, got 'variational'"),
        ("ptb.sample.models.lstm.kernel_size", 2, "kernel_size: expected in family qrnn alone, got family lstm"),
        ("ptb.sample.models.lstm.zoneout_evaluation", "scaled", "zoneout_evaluation: expected in family qrnn alone"),
        ("ptb.sample.models.lstm.window_inputs", "zero", "window_inputs: expected in family qrnn alone"),
        ("iwslt.sample.models.lstm.extra_padding", "right", "extra_padding: expected in family qrnn alone"),
        ("iwslt.sample.models.lstm.context_layers", "last", "context_layers: expected in family qrnn alone"),
        ("iwslt.sample.models.lstm.encoder_states", "c", "encoder_states: expected in family qrnn alone"),
        ("ptb.sample.train.zoneout_evaluation", "mean", "expected none or scaled, got 'mean'"),
        ("ptb.sample.train.loss_reduction", "token", "loss_reduction: expected sum or mean, got 'token'"),
        ("ptb.sample.train.window_inputs", None, "window_inputs: expected carry or zero, got None"),
        ("ptb.sample.train.bias", "no", "bias: expected true or false, got 'no'"),
        (
            "ptb.sample.models.qrnn",
            {"kernel_size": 2, "pooling": "fo", "tied": True, "embedding": 32},
            "tied: expected an embedding as wide as the layers, 64, got 32",
        ),
        ("ptb.sample.models.qrnn_big", {}, "expected names of small letters, digits and hyphens, got 'qrnn_big'"),
        ("ptb.sample.train.readout", "last", "readout: unknown parameter"),
        ("imdb.sample.train.readout", "first", "readout: expected last or mean or max, got 'first'"),
        ("imdb.sample.train.trainable_embeddings", 1, "trainable_embeddings: expected true or false, got 1"),
        ("imdb.sample.train.unknown_vectors", "mean", "unknown_vectors: expected drawn or zero, got 'mean'"),
        ("imdb.small.train.embedding", 50, "imdb.small.models.lstm.embedding: expected 100, as corpus_vectors, got 50"),
        ("imdb.sample.preprocess.tokeniser", "bpe", "tokeniser: expected moses or whitespace or words, got 'bpe'"),
        ("iwslt.sample.train.extra_padding", "both", "extra_padding: expected left or right, got 'both'"),
        ("iwslt.sample.train.context_layers", "first", "context_layers: expected all or last, got 'first'"),
        ("iwslt.sample.train.encoder_states", "o", "encoder_states: expected h or c, got 'o'"),
        ("iwslt.sample.models.qrnn.attentional", "tanh", "attentional: expected in family lstm alone"),
        ("iwslt.sample.models.lstm.attentional", "relu", "attentional: expected linear or tanh, got 'relu'"),
        ("iwslt.sample.train.target_margin", -1, "target_margin: expected a whole number at least 0, got -1"),
        ("imdb.paper.models.nbsvm-bi.hidden", 64, "imdb.paper.models.nbsvm-bi.hidden: unknown parameter"),
        ("imdb.paper.models.nbsvm-bi.beta", 1.5, "beta: expected a number at least 0 and at most 1, got 1.5"),
        ("imdb.paper.models.nbsvm-bi.ngrams", 0, "ngrams: expected a whole number at least 1, got 0"),
        ("imdb.paper.models.lstm.family", "nbsvn", "family: expected qrnn or lstm, got 'nbsvn'"),
        ("ptb.paper.models.lstm.family", "nbsvm", "family: expected qrnn or lstm or variational, got 'nbsvm'"),
        ("ptb.paper.models.qrnn-zoneout.patience", 3, "patience: expected none with selection last"),
        ("iwslt.sample.models.qrnn.encoder_kernel_size", None, "family qrnn needs it, family lstm has none"),
        (
            "iwslt.sample.models.qrnn.encoder_kernel_size",
            [6],
            "encoder_kernel_size: expected 2 widths, one a layer, got 1",
        ),
        ("imdb.sample.fetch.source", "web", "imdb.sample.fetch.source: expected sample or real, got 'web'"),
        ("imdb.small.fetch.train", 10, "belong to source sample"),
        ("seeds.sample", [1, 1], "seeds.sample: expected one or more distinct whole numbers"),
        ("compute.sample.device", "tpu", "compute.sample.device: expected auto or cpu or cuda, got 'tpu'"),
        ("scale", "huge", "scale: expected sample or small or paper, got 'huge'"),
        ("colour", 1, "colour: unknown parameter"),
    ],
)
def test_bad_value_is_named(values: dict, where: str, value: object, message: str) -> None:
    *parents, last = where.split(".")
    block = values
    for name in parents:
        block = block[name]
    block[last] = value
    assert message in refused(values)


def test_a_whole_number_as_text_is_not_said_to_lack_a_dot(values: dict) -> None:
    values["ptb"]["sample"]["train"]["hidden"] = "4"
    assert refused(values).endswith("hidden: expected a whole number at least 1, got '4'")


def test_samples_that_would_all_be_the_same_are_refused(values: dict) -> None:
    values["ptb"]["paper"]["models"]["lstm-variational"].update(dropout=0.0, recurrent_dropout=0.0)
    assert "mc_samples: expected dropout or recurrent_dropout above 0" in refused(values)


def test_missing_parameter_is_named(values: dict) -> None:
    del values["ptb"]["small"]["train"]["epochs"]
    assert "ptb.small.models.lstm.epochs: missing" in refused(values)
    del values["iwslt"]["paper"]
    assert "iwslt: expected the scales sample, small, paper" in refused({**values, "ptb": load_block("ptb")})


def load_block(name: str) -> dict:
    return yaml.safe_load((paths.CODE / "params.yaml").read_text())[name]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.trial("huge", "ptb", "qrnn", 1), "unknown scale 'huge'; expected one of sample, small, paper"),
        (lambda p: p.trial("sample", "wmt", "qrnn", 1), "unknown task 'wmt'; expected one of imdb, ptb, iwslt"),
        (lambda p: p.trial("sample", "ptb", "gru", 1), "unknown model of ptb 'gru'; expected one of lstm, qrnn"),
    ],
)
def test_unknown_name_is_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(load())


@pytest.mark.parametrize(
    ("task", "config", "expected"),
    [
        ("ptb", {"family": "qrnn", "tied": True}, {"tied": True, "window_inputs": "carry", "betas": [0.9, 0.999]}),
        ("ptb", {"family": "qrnn", "window_inputs": "zero"}, {"window_inputs": "zero"}),
        ("imdb", {"family": "nbsvm", "alpha": 2.0}, {"alpha": 2.0}),
        ("parsing", {"layers": 2}, {"layers": 2}),
    ],
    ids=["lacking", "set", "stand-alone", "unknown task"],
)
def test_a_record_older_than_a_parameter_has_its_default(task: str, config: dict, expected: dict) -> None:
    whole = params.with_defaults(task, config)
    assert whole.items() >= {**config, **expected}.items()
    assert ("bias" in whole) == (task == "ptb")
    assert "hidden" not in whole  # it has no default
    assert params.off_default(task, whole) == params.off_default(task, config)


def test_broken_yaml_is_one_line(root) -> None:
    (root / "params.yaml").write_text("scale: [sample\nseeds: 3")
    with pytest.raises(UserError, match=r"no valid YAML") as caught:
        load()
    assert "\n" not in str(caught.value)
    (root / "params.yaml").write_bytes("scale: sämple".encode("latin-1"))
    with pytest.raises(UserError, match=r"no valid YAML in UTF-8"):
        load()


def test_a_key_that_stands_twice_is_refused_and_one_that_overrides_a_merged_one_is_not(root) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text + "\nscale: paper\n")
    with pytest.raises(UserError, match=r"the key 'scale' stands twice in one block"):
        load()
    (root / "params.yaml").write_text((paths.CODE / "params.yaml").read_text())
    assert load().task("paper", "ptb").recipes["qrnn"].hidden == 640  # over the 64 of scale sample


def test_grid_is_seed_by_seed(root, values: dict) -> None:
    values["seeds"]["sample"] = [7, 3]
    write_params(root, values)
    assert [trial.name for trial in load().grid("sample", "iwslt")] == [
        "iwslt/lstm/seed-7", "iwslt/qrnn/seed-7", "iwslt/lstm/seed-3", "iwslt/qrnn/seed-3",
    ]  # fmt: skip


RECIPE = {
    "kernel_size": None, "pooling": None, "zoneout": 0.0, "zoneout_evaluation": "none", "bias": True,
    "initial_range": None, "alpha": 0.9, "betas": (0.9, 0.999), "epsilon": 1e-8, "l2_order": "after_clip",
    "patience": None,
}  # fmt: skip
DEFAULTS = {
    params.ImdbRecipe: RECIPE | {"readout": "last", "trainable_embeddings": True, "unknown_vectors": "drawn"},
    params.PtbRecipe: RECIPE | {"loss_reduction": "sum", "window_inputs": "carry", "recurrent_dropout": 0.0,
                                "word_dropout": 0.0, "mc_samples": None},
    params.IwsltRecipe: RECIPE | {"encoder_kernel_size": None, "extra_padding": "left", "context_layers": "all",
                                  "encoder_states": "h", "target_margin": 5, "attentional": "linear",
                                  "loss_reduction": "mean"},
    params.NbsvmRecipe: {},
}  # fmt: skip


@pytest.mark.parametrize("recipe", DEFAULTS, ids=lambda recipe: recipe.__name__)
def test_defaults_stay_what_records_were_made_with(recipe: type) -> None:
    """A record that lacks a parameter is taken to have it at its default, so only new names may come to this list."""
    fields = {field.name: field.default for field in dataclasses.fields(recipe)}
    assert {name: default for name, default in fields.items() if default is not dataclasses.MISSING} == DEFAULTS[recipe]
    assert {kinds.recipe for kinds in params.KINDS.values()} < set(DEFAULTS)
