"""The fan-out over Ray: what is missing is run, what is recorded is not; failures are counted and harm no neighbour."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import cli, made_with, ray_by_turns, write_params, write_ptb

from pipeline import files, grid, ledger, paths, tune
from pipeline.errors import Busy, UserError
from pipeline.ledger import Standing
from pipeline.params import load
from pipeline.progress import folder

pytestmark = [pytest.mark.slow, ray_by_turns]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return cli("tune", "--scale", "sample", "--task", "ptb", *arguments)


def test_grid_is_run_once_and_crashes_stay_apart(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = yaml.safe_load((data / "params.yaml").read_text())
    models = values["ptb"]["sample"]["models"]
    models["lstm"].update(optimiser="sgd", learning_rate=1.0e38, clip_norm=None)
    models["qrnn-zoneout"].update(hidden=10**12)  # more memory than there is
    values["compute"]["sample"]["max_failures"] = 0
    write_params(data, values)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "ptb: 3 trials, 0 recorded, 3 to run" in first.stdout
    assert "ptb/qrnn/seed-1          epoch 2/2  done  loss" in first.stdout
    assert "ptb/lstm/seed-1: diverged: loss" in first.stdout
    assert "ptb/qrnn-zoneout/seed-1: failed: RuntimeError:" in first.stdout
    assert "ptb: 1 done, 1 diverged, 1 failed" in first.stdout
    statuses = {record["model"]: record["status"] for record in ledger.records("sample")}
    assert statuses == {"lstm": "diverged", "qrnn": "done", "qrnn-zoneout": "failed"}
    assert "sample: 8 trials: 1 diverged, 1 done, 1 failed, 5 missing" in cli("status", "--scale", "sample").stdout

    again: list[str] = []
    monkeypatch.setattr(tune, "_fan_out", lambda todo, *_: again.extend(trial.name for trial in todo))
    tune.run(load(), "sample", "ptb")
    assert again == ["ptb/qrnn-zoneout/seed-1"]


def test_data_made_with_other_parameters_start_no_ray(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_with(paths.processed("sample", "ptb"), train_tokens=7)
    monkeypatch.setattr(tune, "_fan_out", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=r"expected data made with train_tokens null .* got train_tokens 7"):
        tune.run(load(), "sample", "ptb")


def test_a_second_fan_out_of_a_grid_starts_no_ray(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would remove the first one's state of Tune."""

    def while_it_runs(*_) -> None:
        monkeypatch.setattr(tune, "_fan_out", lambda *_: pytest.fail("Ray was started"))
        with pytest.raises(Busy, match="expected no other process at the trials of sample-ptb"):
            tune.run(load(), "sample", "ptb")
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_fan_out", while_it_runs)
    with pytest.raises(KeyboardInterrupt):
        tune.run(load(), "sample", "ptb")
    monkeypatch.setattr(tune, "_fan_out", lambda *_: None)
    with pytest.raises(UserError, match="no record of"):  # the lock went with the first
        tune.run(load(), "sample", "ptb")


def test_nothing_to_do_starts_no_ray(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = dict.fromkeys(load().grid("sample", "ptb"), Standing.DONE)
    monkeypatch.setattr(tune, "standings", lambda *_: done)
    monkeypatch.setattr(tune, "_fan_out", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr(ledger, "read", lambda _: {"key": "k"})
    assert tune.run(load(), "sample", "ptb") == done
    assert list(yaml.safe_load(paths.trials("sample", "ptb").read_text())["trials"]) == [trial.name for trial in done]


def test_failures_alone_are_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "standings", lambda *_: dict.fromkeys(load().grid("sample", "ptb"), Standing.FAILED))
    monkeypatch.setattr(tune, "_fan_out", lambda *_: None)
    monkeypatch.setattr(tune.tracking, "show", lambda *_: None)
    monkeypatch.setattr(ledger, "read", lambda _: {"key": "k", "error": "boom"})
    with pytest.raises(UserError, match="ptb: none of its 3 trials ended with a result"):
        tune.run(load(), "sample", "ptb")


def test_no_record_at_all_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_fan_out", lambda *_: None)
    monkeypatch.setattr(tune.tracking, "show", lambda *_: None)
    with pytest.raises(UserError, match="ptb: no record of ptb/lstm/seed-1, "):
        tune.run(load(), "sample", "ptb")


def test_missing_data_and_missing_cluster_are_named(root: Path) -> None:
    done = run()
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "no processed data" in done.stderr
    write_ptb(paths.processed("sample", "ptb"))
    done = cli("tune", "--scale", "sample", "--task", "ptb", RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert "RAY_ADDRESS=127.0.0.1:1: expected a Ray cluster, no answer" in done.stderr
    done = cli("tune", "--scale", "sample", "--task", "ptb", RAY_ADDRESS="ray://127.0.0.1:10001")
    assert "expected HOST:PORT of the cluster's head" in done.stderr


def ray_of(*nodes: tuple[float, float]) -> SimpleNamespace:
    """A cluster with nodes of so many CPUs and GPUs, and one that is gone."""
    found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
    return SimpleNamespace(nodes=lambda: [*found, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}])


def test_a_trial_that_no_node_can_take_is_not_waited_for_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    tune._require_room(ray_of((2.0, 0.0), (1.0, 1.0)), 2, 0.0, "local")
    tune._require_room(ray_of((8.0, 1.0)), 8, 0.5, "local")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="compute: expected a node with 2 CPUs and 1 GPUs for a trial, found 2 CPUs"):
        tune._require_room(ray_of((2.0, 0.0), (1.0, 1.0)), 2, 1.0, "local")
    tune._require_room(ray_of((2.0, 0.0)), 16, 0.0, "10.0.0.1:6379")
    assert capsys.readouterr().out.startswith("waiting: compute: expected a node with 16 CPUs and 0 GPUs")


