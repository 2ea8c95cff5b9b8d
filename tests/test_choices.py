"""What the paper leaves open: each parameter does what it says in the task that has it, and the report tells of it."""

import dataclasses
import json
import math
import re
import typing

import numpy as np
import pytest
import torch
import yaml

import pipeline.tasks.iwslt as iwslt_task
from pipeline import paths, report, trial
from pipeline.optimise import Optimiser
from pipeline.params import KINDS, TASKS, load
from pipeline.processed import Processed
from pipeline.report import choices
from pipeline.tasks import task_class
from pipeline.tasks.imdb import start_from_vectors

PARAMS = load(paths.CODE / "params.yaml")
TWO_LAYERS = {"imdb": {}, "ptb": {"kernel_size": 2}, "iwslt": {"encoder_kernel_size": (4, 2)}}
# Every alternative that changes a trial's figures however small the trial; the others have tests of their own below.
ALTERNATIVES = [
    ("imdb", "qrnn", {"bias": False}), ("imdb", "lstm", {"bias": False}), ("imdb", "qrnn", {"readout": "mean"}),
    ("imdb", "lstm", {"readout": "max"}), ("imdb", "qrnn", {"trainable_embeddings": False}),
    ("ptb", "qrnn", {"bias": False}), ("ptb", "qrnn-zoneout", {"zoneout_evaluation": "scaled"}),
    ("ptb", "qrnn", {"window_inputs": "zero"}), ("ptb", "lstm", {"loss_reduction": "mean"}),
    ("iwslt", "qrnn", {"bias": False}), ("iwslt", "lstm", {"bias": False}),
    ("iwslt", "qrnn", {"extra_padding": "right"}), ("iwslt", "qrnn", {"context_layers": "last"}),
    ("iwslt", "qrnn", {"encoder_states": "c"}), ("iwslt", "lstm", {"attentional": "linear"}),
    ("iwslt", "qrnn", {"loss_reduction": "sum"}),
]  # fmt: skip


def changed(task, model, **changes):
    """A trial of the tiny root with two layers and an option changed."""
    whole = load().trial("sample", task, model, 1)
    sizes = {"layers": 2} if whole.recipe.family == "lstm" else {"layers": 2, **TWO_LAYERS[task]}
    return dataclasses.replace(whole, recipe=dataclasses.replace(whole.recipe, **sizes, **changes))


def learner(task, model, **changes):
    data = Processed(paths.processed("sample", task))
    return task_class(task)(data, changed(task, model, **changes).recipe, torch.device("cpu"))


def figures(one):
    record = trial.run(one, device="cpu", report=lambda _progress: None)
    assert record["status"] == "done"
    for entry in record["curve"]:
        entry["valid"].pop("perplexity_scaled", None)  # there or not by the option itself
    return [(entry["train_loss"], entry["valid"]) for entry in record["curve"]], record["config"]


@pytest.mark.parametrize(("task", "model", "change"), ALTERNATIVES)
def test_an_alternative_is_run_and_recorded(data, task, model, change):
    default, _ = figures(changed(task, model))
    other, config = figures(changed(task, model, **change))
    assert other != default
    assert config.items() >= change.items()


@pytest.mark.parametrize(("task", "model"), [(task, model) for task in TASKS for model in ("qrnn", "lstm")])
def test_without_biases_no_recurrent_layer_has_one(data, task, model):
    for bias in (True, False):
        names = [name for name, _ in learner(task, model, bias=bias).model().named_parameters()]
        recurrent = [name for name in names if ".layers." in name]
        assert recurrent
        assert any("bias" in name for name in recurrent) == bias


def test_the_loss_is_summed_or_averaged_over_the_window(data):
    """Over 5 timesteps and 4 rows: the sum is the summed log-likelihood / 4, the mean / 20."""
    for reduction, per in (("sum", 4), ("mean", 20)):
        task = learner("ptb", "qrnn", loss_reduction=reduction)
        step = next(task.steps(task.model(), np.random.default_rng(0)))
        assert step.weight == 20
        assert step.loss.item() == pytest.approx(step.nats.item() / per, rel=1e-6)


