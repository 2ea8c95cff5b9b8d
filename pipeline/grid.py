"""The grid of a scale as a table: where every trial stands, and what the running ones say."""

from pipeline import ledger
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
        word, detail = standing.value, ""
        if standing is not Standing.MISSING:
            detail = ledger.outcome(ledger.read(ledger.path_of(trial)))
            detail += "  (no data at hand: not held against them)" if no_data else ""
        if standing in (Standing.MISSING, Standing.FAILED) and (note := running(trial)):
            word, detail = "running", note
        counts[word] = counts.get(word, 0) + 1
        lines.append(f"{trial.name:<26} {word:<9} {detail}".rstrip())
    total = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
    return "\n".join([*lines, f"{scale}: {len(lines)} trials: {total}"])
