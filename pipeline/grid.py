"""The grid of a scale as a table: where every trial stands, and what the running ones say."""

import json
from pathlib import Path

from pipeline import ledger, paths
from pipeline.errors import UserError
from pipeline.ledger import Standing
from pipeline.params import Params, Trial
from pipeline.processed import has_data, manifest_of
from pipeline.progress import running


def standings(params: Params, scale: str, task: str | None = None) -> dict[Trial, Standing]:
    """How each trial of the grid stands against the ledger; all are missing where there is no data yet."""
    return {trial: standing_of(trial) for trial in params.grid(scale, task)}


def standing_of(trial: Trial) -> Standing:
    """How a trial stands against the ledger, with the data that are there now; missing where they are not its own."""
    try:
        data_hash = manifest_of(trial)["hash"]
    except UserError:
        return Standing.MISSING
    return ledger.standing(trial, ledger.identity(trial, data_hash))


def table(params: Params, scale: str) -> str:
    """One line a trial, then the counts. Without its processed data at hand a trial stands by its record alone."""
    lines, counts = [], {}
    for trial, known in standings(params, scale).items():
        no_data = known is Standing.MISSING and not has_data(trial)
        standing = ledger.standing(trial, None) if no_data else known
        word, detail, failed_at = standing.value, "", 0.0
        if standing is not Standing.MISSING:
            record = ledger.read(ledger.path_of(trial))
            failed_at = record["finished_at"] if standing is Standing.FAILED else 0.0
            detail = ledger.outcome(record)
            detail += "  (no data at hand: not held against them)" if no_data else ""
        if standing in (Standing.MISSING, Standing.FAILED) and (note := running(trial, since=failed_at)):
            word, detail = "running", note
        counts[word] = counts.get(word, 0) + 1
        lines.append(f"{trial.name:<26} {word:<9} {detail}".rstrip())
    total = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
    return "\n".join([*lines, f"{scale}: {len(lines)} trials: {total}"])


def forget_lost(params: Params, scale: str) -> None:
    """Removes what stages say is in the ledger and is not any more, so that DVC has them run again.

    DVC looks at `data/<scale>/trials/<task>.json` and `data/<scale>/speed.json`, and knows nothing of the ledger.
    """
    speed = paths.speed(scale)
    if speed.is_file() and not _names_a_measurement(speed, scale):
        print("speed: its measurement is in the ledger no more; stage speed makes it again", flush=True)
        speed.unlink()
    for task in dict.fromkeys(trial.cell.task for trial in params.grid(scale)):
        file = paths.trials(scale, task)
        if file.is_file() and not _borne_out(file, scale):
            print(f"{task}: the ledger has changed since its trials were listed; they are looked at again", flush=True)
            file.unlink()


def _borne_out(file: Path, scale: str) -> bool:
    """Whether each trial of a list has the record that is named there."""
    try:
        listed = json.loads(file.read_bytes())["trials"]
        for name, stated in listed.items():
            record = ledger.read(paths.ledger(scale) / f"{name}.json")
            if (record["key"], record["status"]) != (stated["key"], stated["status"]):
                return False
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _names_a_measurement(file: Path, scale: str) -> bool:
    try:
        return (paths.ledger(scale) / "speed" / json.loads(file.read_bytes())["file"]).is_file()
    except (ValueError, KeyError, TypeError):
        return False
