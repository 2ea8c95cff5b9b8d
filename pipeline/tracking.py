"""MLflow as a projection of the ledger: an experiment a task, in it a run a cell, and below that a run a trial; and an
experiment for speed, in it a run a machine.

All that is shown can be rebuilt by `sync` from the records; what is there is looked at only to write what lacks. A run
whose record was replaced is deleted and made anew, since MLflow can neither change a parameter nor take back a point of
a curve; the server keeps it among its deleted runs.
"""

import contextlib
import itertools
import logging
import math
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline import files, measurements, paths
from pipeline.errors import UserError
from pipeline.params import Trial, trial_name

DIGEST = "digest"  # tag written last: a run that has it is complete
PARENT = "mlflow.parentRunId"
OWN_TAGS = {DIGEST, PARENT, "mlflow.runName", "mlflow.user"}  # tags that no view has and any run may
LOCK_S = 60.0  # how long to wait for another process that writes to the same database file
PAUSE_S = 60.0  # after trouble, how long the live view leaves the server alone
PORTION = 100  # parameters, tags or points sent at once; servers take 100 parameters
SPEED = "speed"  # in place of a task, in the name of the experiment
LONGEST = 5000  # characters of a tag or parameter; servers refuse or cut longer ones
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # opens the view of training runs
Record = dict[str, Any]
Address = tuple[str, str, str]  # scale, task, model


class TrackingError(UserError):
    """The tracking server or database does not do its part. Records are not affected."""


@dataclass
class Summary:
    """How many runs (of cells, trials and measurements) a sync made, completed, deleted, or found as they should be."""

    uri: str = ""
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0

    def __str__(self) -> str:
        counts = ("created", "updated", "unchanged", "deleted")
        return f"MLflow {self.uri}: runs " + ", ".join(f"{getattr(self, name)} {name}" for name in counts)


@dataclass(frozen=True)
class Point:
    """One point of a metric; `timestamp` in ms since 1970."""

    name: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class View:
    """What a run is to show; `start` and `end` in ms since 1970."""

    name: str
    status: str
    start: int
    end: int
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()

    @property
    def digest(self) -> str:
        return files.sha256_text(files.canonical_json(asdict(self)))


def uri() -> str:
    """MLFLOW_TRACKING_URI, or a database in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.root() / 'mlflow.db'}"


def connect(address: str | None = None) -> Any:
    """An `MlflowClient` with short time-outs (unless the environment sets them), without telemetry or chatter.

    Raises:
        TrackingError: MLflow is not installed, or the database cannot be opened. A server is not asked yet.
    """
    address = address or uri()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with _reporting(address), _exclusive(address):
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
        return MlflowClient(tracking_uri=address)


def show(records: Sequence[Record], measured: Sequence[Record] = ()) -> None:
    """Brings MLflow up to date and says so. Trouble there costs no result."""
    try:
        print(sync(records, measured=measured), flush=True)
    except TrackingError as error:
        print(f"warning: {error}; `python -m pipeline sync` shows it later", flush=True)


def sync(records: Sequence[Record], client: Any = None, *, measured: Sequence[Record] = ()) -> Summary:
    """Makes MLflow show `records`, and what was `measured`; a second time it finds nothing to do.

    Runs of trials that ended are completed or replaced; runs of trials that train now are left alone.

    Args:
        records: all records of each cell they touch, for a cell shows the mean over its seeds.
        measured: measurements of speed.

    Raises:
        TrackingError: naming the address that does not answer; a later sync goes on from what was written.
    """
    client = client or connect()
    address = client.tracking_uri
    summary = Summary(_redacted(address))
    cells: dict[Address, list[Record]] = {}
    for record in records:
        cells.setdefault((record["scale"], record["task"], record["model"]), []).append(record)
    with _reporting(address):
        for cell, members in cells.items():
            with _exclusive(address):
                _sync_cell(client, cell, members, summary)
        for measurement in measured:
            with _exclusive(address):
                _sync_speed(client, measurement, summary)
    return summary


class Live:
    """Running trials in MLflow, epoch by epoch. What it misses, `sync` fills in once the trial's record is there."""

    def __init__(self, address: str | None = None) -> None:
        self.uri = address or uri()
        self._client: Any = None
        self._runs: dict[str, str] = {}
        self._quiet_until = 0.0

    def epoch(self, trial: Trial, key: str, entry: dict[str, Any]) -> None:
        """Shows one entry of the curve of a running trial.

        After trouble it does nothing for a minute, so that a dead server does not hold up every epoch of every trial.

        Args:
            key: of the trial's record to come.
            entry: as in the record's `curve`.

        Raises:
            TrackingError: the server or database does not answer.
        """
        if time.monotonic() < self._quiet_until:
            return
        slot = f"{trial.cell.scale}/{trial.name}/{key}"
        try:
            self._client = self._client or connect(self.uri)
            with _reporting(self.uri):
                if slot not in self._runs:
                    with _exclusive(self.uri):
                        self._runs[slot] = self._run(trial, key, entry)
                _log(self._client, self._runs[slot], points=_curve_points(trial.cell.task, [entry]))
        except TrackingError:
            self._runs.pop(slot, None)  # the run may be what is gone
            self._quiet_until = time.monotonic() + PAUSE_S
            raise

    def _run(self, trial: Trial, key: str, entry: dict[str, Any]) -> str:
        """The trial's running run: the one that is there after a restart, or a new one under its cell's."""
        client, cell = self._client, (trial.cell.scale, trial.cell.task, trial.cell.model)
        experiment = _experiment(client, trial.cell.task)
        parents, children = _runs(client, experiment, cell)
        for run in children:
            if run.info.status == "RUNNING" and _is(run, seed=str(trial.seed), record_key=key):
                return run.info.run_id
        start = _ms(entry["finished_at"] - entry["epoch_s"])
        if parents:
            parent_id = parents[0].info.run_id
        else:
            parent_id = client.create_run(experiment, start, _cell_tags(cell), "/".join(cell)).info.run_id
        tags = {**_cell_tags(cell), "kind": "trial", "seed": str(trial.seed), "record_key": key, "status": "running"}
        run = client.create_run(experiment, start, {**tags, PARENT: parent_id}, _trial_name(cell, trial.seed))
        _log(client, run.info.run_id, params=flat(trial.config))
        return run.info.run_id


