"""Ray Tune fans out the trials that the ledger lacks: model x seed of one task, side by side.

Tune decides nothing and keeps nothing: what is missing is read from the ledger, every finished trial writes its own
record, and a trial that was cut off goes on from its checkpoint. So running again after any interruption is safe.
"""

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterable
from typing import Any

from pipeline import files, ledger, paths, tracking
from pipeline.errors import Busy, UserError
from pipeline.grid import standing_of, standings
from pipeline.ledger import Standing
from pipeline.params import Compute, Params, Trial, load
from pipeline.processed import manifest_of
from pipeline.progress import Progress
from pipeline.tracking import TrackingError

LOCAL = "local"  # Ray's address of a cluster of its own on this machine
SETTLED = (Standing.DONE, Standing.DIVERGED)  # not to be run again

# Quiet and light: the project's own callback reports; results go to the ledger, not to Tune's loggers.
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the trials are what the machine is there for
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own would end the grid as if it were finished
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def run(params: Params, scale: str, task: str) -> dict[Trial, Standing]:
    """Runs what the grid of a task lacks; returns how every trial stands afterwards.

    With RAY_ADDRESS set, trials run on that cluster; else on this machine.

    Raises:
        UserError: no processed data, another process at this grid, no such cluster, a trial without a record, or not
            one trial with a result.
    """
    manifest_of(params.grid(scale, task)[0])
    before = standings(params, scale, task)
    todo = [trial for trial, standing in before.items() if standing not in SETTLED]
    print(f"{task}: {len(before)} trials, {len(before) - len(todo)} recorded, {len(todo)} to run", flush=True)
    if todo:
        name = f"{scale}-{task}"
        with files.alone(paths.tune_state(name).with_suffix(".lock"), f"the trials of {name}"):
            _fan_out(todo, params.compute(scale), name)
        tracking.show([record for record in ledger.records(scale) if record["task"] == task])
    after = standings(params, scale, task)
    _summarise(task, after)
    files.write_json(paths.trials(scale, task), {
        "sources": ledger.fingerprint(task),  # the report, which depends on this file, marks records of others
        "trials": {trial.name: {"key": ledger.read(ledger.path_of(trial))["key"], "status": standing.value}
                   for trial, standing in after.items()},
    })  # fmt: skip
    return after


def _summarise(task: str, after: dict[Trial, Standing]) -> None:
    for trial, standing in after.items():
        if standing in (Standing.FAILED, Standing.DIVERGED):
            print(f"{trial.name}: {standing.value}: {ledger.read(ledger.path_of(trial))['error']}", flush=True)
    counts = {standing: list(after.values()).count(standing) for standing in Standing}
    print(f"{task}: " + ", ".join(f"{n} {standing.value}" for standing, n in counts.items() if n), flush=True)
    if missing := [trial.name for trial, standing in after.items() if standing is Standing.MISSING]:
        raise UserError(f"{task}: no record of {', '.join(missing)}; see the lines above, and run again to go on")
    if not counts[Standing.DONE] + counts[Standing.DIVERGED]:
        raise UserError(f"{task}: none of its {len(after)} trials ended with a result; see the lines above")


def _fan_out(trials: list[Trial], compute: Compute, name: str) -> None:
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    # How a cluster tells its users apart is the cluster's to say.
    settings = ENVIRONMENT | ({"RAY_AUTH_MODE": "token"} if address == LOCAL else {})
    os.environ.update({key: value for key, value in settings.items() if key not in os.environ})
    import ray
    from ray import tune

    _connect(ray, address)
    try:
        gpus = _gpus_per_trial(ray, compute)
        _require_room(ray, compute.threads, gpus, address)
        resources = {"cpu": compute.threads, "gpu": gpus}
        shutil.rmtree(paths.tune_state(name), ignore_errors=True)
        tuner = tune.Tuner(
            tune.with_resources(_trainable, resources),
            param_space={"trial": tune.grid_search([_address(trial) for trial in trials]),
                         "device": "cuda" if gpus else "cpu", "threads": compute.threads,
                         "precision": compute.precision, "compile": compute.compile},
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(paths.tune_state(name).parent),
                failure_config=tune.FailureConfig(max_failures=compute.max_failures, fail_fast=False),
                callbacks=[_reporter(tune.Callback, trials)],
                verbose=0,
            ),
            tune_config=tune.TuneConfig(reuse_actors=True),
        )  # fmt: skip
        tuner.fit()
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    _probe(address)
    # Ray calls a trial in a thread of its own, whose memory `machine.keep_freed_memory` keeps if it is of the one heap.
    variables = {"PYTHONPATH": str(paths.CODE), "QRNN_ROOT": str(paths.root()), "MALLOC_ARENA_MAX": "1"}
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            runtime_env={"env_vars": variables},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"RAY_ADDRESS={address}: expected a Ray cluster: {str(error).splitlines()[0]}") from None
    cores = ray.cluster_resources().get("CPU", 0)
    print(f"Ray: {address}, {cores:g} CPUs, {ray.cluster_resources().get('GPU', 0):g} GPUs", flush=True)


