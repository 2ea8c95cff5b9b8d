"""The report of a scale: the paper's tables with our figures beside the paper's, computed from the ledger's records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import files, ledger, measurements, paths
from pipeline.errors import UserError
from pipeline.params import TASKS, Params, Trial, load
from pipeline.processed import read_manifest
from pipeline.report import claims, figures, layout, markdown, speed, states, tables

__all__ = ["build", "write"]


def write(params: Params, scale: str) -> Path:
    """Builds the report of a scale from the ledger as it stands; returns the path of report.md.

    Raises:
        UserError: a record is malformed or altered, or a file cannot be written.
    """
    manifests = {}
    for task in TASKS:
        try:
            manifests[task] = read_manifest(paths.processed(scale, task))
        except UserError:
            print(f"{task}: no processed data at hand; floors and counts are its records', if there are some")
    build(scale, ledger.records(scale), manifests, params.grid(scale), measured=_measured(params, scale))
    return paths.results(scale) / "report.md"


def _measured(params: Params, scale: str) -> list[dict[str, Any]]:
    wanted = measurements.settings(params, scale)
    return [speed.summary(measurement, wanted) for measurement in measurements.all_of(scale)]


def build(
    scale: str,
    records: Sequence[dict[str, Any]],
    manifests: dict[str, dict[str, Any]],
    grid: Sequence[Trial] | None = None,
    fingerprints: dict[str, str] | None = None,
    measured: Sequence[dict[str, Any]] = (),
) -> None:
    """Writes report.md, tables.json, claims.json, metrics.json and figures/*.svg below results/<scale>.

    Args:
        records: as the ledger gives them; those of other scales are left out.
        manifests: by task, the processed manifest (counts, floors, deviations, source, hash); may lack tasks.
        grid: trials asked for; those of params.yaml unless given.
        fingerprints: of the present sources by task; the ledger's unless given.
        measured: measurements of speed, as `speed.summary` has them.

    Raises:
        UserError: a file cannot be written.
    """
    grid = load().grid(scale) if grid is None else grid
    records = [record for record in records if record["scale"] == scale]
    if fingerprints is None:
        fingerprints = {task: ledger.fingerprint(task) for task in TASKS}
    made = tables.tables(scale, records, manifests, grid, fingerprints)
    made["speed"] = list(measured)
    folder = paths.results(scale)
    try:
        current = {task: tables.current(table["models"], [record for record in records if record["task"] == task])
                   for task, table in made["tables"].items()}  # fmt: skip
        drawn = _draw(folder, made, current, manifests)
        files.write_json(folder / "tables.json", made)
        judged = claims.findings(made)
        files.write_json(folder / "claims.json", judged)
        files.write_json(paths.metrics(scale), {task: tables.metrics(found) for task, found in current.items()})
        files.write_text(folder / "report.md", markdown.report(made, judged, records, drawn))
    except OSError as error:
        raise UserError(f"{folder}: the report could not be written: {error.strerror or error}") from error


def _draw(
    folder: Path, made: dict[str, Any], current: dict[str, list[dict[str, Any]]], manifests: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Writes the figures; returns their paths relative to `folder`, by task, machine or name. Old ones are removed.

    A task without a curve has none.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawn = {}
    for one in made["speed"]:
        drawn[one["machine"]] = f"figures/speed-{one['name']}.svg"
        files.write_bytes(folder / drawn[one["machine"]], figures.speed(one))
    for task, table in made["tables"].items():
        mine = current[task]
        manifest = manifests.get(task) or (mine[0]["data"] if mine else None)
        labels = {row["model"]: row["label"] for row in table["models"] if not row["of"]}
        svg = figures.curves(mine, layout.floors(manifest), layout.layout(task, mine), labels)
        if svg is not None:
            drawn[task] = f"figures/curves-{task}.svg"
            files.write_bytes(folder / drawn[task], svg)
    shown = [one for task, table in made["tables"].items() for one in states.shown(table["models"], current[task])]
    if shown:
        drawn[states.NAME] = f"figures/{states.NAME}.svg"
        files.write_bytes(folder / drawn[states.NAME], figures.states(shown))
    for file in (folder / "figures").glob("*.svg"):
        if file.relative_to(folder).as_posix() not in drawn.values():
            file.unlink()
    return drawn