def flat(config: dict[str, Any], before: str = "") -> dict[str, str]:
    """A nested mapping as one of texts, names joined by dots."""
    made: dict[str, str] = {}
    for name, value in config.items():
        made |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": _text(value)}
    return made


def _sync_cell(client: Any, cell: Address, records: list[Record], summary: Summary) -> None:
    """Brings a cell's run and those of its trials up to date."""
    experiment = _experiment(client, cell[1])
    parents, children = _runs(client, experiment, cell)
    parent_id = _project(client, experiment, _cell_view(cell, records), parents, {}, summary)
    _delete(client, [run for run in parents if run.info.run_id != parent_id], summary)
    ended = {str(record["seed"]): record for record in records}
    keep = {run.info.run_id for run in children if _is_training(run, ended.get(run.data.tags.get("seed")))}
    free = [run for run in children if run.info.run_id not in keep]
    for seed, record in ended.items():
        found = [run for run in free if _is(run, seed=seed, record_key=record["key"])]
        keep.add(_project(client, experiment, _trial_view(cell, record), found, {PARENT: parent_id}, summary))
    _delete(client, [run for run in free if run.info.run_id not in keep], summary)
    for run in children:
        if run.info.run_id in keep and not _is(run, **{PARENT: parent_id}):
            client.set_tag(run.info.run_id, PARENT, parent_id)


def _sync_speed(client: Any, measurement: Record, summary: Summary) -> None:
    """Brings the run of a measurement of speed up to date."""
    experiment, view = _experiment(client, SPEED), _speed_view(measurement)
    found, _ = _runs(client, experiment, (view.tags["scale"], SPEED, view.tags["model"]))
    shown = _project(client, experiment, view, found, {}, summary)
    _delete(client, [run for run in found if run.info.run_id != shown], summary)


def _project(
    client: Any, experiment: str, view: View, found: list[Any], links: dict[str, str], summary: Summary
) -> str:
    """The id of the run that shows `view`: one of `found` as it is, one of them completed, or a new one."""
    for run in found:
        if _is(run, **{DIGEST: view.digest}):
            summary.unchanged += 1
            return run.info.run_id
    run = next((run for run in found if _can_become(client, run, view)), None)
    if run is None:
        summary.created += 1
        run = client.create_run(experiment, view.start, {**view.tags, **links}, view.name)
        _log(client, run.info.run_id, view.params, view.points)
    else:
        summary.updated += 1
        _log(client, run.info.run_id, view.params, view.points, {**view.tags, **links})
    client.set_terminated(run.info.run_id, view.status, view.end)
    client.set_tag(run.info.run_id, DIGEST, view.digest)
    return run.info.run_id


