"""MLflow as a projection of the ledger: what is shown, that it stays the same, and what trouble does."""

import copy
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from pipeline import paths, tracking
from pipeline.params import Cell, ImdbPreprocess, ImdbRecipe, Trial
from pipeline.schema import build

BEGIN = 1_764_000_000.0
RECIPE = build(
    ImdbRecipe,
    {"family": "qrnn", "layers": 2, "hidden": 8, "embedding": 8, "dropout": 0.1, "kernel_size": [4, 2], "pooling": "fo",
     "optimiser": "adam", "learning_rate": 0.25, "constant_epochs": 2, "decay": 1.0, "l2": 0.0, "clip_norm": None,
     "batch_size": 4, "epochs": 2, "selection": "best", "dense": True, "max_tokens": None},
    "recipe",
)  # fmt: skip
PREPROCESS = build(
    ImdbPreprocess,
    {"dev_fraction": 0.1, "split_seed": 1, "minimum_count": 1, "vocabulary_size": None, "train_reviews": None,
     "test_reviews": None},
    "preprocess",
)  # fmt: skip
SHOWN_CONFIG = {"layers": "2", "kernel_size": "[4, 2]", "optimiser": "adam", "clip_norm": "None", "dense": "True"}
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


def entry(epoch, accuracy, finished_at):
    valid = {"accuracy": accuracy, "reviews": 40}
    return {"epoch": epoch, "train_loss": 1.5 / epoch, "learning_rate": 0.25, "valid": valid,
            "epoch_s": 10.0, "items_per_s": 4000.0, "finished_at": finished_at}  # fmt: skip


def record(seed=1, accuracy=80.0, **changes):
    start = BEGIN + 1000 * seed
    made = {
        "schema": 1, "key": f"{seed:020x}", "scale": "sample", "task": "imdb", "model": "qrnn", "seed": seed,
        "status": "done", "error": None, "command": "python -m pipeline trial ...",
        "config": trial(seed).config,
        "code": {"commit": "c0ffee", "dirty": True, "fingerprint": "f1"},
        "data": {"hash": "d1", "source": {"route": "mirror"},
                 "deviations": [{"id": "no-glove", "text": "drawn vectors"}]},
        "environment": {"device": "cpu", "device_name": "a processor", "threads": 1, "hostname": "a-host"},
        "parameters": 1234,
        "curve": [entry(1, 70.0, start + 10), entry(2, accuracy + 1, start + 20)],
        "selected_epoch": 2,
        "valid": {"accuracy": accuracy + 1, "reviews": 40},
        "test": {"accuracy": accuracy, "loss": 0.5, "reviews": 50},
        "timing": {"epoch_s": 10.0, "items_per_s": 4000.0, "total_s": 20.0, "exclusive": False},
        "peak_bytes": 5000, "started_at": start, "finished_at": start + 30,
    }  # fmt: skip
    return {**made, **changes}


def failed(seed=1, **changes):
    nothing = dict.fromkeys(("parameters", "selected_epoch", "valid", "test", "peak_bytes"))
    timing = {"epoch_s": None, "items_per_s": None, "total_s": 0.0, "exclusive": False}
    return record(
        seed, **{**nothing, "status": "failed", "error": "out of memory", "curve": [], "timing": timing, **changes}
    )