def test_a_pairs_characters_are_summed_or_averaged(data):
    """Over 4 pairs: the sum is the summed log-likelihood / 4, the mean that over their characters."""
    for reduction in ("sum", "mean"):
        task = learner("iwslt", "qrnn", loss_reduction=reduction)
        step = next(task.steps(task.model(), np.random.default_rng(0)))
        per = {"sum": 4, "mean": step.weight}[reduction]
        assert step.weight > 4
        assert step.loss.item() == pytest.approx(step.nats.item() / per, rel=1e-6)


def test_inputs_before_a_window_are_carried_or_zero(data):
    """What the model is given in training and in evaluation; c is carried either way."""
    for choice in ("carry", "zero"):
        task = learner("ptb", "qrnn", window_inputs=choice)
        model, seen = task.model(), []
        model.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs))
        for _ in task.steps(model, np.random.default_rng(0)):
            pass
        trained = len(seen)
        task.test(model.eval())
        assert trained > 2
        assert {len(tokens) for tokens, _ in seen[trained:]} == {5 if choice == "zero" else 100}
        for _, state in filter(lambda inputs: inputs[1] is not None, seen):
            assert all(layer.c.any() for layer in state.layers)
            assert all(bool(layer.tail.any()) == (choice == "carry") for layer in state.layers)