def test_more_threads_than_the_machine_has_are_refused(data: Path) -> None:
    values = yaml.safe_load((data / "params.yaml").read_text())
    values["compute"]["sample"]["threads"] = 4096
    write_params(data, values)
    done = run()
    assert done.returncode == 2
    assert "compute: expected a node with 4096 CPUs and 0 GPUs for a trial, found" in done.stderr


def test_how_a_cluster_tells_its_users_apart_is_its_own_to_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def connect(ray: object, address: str) -> None:
        raise Reached

    monkeypatch.setattr(tune, "_connect", connect)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # Ray's settings are made in it
    for address, mode in (("10.0.0.1:6379", None), ("", "token")):
        os.environ["RAY_ADDRESS"] = address
        os.environ.pop("RAY_AUTH_MODE", None)
        with pytest.raises(Reached):
            tune.run(load(), "sample", "ptb")
        assert os.environ.get("RAY_AUTH_MODE") == mode


def test_a_cluster_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        raise ray.exceptions.AuthenticationError("no token")

    monkeypatch.setattr(tune, "_probe", lambda _: None)
    refusing = SimpleNamespace(init=init, exceptions=ray.exceptions)
    with pytest.raises(UserError, match=r"RAY_ADDRESS=10.0.0.1:6379: expected a Ray cluster: .*no token"):
        tune._connect(refusing, "10.0.0.1:6379")


def test_interrupted_grid_is_not_done(data: Path) -> None:
    """Ctrl-C: an exit status that is not 0, no list of what is done, so DVC does not take the stage for finished."""
    values = yaml.safe_load((data / "params.yaml").read_text())
    values["ptb"]["sample"]["train"]["epochs"] = 100000
    write_params(data, values)
    command = [sys.executable, "-m", "pipeline", "tune", "--scale", "sample", "--task", "ptb"]
    # A shell that runs this in the background has it, and so the driver, ignore SIGINT.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    driver = subprocess.Popen(command, cwd=paths.CODE, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert driver.stdout is not None
    for line in driver.stdout:
        if "epoch 3/100000" in line:
            break
    driver.send_signal(signal.SIGINT)
    driver.stdout.read()
    assert driver.wait(timeout=60) == 130
    assert not paths.trials("sample", "ptb").exists()


def test_trial_without_a_record_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_ = load().grid("sample", "ptb")
    monkeypatch.setattr(tune, "standings", lambda *_: {grid_[0]: Standing.DONE, grid_[1]: Standing.MISSING})
    monkeypatch.setattr(tune, "_fan_out", lambda *_: None)
    monkeypatch.setattr(tune.tracking, "show", lambda *_: None)
    with pytest.raises(UserError, match=f"ptb: no record of {grid_[1].name}; see the lines above"):
        tune.run(load(), "sample", "ptb")
    assert not paths.trials("sample", "ptb").exists()


def test_failure_never_replaces_a_result(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load().trial("sample", "ptb", "qrnn", 1)
    monkeypatch.setattr(ledger, "write", lambda _: pytest.fail("a record was written"))
    monkeypatch.setattr(tune, "standing_of", lambda _: Standing.DONE)
    tune._record_failure(wanted, "lost", {})


def test_a_refusal_is_told_and_what_another_process_trains_is_not_recorded(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.tune

    told: list[dict] = []
    monkeypatch.setattr(ray.tune, "report", told.append)
    wanted = load().trial("sample", "ptb", "qrnn", 1)
    config = {"trial": tune._address(wanted), "device": "cpu", "threads": 1, "precision": "tf32", "compile": "none"}
    with pytest.raises(UserError):
        tune._trainable(config)
    assert told[-1]["error"].startswith("UserError: precision: expected float32 or bfloat16 on a CPU, got tf32")
    with files.alone(folder(wanted) / "lock", "a trial"), pytest.raises(UserError):
        tune._trainable({**config, "precision": "float32"})
    assert told[-1]["busy"]
    ended = SimpleNamespace(config=config, last_result=told[-1])
    tune._reporter(object, [wanted]).on_trial_error(0, [], ended)
    assert ledger.records("sample") == []
    ended.last_result = told[0]
    tune._reporter(object, [wanted]).on_trial_error(0, [], ended)
    assert [record["status"] for record in ledger.records("sample")] == ["failed"]


def test_killed_driver_loses_nothing(data: Path) -> None:
    """SIGKILL after the first epochs; the next run goes on from the checkpoints."""
    values = yaml.safe_load((data / "params.yaml").read_text())
    values["ptb"]["sample"]["train"]["epochs"] = 60
    del values["ptb"]["sample"]["models"]["qrnn-zoneout"]
    write_params(data, values)
    command = [sys.executable, "-m", "pipeline", "tune", "--scale", "sample", "--task", "ptb"]
    driver = subprocess.Popen(command, cwd=paths.CODE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert driver.stdout is not None
    for line in driver.stdout:
        if "epoch 5/60" in line:
            break
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert all(standing is Standing.MISSING for standing in grid.standings(load(), "sample", "ptb").values())
    time.sleep(3)  # the workers notice that their driver is gone
    second = run()
    assert second.returncode == 0, second.stderr
    assert "ptb: 2 done" in second.stdout
    assert " epoch 1/60  done" not in second.stdout