def trial(seed=1):
    return Trial(Cell("sample", "imdb", "qrnn"), seed, RECIPE, PREPROCESS)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """A database with MLflow's tables: making them takes seconds, copying them does not."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def root(tmp_path, monkeypatch, empty_database):
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def client(root):
    return tracking.connect()


@pytest.fixture
def live(root):
    return tracking.Live()


def runs(client, task="imdb", kind="trial"):
    experiment = client.get_experiment_by_name(f"qrnn-{task}")
    return client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'", order_by=["tags.seed"])


def content(root):
    """Everything the active runs show, less the ids that MLflow draws."""
    with sqlite3.connect(root / "mlflow.db") as database:
        active = "run_uuid in (select run_uuid from runs where lifecycle_stage = 'active')"
        points = database.execute(f"select key, value, timestamp, step from metrics where {active}").fetchall()
        params = database.execute(f"select key, value from params where {active}").fetchall()
        tags = database.execute(
            f"select key, value from tags where {active} and key != 'mlflow.parentRunId'"
        ).fetchall()
    return sorted(points), sorted(params), sorted(tags)


def counts(summary):
    return summary.created, summary.updated, summary.unchanged, summary.deleted


def test_the_address_is_the_environments_or_a_database_of_the_project(monkeypatch, tmp_path):
    monkeypatch.setenv("QRNN_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert tracking.uri() == "http://somewhere:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking.uri() == f"sqlite:///{paths.root()}/mlflow.db"


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, pipeline.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=paths.CODE).returncode == 0


@pytest.mark.slow
def test_a_trial_is_shown_whole(client):
    tracking.sync([record()], client)
    (run,) = runs(client)
    assert SHOWN_CONFIG.items() <= run.data.params.items()
    assert run.data.params.keys() == trial().config.keys()
    assert run.data.metrics == {
        "train_loss": 0.75, "learning_rate": 0.25, "valid_accuracy": 81.0, "epoch_s": 10.0, "tokens_per_s": 4000.0,
        "test_accuracy": 80.0, "test_loss": 0.5, "selected_valid_accuracy": 81.0, "selected_epoch": 2.0,
        "median_epoch_s": 10.0, "median_tokens_per_s": 4000.0, "total_s": 20.0, "peak_bytes": 5000.0,
        "parameters": 1234.0,
    }  # fmt: skip
    history = client.get_metric_history(run.info.run_id, "valid_accuracy")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 70.0, 1764001010000), (2, 81.0, 1764001020000)]
    shown = {"commit": "c0ffee", "dirty": "true", "data_hash": "d1", "record_key": f"{1:020x}", "fingerprint": "f1",
             "device_name": "a processor", "route": "mirror", "deviations": "no-glove: drawn vectors", "status": "done",
             "scale": "sample", "task": "imdb", "model": "qrnn", "seed": "1"}  # fmt: skip
    assert shown.items() <= run.data.tags.items()
    assert "a-host" not in run.data.tags.values()
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1764001000000, 1764001030000)
    (parent,) = runs(client, kind="cell")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


@pytest.mark.slow
def test_a_cell_shows_mean_deviation_and_number_of_its_seeds(client):
    tracking.sync([record(1, 80.0), record(2, 82.0), record(3, 87.0), failed(4)], client)
    (parent,) = runs(client, kind="cell")
    assert parent.data.metrics["test_accuracy_mean"] == pytest.approx(83.0)
    assert parent.data.metrics["test_accuracy_std"] == pytest.approx(math.sqrt(13))  # (9 + 1 + 16) / 2
    assert parent.data.metrics["n"] == 3
    assert (parent.data.tags["seeds_done"], parent.data.tags["seeds_failed"]) == ("3", "1")
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_characters_and_the_bleu_signature_are_named_for_translation(client):
    test = {"bleu": 3.5, "signature": SIGNATURE, "bits_per_character": 2.0, "characters": 9}
    tracking.sync([record(task="iwslt", test=test)], client)
    (run,) = runs(client, "iwslt")
    assert run.data.tags["bleu_signature"] == SIGNATURE
    assert run.data.metrics["chars_per_s"] == run.data.metrics["median_chars_per_s"] == 4000.0
    assert run.data.metrics["test_bleu"] == 3.5
    assert "tokens_per_s" not in run.data.metrics


@pytest.mark.slow
def test_a_second_sync_changes_nothing(client, root):
    records = [record(1), record(2, 82.0), failed(3), record(1, model="lstm"), record(1, task="ptb")]
    assert counts(tracking.sync(records, client)) == (5 + 3, 0, 0, 0)
    before = content(root), [run.info.run_id for run in runs(client)]
    assert counts(tracking.sync(copy.deepcopy(records), client)) == (0, 0, 5 + 3, 0)
    assert (content(root), [run.info.run_id for run in runs(client)]) == before
    assert len(before[0][0]) > 40


@pytest.mark.slow
def test_syncing_seed_by_seed_comes_to_the_same_as_rebuilding(client, root, tmp_path, empty_database):
    records = [record(1), record(2, 82.0), record(3, 87.0)]
    for n in (1, 2):
        tracking.sync(records[:n], client)
    parent = runs(client, kind="cell")[0].info.run_id
    assert counts(tracking.sync(records, client)) == (1, 1, 2, 0)
    assert runs(client, kind="cell")[0].info.run_id == parent
    (tmp_path / "again").mkdir()
    shutil.copy(empty_database, tmp_path / "again" / "mlflow.db")
    tracking.sync(records, tracking.connect(f"sqlite:///{tmp_path}/again/mlflow.db"))
    assert content(tmp_path / "again") == content(root)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"key": "another"}, {"finished_at": BEGIN + 9000}], ids=["recipe", "rerun"])
def test_a_record_that_was_replaced_replaces_the_run(client, changes):
    tracking.sync([record(1), record(2, 82.0)], client)
    old = runs(client)[0].info.run_id
    summary = tracking.sync([record(1, 90.0, **changes), record(2, 82.0)], client)
    first, second = runs(client)
    assert first.info.run_id != old
    assert first.data.metrics["test_accuracy"] == 90.0
    assert second.data.metrics["test_accuracy"] == 82.0
    assert client.get_run(old).info.lifecycle_stage == "deleted"
    (parent,) = runs(client, kind="cell")
    assert parent.data.metrics["test_accuracy_mean"] == pytest.approx(86.0)
    assert {run.data.tags["mlflow.parentRunId"] for run in (first, second)} == {parent.info.run_id}
    assert counts(summary) == (2, 0, 1, 2)
    assert counts(tracking.sync([record(1, 90.0, **changes), record(2, 82.0)], client)) == (0, 0, 3, 0)


def measurement(ratio=1.5, **changes):
    grid = [{"batch_size": 8, "length": length, "inference": {"ratio": ratio + length}, "training": {"ratio": 1.25}}
            for length in (32, 512)]  # fmt: skip
    step = {"ratio": 3.0, "ms": {"lstm": {"median": 6.0}, "qrnn": {"median": 2.0}}}
    environment = {
        "device": "cuda",
        "device_name": "NVIDIA H200",
        "threads": 1,
        "precision": "float32",
        "torch": "2.11",
    }
    return {"scale": "paper", "settings": {"repeats": 7, "recipes": {"imdb": {}}}, "command": "python -m pipeline",
            "code": {"commit": "c0ffee", "dirty": False, "fingerprint": "f1"}, "environment": environment,
            "layer": {"grid": grid}, "steps": {"imdb": step}, "parts": {}, "started_at": BEGIN,
            "finished_at": BEGIN + 60} | changes  # fmt: skip


@pytest.mark.slow
def test_a_measurement_of_speed_is_a_run_of_its_machine(client):
    """The steps of a batch's curve are the lengths. A newer measurement takes the run's place."""
    assert tracking.sync([], client, measured=[measurement()]).created == 1
    (run,) = runs(client, "speed", "cell")
    assert run.info.run_name == "paper/speed/nvidia-h200"
    assert run.data.params == {"repeats": "7"}
    assert run.data.tags["device_name"] == "NVIDIA H200"
    history = client.get_metric_history(run.info.run_id, "inference_ratio_batch_8")
    assert [(point.step, point.value) for point in history] == [(32, 33.5), (512, 513.5)]
    shown = {name: run.data.metrics[name] for name in run.data.metrics if name.startswith("imdb")}
    assert shown == {"imdb_step_ratio": 3.0, "imdb_lstm_step_ms": 6.0, "imdb_qrnn_step_ms": 2.0}

    assert tracking.sync([], client, measured=[measurement()]).unchanged == 1
    newer = tracking.sync([], client, measured=[measurement(2.5, finished_at=BEGIN + 90)])
    assert (newer.created, newer.deleted) == (1, 1)
    assert len(runs(client, "speed", "cell")) == 1


def test_trouble_with_mlflow_costs_no_result(root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking.show([], [measurement()])
    assert capsys.readouterr().out.startswith("warning: MLflow at http://127.0.0.1:9: ")


def test_a_failed_trial_is_shown_as_such(client):
    tracking.sync([failed()], client)
    (run,) = runs(client)
    assert (run.info.status, run.data.tags["status"], run.data.tags["error"]) == ("FAILED", "failed", "out of memory")
    (parent,) = runs(client, kind="cell")
    assert parent.info.status == "FAILED"
    assert not parent.data.metrics


@pytest.mark.slow
def test_a_running_trial_is_shown_and_completed_on_the_same_run(client, live, root):
    done = record()
    live.epoch(trial(), done["key"], done["curve"][0])
    (running,) = runs(client)
    assert running.info.status == "RUNNING"
    assert running.data.metrics["valid_accuracy"] == 70.0
    assert SHOWN_CONFIG.items() <= running.data.params.items()
    tracking.Live().epoch(trial(), done["key"], done["curve"][1])
    assert len(runs(client)) == 1
    assert counts(tracking.sync([done], client)) == (0, 2, 0, 0)
    (run,) = runs(client)
    assert (run.info.run_id, run.info.status, run.info.end_time) == (running.info.run_id, "FINISHED", 1764001030000)
    assert len(client.get_metric_history(run.info.run_id, "valid_accuracy")) == 2
    assert counts(tracking.sync([done], client)) == (0, 0, 2, 0)


@pytest.mark.slow
def test_what_a_killed_trial_showed_does_not_stay_beside_its_record(client, live):
    """An epoch that ran twice, for the first time got lost, has one point in the record and in MLflow."""
    done = record()
    live.epoch(trial(), done["key"], entry(1, 12.0, BEGIN + 1005))
    live.epoch(trial(), done["key"], done["curve"][0])
    tracking.sync([done], client)
    (run,) = runs(client)
    assert [m.value for m in client.get_metric_history(run.info.run_id, "valid_accuracy")] == [70.0, 81.0]
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_sync_closes_runs_of_trials_that_ended_and_leaves_those_that_train(client, live):
    old = record()
    live.epoch(trial(1), "of an older recipe", old["curve"][0])
    live.epoch(trial(1), "started since", entry(1, 70.0, BEGIN + 9000))
    live.epoch(trial(2), "not recorded yet", record(2)["curve"][0])
    ids = {run.data.tags["record_key"]: run.info.run_id for run in runs(client)}
    tracking.sync([old], client)
    closed = client.get_run(ids["of an older recipe"]).info
    assert (closed.status, closed.lifecycle_stage) == ("KILLED", "deleted")
    for key in ("started since", "not recorded yet"):
        assert client.get_run(ids[key]).info.status == "RUNNING"
    assert counts(tracking.sync([old], client)) == (0, 0, 2, 0)


@pytest.mark.slow
def test_a_run_that_someone_deleted_is_shown_again(client, live):
    done = record()
    live.epoch(trial(), done["key"], done["curve"][0])
    client.delete_run(runs(client)[0].info.run_id)
    with pytest.raises(tracking.TrackingError):
        live.epoch(trial(), done["key"], done["curve"][1])
    tracking.sync([done], client)
    assert len(runs(client)) == 1
    client.delete_experiment(client.get_experiment_by_name("qrnn-imdb").experiment_id)
    tracking.sync([done], client)
    assert len(runs(client)) == 1


@pytest.mark.slow
def test_without_a_client_the_environments_address_is_written_to(root, monkeypatch, empty_database):
    shutil.copy(empty_database, root / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    tracking.sync([record()])
    with sqlite3.connect(root / "other.db") as other, sqlite3.connect(root / "mlflow.db") as default:
        assert other.execute("select count(*) from runs").fetchone() == (2,)
        assert default.execute("select count(*) from runs").fetchone() == (0,)


@pytest.mark.slow
def test_an_unreachable_server_is_named_without_its_password(root, monkeypatch, live):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(tracking.TrackingError, match=r"MLflow at http://127\.0\.0\.1:9: ") as caught:
        tracking.sync([record()])
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    live.uri = tracking.uri()
    with pytest.raises(tracking.TrackingError):
        live.epoch(trial(), "key", record()["curve"][0])
    live.epoch(trial(), "key", record()["curve"][1])  # says nothing, and waits for nothing
    assert time.monotonic() - begin < 20


@pytest.mark.slow
def test_a_database_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(tracking.TrackingError, match=r"mlflow\.db"):
        tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_database_in_use_by_another_process_is_waited_for_only_so_long(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tracking, "LOCK_S", 0.1)
    with (tmp_path / "mlflow.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(tracking.TrackingError, match="another process holds"):
            tracking.connect(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.slow
def test_two_processes_at_once_make_one_database_one_experiment_and_one_run(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_tracking import record; from pipeline import tracking; "
        "print(tracking.sync([record()]))"
    )
    environment = {**os.environ, "QRNN_ROOT": str(tmp_path)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=paths.CODE, env=environment, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for _ in range(2)]  # fmt: skip
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [error for _, error in said] == ["", ""]
    assert sorted(text.partition("runs ")[2].strip() for text, _ in said) == [
        "0 created, 0 updated, 2 unchanged, 0 deleted",
        "2 created, 0 updated, 0 unchanged, 0 deleted",
    ]