def _can_become(client: Any, run: Any, view: View) -> bool:
    """Whether adding to a run makes it show `view` and nothing else."""
    if any(view.params.get(name) != value for name, value in run.data.params.items()):
        return False
    if not run.data.tags.keys() <= view.tags.keys() | OWN_TAGS:
        return False
    history = (client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
    there = {Point(m.key, m.value, m.timestamp, m.step) for m in itertools.chain.from_iterable(history)}
    return there <= set(view.points)


def _is_training(run: Any, record: Record | None) -> bool:
    """Whether a run is of a trial that trains now, as far as the records tell: it started after the last one ended."""
    if run.info.status != "RUNNING":
        return False
    return record is None or run.info.start_time > _ms(record["finished_at"])


def _delete(client: Any, runs: list[Any], summary: Summary) -> None:
    for run in runs:
        if run.info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
        client.delete_run(run.info.run_id)
        summary.deleted += 1


def _cell_view(cell: Address, records: list[Record]) -> View:
    """Mean, standard deviation and number of the seeds' figures, as the seeds came in (step: how many there were)."""
    done = sorted((r for r in records if r["status"] == "done"), key=lambda r: (r["finished_at"], r["seed"]))
    points: list[Point] = []
    for n in range(1, len(done) + 1):
        time_ms = _ms(done[n - 1]["finished_at"])
        points.append(Point("n", float(n), time_ms, n))
        for name in sorted(_figures(done[n - 1])):
            values = [_figures(record)[name] for record in done[:n] if name in _figures(record)]
            points.append(Point(f"{name}_mean", statistics.fmean(values), time_ms, n))
            if len(values) > 1:
                points.append(Point(f"{name}_std", statistics.stdev(values), time_ms, n))
    counts = {status: sum(r["status"] == status for r in records) for status in ("done", "diverged", "failed")}
    return View(
        name="/".join(cell),
        status="FINISHED" if done else "FAILED",
        start=min(_ms(record["started_at"]) for record in records),
        end=max(_ms(record["finished_at"]) for record in records),
        tags={**_cell_tags(cell), **{f"seeds_{status}": str(n) for status, n in counts.items()}},
        points=tuple(points),
    )


def _trial_view(cell: Address, record: Record) -> View:
    end, step = _ms(record["finished_at"]), record["selected_epoch"] or 0
    figures = {
        **_figures(record),
        **{name: record[name] for name in ("peak_bytes", "parameters", "selected_epoch")},
        "total_s": record["timing"].get("total_s"),
    }
    final = [Point(name, float(value), end, step) for name, value in figures.items() if _is_number(value)]
    return View(
        name=_trial_name(cell, record["seed"]),
        status="FINISHED" if record["status"] == "done" else "FAILED",
        start=_ms(record["started_at"]),
        end=end,
        tags=_trial_tags(cell, record),
        params=flat(record["config"]),
        points=(*_curve_points(cell[1], record["curve"]), *final),
    )


def _speed_view(measurement: Record) -> View:
    """Ratios of one layer by batch size, the step being the length; ms and ratio of each task's training step."""
    environment, code = measurement["environment"], measurement["code"]
    cell, end = (measurement["scale"], SPEED, measurements.name(environment)), _ms(measurement["finished_at"])
    points = [
        Point(f"{mode}_ratio_batch_{shape['batch_size']}", shape[mode]["ratio"], end, shape["length"])
        for shape in measurement["layer"]["grid"]
        for mode in ("inference", "training")
    ]
    for task, found in measurement["steps"].items():
        points.append(Point(f"{task}_step_ratio", found["ratio"], end, 0))
        points += [Point(f"{task}_{model}_step_ms", ms["median"], end, 0) for model, ms in found["ms"].items()]
    tags = {
        **_cell_tags(cell),
        "command": measurement["command"],
        **{name: code.get(name) for name in ("commit", "fingerprint")},
        "dirty": str(bool(code.get("dirty"))).lower(),
        **{name: environment[name] for name in ("device", "device_name", "threads", "precision", "torch")},
    }
    return View(
        name="/".join(cell),
        status="FINISHED",
        start=_ms(measurement["started_at"]),
        end=end,
        tags={name: _text(value) for name, value in tags.items() if value is not None},
        params=flat({name: value for name, value in measurement["settings"].items() if name != "recipes"}),
        points=tuple(points),
    )


def _figures(record: Record) -> dict[str, float]:
    """A record's results by their names in MLflow."""
    figures = {
        **_measured("test_", record["test"]),
        **_measured("selected_valid_", record["valid"]),
        "median_epoch_s": record["timing"].get("epoch_s"),
        f"median_{_speed(record['task'])}": record["timing"].get("items_per_s"),
    }
    return {name: float(value) for name, value in figures.items() if _is_number(value)}


def _curve_points(task: str, curve: Sequence[dict[str, Any]]) -> tuple[Point, ...]:
    """Metrics by epoch, at the times at which the epochs ended, so that logging them again adds nothing."""
    points = []
    for entry in curve:
        figures = {
            **{name: entry[name] for name in ("train_loss", "learning_rate", "epoch_s")},
            _speed(task): entry["items_per_s"],
            **_measured("valid_", entry["valid"]),
        }
        time_ms = _ms(entry["finished_at"])
        points += [Point(name, float(v), time_ms, entry["epoch"]) for name, v in figures.items() if _is_number(v)]
    return tuple(points)


def _measured(prefix: str, metrics: dict[str, Any] | None) -> dict[str, float]:
    """Metrics under a prefix; whole numbers among them only count what was measured on."""
    return {f"{prefix}{name}": value for name, value in (metrics or {}).items() if isinstance(value, float)}


def _cell_tags(cell: Address) -> dict[str, str]:
    return {"kind": "cell", **dict(zip(("scale", "task", "model"), cell, strict=True))}


def _trial_tags(cell: Address, record: Record) -> dict[str, str]:
    code, data, environment = record["code"] or {}, record["data"] or {}, record["environment"] or {}
    deviations = "; ".join(f"{item['id']}: {item['text']}" for item in data.get("deviations") or [])
    tags = {
        **_cell_tags(cell),
        "kind": "trial",
        "seed": record["seed"],
        "record_key": record["key"],
        "status": record["status"],
        "error": record["error"],
        "command": record["command"],
        "commit": code.get("commit"),
        "dirty": str(bool(code.get("dirty"))).lower(),
        "fingerprint": code.get("fingerprint"),
        "data_hash": data.get("hash"),
        "route": (data.get("source") or {}).get("route"),
        "deviations": deviations or "none",
        "device": environment.get("device"),
        "device_name": environment.get("device_name"),
        "bleu_signature": (record["test"] or {}).get("signature"),
    }
    return {name: _text(value) for name, value in tags.items() if value is not None}


def _trial_name(cell: Address, seed: int) -> str:
    scale, task, model = cell
    return f"{scale}/{trial_name(task, model, seed)}"


def _speed(task: str) -> str:
    return "chars_per_s" if task == "iwslt" else "tokens_per_s"


def _experiment(client: Any, task: str) -> str:
    """The id of a task's experiment, made or restored where needed; two that make it at once get the same."""
    from mlflow.exceptions import MlflowException

    name = f"qrnn-{task}"
    found = client.get_experiment_by_name(name)
    if found is None:
        local = (paths.root() / "mlartifacts" / name).as_uri() if client.tracking_uri.startswith("sqlite") else None
        try:
            return client.create_experiment(name, artifact_location=local, tags=EXPERIMENT_TAGS)
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _runs(client: Any, experiment: str, cell: Address) -> tuple[list[Any], list[Any]]:
    """A cell's own runs (one, unless two processes made it at once) and those of its trials, oldest first."""
    wanted = f"tags.scale = '{cell[0]}' and tags.model = '{cell[2]}'"
    found: list[Any] = []
    token = None
    while token is None or token:
        page = client.search_runs([experiment], wanted, order_by=["attributes.start_time ASC"], page_token=token)
        found += page
        token = page.token or ""
    return [run for run in found if _is(run, kind="cell")], [run for run in found if _is(run, kind="trial")]


def _is(run: Any, **tags: str) -> bool:
    return all(run.data.tags.get(name) == value for name, value in tags.items())


def _log(
    client: Any,
    run_id: str,
    params: dict[str, str] | None = None,
    points: Sequence[Point] = (),
    tags: dict[str, str] | None = None,
) -> None:
    """Logs in portions that a server takes; a point or parameter that is there already adds nothing."""
    from mlflow.entities import Metric, Param, RunTag

    kinds = {
        "params": [Param(name, value) for name, value in (params or {}).items()],
        "tags": [RunTag(name, value) for name, value in (tags or {}).items()],
        "metrics": [Metric(point.name, point.value, point.timestamp, point.step) for point in points],
    }
    for kind, items in kinds.items():
        for start in range(0, len(items), PORTION):
            client.log_batch(run_id, **{kind: items[start : start + PORTION]}, synchronous=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return str(value)[:LONGEST]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _redacted(text: str) -> str:
    """Text without the name and password that an address may carry."""
    return re.sub(r"//[^/@\s]+@", "//", text)


@contextlib.contextmanager
def _reporting(address: str) -> Iterator[None]:
    """Turns trouble with MLflow, its database or its server into a TrackingError of one line."""
    try:
        yield
    except ImportError as error:
        raise TrackingError(f"MLflow at {_redacted(address)}: not installed here ({error})") from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in ("mlflow", "sqlalchemy", "sqlite3", "alembic", "urllib3"):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise TrackingError(f"MLflow at {_redacted(address)}: {_redacted(lines[0])[:300]}") from error


@contextlib.contextmanager
def _exclusive(address: str) -> Iterator[None]:
    """Keeps other processes of this machine from the same database file; servers see to that themselves."""
    if not address.startswith("sqlite:///"):
        yield
        return
    import filelock

    file = Path(address.removeprefix("sqlite:///").partition("?")[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = filelock.FileLock(f"{file}.lock", timeout=LOCK_S).acquire()
    except filelock.Timeout:
        raise TrackingError(f"MLflow at {address}: another process holds {file}.lock") from None
    with held:
        yield