def _probe(address: str) -> None:
    """Ray itself tries for minutes where nobody answers."""
    if "://" in address:
        raise UserError(f"RAY_ADDRESS={address}: expected HOST:PORT of the cluster's head, not an address for clients")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: expected a Ray cluster, no answer ({error.strerror or error})"
        ) from None


def _gpus_per_trial(ray: Any, compute: Compute) -> float:
    found = ray.cluster_resources().get("GPU", 0)
    if compute.device == "cuda" and not found:
        raise UserError("compute.device: expected a cluster with a GPU for cuda, found none")
    if compute.device == "cpu" or not found:
        return 0.0
    return compute.gpus_per_trial


def _require_room(ray: Any, threads: int, gpus: float, address: str) -> None:
    """Refuses trials that no node can take, for which Ray would wait without a word; a cluster may yet grow."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus for node in nodes):
        return
    found = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    trouble = f"compute: expected a node with {threads} CPUs and {gpus:g} GPUs for a trial, found {found}"
    if address == LOCAL:
        raise UserError(trouble)
    print(f"waiting: {trouble}", flush=True)


def _address(trial: Trial) -> dict[str, Any]:
    cell = trial.cell
    return {"scale": cell.scale, "task": cell.task, "model": cell.model, "seed": trial.seed}


def _trainable(config: dict[str, Any]) -> None:
    """Runs in a Ray worker: one trial, its progress told to Tune."""
    from ray import tune

    from pipeline import machine
    from pipeline import trial as training

    def report(progress: Progress) -> None:
        tune.report({"text": str(progress), "entry": progress.entry, "key": progress.key})

    where = {name: config[name] for name in ("device", "threads", "precision", "compile")}
    address = config["trial"]
    trial = load().trial(address["scale"], address["task"], address["model"], address["seed"])
    if standing_of(trial) in SETTLED:  # a try that was lost after it had left its record
        return
    try:
        record = training.run(trial, **where, report=report)
    except Exception as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())}"
        told = {"text": f"{trial.name:<24} crashed: {line}", "error": line, "busy": isinstance(error, Busy)}
        with contextlib.suppress(UserError):  # where the machine is what was refused
            told["environment"] = machine.select(**where).describe()
        tune.report(told)
        raise
    tune.report({"text": f"{trial.name:<24} {ledger.outcome(record)}"})


def _reporter(callback: type, trials: Iterable[Trial]) -> Any:
    """A Tune callback that prints progress, shows it in MLflow, and records trials that crashed for good."""
    by_address = {files.canonical_json(_address(trial)): trial for trial in trials}
    live = tracking.Live()

    class Reporter(callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            print(result["text"], flush=True)
            if result.get("entry"):
                try:
                    live.epoch(by_address[files.canonical_json(trial.config["trial"])], result["key"], result["entry"])
                except TrackingError as error:
                    print(f"warning: {error}", flush=True)

        def on_trial_error(self, iteration, trials, trial, **info):
            project = by_address[files.canonical_json(trial.config["trial"])]
            last = trial.last_result or {}
            if last.get("busy"):  # it is another's to record
                return
            error = last.get("error") or "its process ended without a word (out of memory?)"
            _record_failure(project, error[:500], last.get("environment") or {})

    return Reporter()


def _record_failure(trial: Trial, error: str, environment: dict[str, Any]) -> None:
    """Leaves the record of a crash, unless the trial has a better one. One that cannot be written is named."""
    from pipeline import recording

    if standing_of(trial) in SETTLED:
        return
    try:
        ledger.write(recording.failed(trial, error, environment))
    except UserError as trouble:
        print(f"{trial.name}: {trouble}", flush=True)