def test_a_perplexity_over_windows_without_inputs_is_the_models_own(data):
    """Each window alone, but for c: log-probabilities from the layer's equations, not from the task."""
    task = learner("ptb", "qrnn", window_inputs="zero")
    model = task.model().double().eval()
    text = np.asarray(task.data.array("test"))
    inputs, targets = (torch.tensor(tokens).unsqueeze(-1) for tokens in ([0, *text[:-1].tolist()], text.tolist()))
    nats, c = 0.0, [torch.zeros(1, 8).double()] * 2
    for start in range(0, len(inputs), 5):
        x = model.embedding(inputs[start : start + 5])
        for index, layer in enumerate(model.stack.layers):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            z, f, o = (before @ layer.weight[0] + x @ layer.weight[1] + layer.bias).chunk(3, dim=-1)
            states = []
            for t in range(len(x)):
                c[index] = f[t].sigmoid() * c[index] + (1 - f[t].sigmoid()) * z[t].tanh()
                states.append(c[index])
            x = o.sigmoid() * torch.stack(states)
        scores = model.output(x).log_softmax(-1).gather(-1, targets[start : start + 5].unsqueeze(-1))
        nats -= scores.sum().item()
    assert task.test(model)[0]["perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=1e-6)


def test_word_vectors_are_trained_or_stay(data):
    for trained in (True, False):
        task = learner("imdb", "qrnn", trainable_embeddings=trained, l2=0.1)
        model = task.model()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        optimiser = Optimiser(model, task.recipe)
        optimiser.start_epoch(1)
        for step in task.steps(model, np.random.default_rng(0)):
            optimiser.step(step.loss)
        moved = {name: not torch.equal(value, before[name]) for name, value in model.named_parameters()}
        assert moved.pop("embedding.weight") == trained
        assert all(moved.values())


def test_words_without_a_vector_may_start_at_zero():
    embedding, vectors, ids = torch.nn.Embedding(9, 3), torch.randn(4, 3), torch.tensor([2, 3, 5, 8])
    start_from_vectors(embedding, ids, vectors, unknown="zero")
    assert torch.equal(embedding.weight[ids], vectors)
    assert not embedding.weight[[0, 1, 4, 6, 7]].any()


def test_the_beam_search_is_given_what_the_recipe_says(data, monkeypatch):
    given = {}

    def search(_model, _source, lengths, **options):
        given.update(options)
        return [[4]] * len(lengths)

    monkeypatch.setattr(iwslt_task, "beam_search", search)
    task = learner("iwslt", "qrnn", target_margin=9, beam_width=7, length_alpha=0.3)
    task.translate(task.model(), "test")
    vocabulary = task.data.json("vocabulary")
    assert (vocabulary[given.pop("bos")], vocabulary[given.pop("eos")]) == ("<s>", "</s>")
    assert given == {"target_margin": 9, "width": 7, "alpha": 0.3}


# The report


def record(task, model, config=(), data=()):
    own = PARAMS.trial("sample", task, model, 1)
    return {
        "task": task, "model": model, "seed": 1, "config": {**own.config, **dict(config)},
        "data": {"counts": {"train_raw_pairs": 1234}, "parameters": {"tokeniser": "moses"}, **dict(data)},
    }  # fmt: skip


def cells(records):
    """{(task, parameter): (here, alternatives)} of the section's table."""
    rows = [(r["task"], {"model": r["model"], "label": r["model"].upper(), "seeds": {"done": [1]}}) for r in records]
    tables = {task: {"models": [row for of, row in rows if of == task]} for task in TASKS}
    lines = [line for line in choices.section(tables, records) if line.startswith("| ")][2:]
    texts = [[cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {(task, name.strip("`")): (here, others) for task, _, name, here, others in texts}


def test_the_report_tells_what_the_records_ran_with():
    found = cells([
        record("ptb", "lstm"), record("ptb", "qrnn", {"loss_reduction": "mean", "pooling": "ifo", "l2": 0.1}),
        record("iwslt", "qrnn", {"encoder_states": "c"}),
    ])  # fmt: skip
    assert found["ptb", "loss_reduction"] == ("sum (LSTM); mean (QRNN)", "")
    assert found["ptb", "pooling"] == ("ifo", "f, fo")  # no LSTM has one
    assert found["ptb", "bias"] == ("yes", "no")
    assert found["ptb", "l2_order"] == ("after_clip", "before_clip")
    assert found["ptb", "zoneout_evaluation"] == ("no effect here", "none, scaled")
    assert found["iwslt", "encoder_states"] == ("c", "h")
    assert found["iwslt", "target_margin"][0] == "5"
    assert found["iwslt", "train_raw_pairs"][0] == "1234"
    assert not any(task == "imdb" for task, _ in found)


def test_the_report_does_not_guess_what_a_record_lacks():
    found = cells([record("imdb", "qrnn", data={"parameters": None})])
    assert found["imdb", "tokeniser"][0] == "not recorded"
    assert cells([]) == {}


def test_the_report_knows_the_default_of_a_parameter_that_a_record_is_older_than():
    """The ledger takes it for what was done, and so does the report; it says that no record says so."""
    older = record("imdb", "qrnn")
    del older["config"]["readout"]
    assert cells([older])["imdb", "readout"] == ("last, the default where not recorded", "mean, max")
    newer = record("imdb", "lstm", {"readout": "max"})
    both = "last, the default where not recorded (QRNN); max (LSTM)"
    assert cells([older, newer])["imdb", "readout"] == (both, "mean")


def test_the_report_asks_no_choice_of_a_family_that_lacks_it():
    own = PARAMS.trial("paper", "imdb", "nbsvm-bi", 1).config
    fitted = {**record("imdb", "qrnn"), "model": "nbsvm-bi", "config": own}
    found = cells([record("imdb", "qrnn"), fitted])
    assert found["imdb", "readout"][0] == "last"
    assert found["imdb", "epochs"][0] == "4"
    assert found["imdb", "tokeniser"][0] == "moses"
    alone = cells([fitted])
    assert {alone["imdb", name][0] for name in ("pooling", "bias", "readout", "epochs")} == {"no effect here"}
    assert alone["imdb", "tokeniser"][0] == "moses"


def test_every_choice_is_a_parameter_written_in_params_yaml():
    written = yaml.safe_load((paths.CODE / "params.yaml").read_text())
    for choice in choices.SILENT:
        for task in choice.tasks:
            if choice.where == "data.counts":
                continue
            kind, blocks = KINDS[task].recipe, ("train", "models")
            if choice.where == "data.parameters":
                kind, blocks = KINDS[task].preprocess, ("preprocess",)
            hints = typing.get_type_hints(kind)
            assert choice.parameter in hints
            assert choice.others or choices.options(hints[choice.parameter]), choice
            assert any(f"'{choice.parameter}'" in str(written[task]["sample"][block]) for block in blocks), choice


def test_the_report_of_a_real_trial_has_the_section(data):
    trial.run(load().trial("sample", "imdb", "qrnn", 1), device="cpu", report=lambda _progress: None)
    report.write(load(), "sample")
    text = (paths.results("sample") / "report.md").read_text()
    line = next(line for line in text.splitlines() if "`readout`" in line)
    assert line.split(" | ")[3:] == ["last", "mean, max |"]
    assert json.loads((paths.results("sample") / "tables.json").read_text())["grid"]["done"] == 1
