"""One task's section of the report: its table, the notes on it, its figure, its recipes."""

from collections.abc import Iterator
from typing import Any

from pipeline.params import KINDS
from pipeline.report import layout as layouts
from pipeline.report import reading, tables
from pipeline.report.layout import Column, Layout
from pipeline.report.text import capital, code, grid, letter, plain, shown, small, superscript

Lines = list[str]
Table = dict[str, Any]
Letters = dict[tuple[str, str], str]
STALE = {
    "sources": ("†", "made, or begun, by other sources than the present ones"),
    "recipe": ("‡", "made with another recipe than params.yaml has now, and left out of every mean and figure"),
    "data": ("§", "made on other processed data than the present ones, and left out of every mean and figure"),
}
TIMED = superscript("t")
ALONE = {family for kinds in KINDS.values() for family in kinds.alone}  # their recipes share no parameter with others


def section(table: Table, layout: Layout, figure: str | None) -> Lines:
    """Lines of the section; `figure` is its path relative to the report."""
    letters = {(item["id"], item["text"]): letter(i) for i, item in enumerate(table["deviations"])}
    name = f"Table {table['number']}. " if table["number"] else ""
    embedded = [f"![{plain(table['title'])}: validation by epoch]({figure})", ""] if figure else []
    notes = [f"- {note}" for note in _notes(table, layout, letters)]
    return [
        f"## {name}{plain(table['title'])}", "",
        *grid(_heading(table, layout), list(_rows(table, layout, letters))), "",
        *notes, *([""] if notes else []), *embedded, *_recipes(table),
    ]  # fmt: skip


def _columns(table: Table, layout: Layout) -> Iterator[tuple[Column, bool]]:
    """Columns, and whether the paper's table has them."""
    for column, facts in zip(layout.columns, table["columns"], strict=True):
        yield column, facts["paper"]


def _heading(table: Table, layout: Layout) -> list[str]:
    headings = ["Model"]
    for column, in_paper in _columns(table, layout):
        headings += [f"{capital(column.heading)}, paper"] if in_paper else []
        headings.append(f"{capital(column.heading)}, here{TIMED if column.timed else ''}")
    return [*headings, "Seeds"]


def _rows(table: Table, layout: Layout, letters: Letters) -> Iterator[list[str]]:
    columns = list(_columns(table, layout))
    for row in table["cited"]:
        printed = {path: figure["printed"] for path, figure in row["cells"].items()}
        yield _cited(columns, row["label"], printed)
    for row in table["models"]:
        printed = {path: cell["paper"]["printed"] for path, cell in row["cells"].items() if cell["paper"]}
        if tables.tried(row):
            ours = _ours(columns, row, letters)
            yield [f"**{plain(row['label'])}**", *_pairs(columns, printed, ours, "—"), _seeds(row["seeds"])]
        elif printed:
            yield _cited(columns, row["label"], printed)
    for floor in table["floors"]:
        values = {c.path: c.text(floor["cells"][c.path]["value"]) for c, _ in columns if c.path in floor["cells"]}
        if values:
            kind = "*Bound*" if floor["bound"] else "*Floor*"
            yield [f"{kind}: {plain(small(floor['label']))}", *_pairs(columns, {}, values), ""]


def _cited(columns: list[tuple[Column, bool]], label: str, printed: dict[str, str]) -> list[str]:
    """A row of which there is nothing but the paper's figures."""
    return [plain(label), *_pairs(columns, printed, {}, "—"), ""]


def _pairs(
    columns: list[tuple[Column, bool]], paper: dict[str, str], here: dict[str, str], blank: str = ""
) -> Iterator[str]:
    """A row's texts: the paper's beside ours in every column that the paper has; `blank` where the paper has none."""
    for column, in_paper in columns:
        if in_paper:
            yield paper.get(column.path, blank)
        yield here.get(column.path, "")


def _ours(columns: list[tuple[Column, bool]], row: dict[str, Any], letters: Letters) -> dict[str, str]:
    marks = superscript(_marks(row, letters))
    cells = {column.path: (column, row["cells"][column.path]) for column, _ in columns}
    return {path: reading.figure(column, cell) + marks if cell["n"] else _nothing(row["seeds"])
            for path, (column, cell) in cells.items()}  # fmt: skip


def _marks(row: dict[str, Any], letters: Letters) -> Lines:
    stale = [STALE[name][0] for name, seeds in row["stale"].items() if seeds]
    touched = ",".join(sorted(letters[item["id"], item["text"]] for item in row["deviations"]))
    return [*stale, touched] if touched else stale


def _nothing(seeds: dict[str, list[int]]) -> str:
    """What stands in a cell without a number."""
    ended = [status for status in ("diverged", "failed") if seeds[status]]
    return " and ".join(ended) if ended else "—" if seeds["done"] else "not run"


def _seeds(seeds: dict[str, list[int]]) -> str:
    """How many seeds the row's figures are of, and what became of the others."""
    total = sum(len(found) for found in seeds.values())
    others = [f"{len(seeds[status])} {'not run' if status == 'missing' else status}"
              for status in tables.STATUSES[1:] if seeds[status]]  # fmt: skip
    return f"{len(seeds['done'])} of {total}" + (f" ({', '.join(others)})" if others else "")


def _notes(table: Table, layout: Layout, letters: Letters) -> Iterator[str]:
    for item in table["deviations"]:
        yield f"{superscript(letters[item['id'], item['text']])} Deviation {code(item['id'])}: {plain(item['text'])}"
    for name, (mark, meaning) in STALE.items():
        trials = [f"{row['model']} seed {seed}" for row in table["models"] if not row["of"]
                  for seed in row["stale"][name]]  # fmt: skip
        if trials:
            yield f"{superscript(mark)} {capital(meaning)}: {plain(', '.join(trials))}"
    if any(row["cells"][column.path]["n"] for column in layout.columns if column.timed for row in table["models"]):
        yield f"{TIMED} {_timing(table)}"
    yield from (f"{plain(row['label'])}: {plain(row['note'])}" for row in table["models"]
                if row["note"] and tables.tried(row))  # fmt: skip
    if table["signatures"]:
        signed = ", ".join(map(code, table["signatures"]))
        yield f"BLEU signature: {signed}" if len(table["signatures"]) == 1 else f"BLEU signatures differ: {signed}"
    yield from _elsewhere(table, layout)
    yield from _data(table["data"])


def _timing(table: Table) -> str:
    devices = "; ".join(map(plain, table["devices"])) or "no device yet"
    paper = ""
    if table["number"]:
        on = f"are of one {table['paper_device']}" if table["paper_device"] else "are of a device that it does not name"
        paper = f"The paper's times {on}."
    if table["exclusive"]:
        return f"Median time per training epoch, the device being the trial's alone: {devices}. {paper}"
    return (f"Median time per training epoch on {devices}. What ran beside a trial is not known, so these are no "
            f"measurements and no ground for comparing speeds. {paper}")  # fmt: skip


def _elsewhere(table: Table, layout: Layout) -> Iterator[str]:
    """Floors by a metric that is no column of the table."""
    shown = {column.path for column in layout.columns}
    others = [f"{floor['label']} {Column(path).text(cell['value'])} ({Column(path).name})"
              for floor in table["floors"] for path, cell in floor["cells"].items() if path not in shown]  # fmt: skip
    if others:
        yield f"Also known of the data: {plain('; '.join(others))}"


def _data(data: dict[str, Any]) -> Iterator[str]:
    if data["hash"]:
        route = (data["source"] or {}).get("route")
        counts = ", ".join(f"{name.replace('_', ' ')} {f'{value:,}' if isinstance(value, int) else value}"
                           for name, value in layouts.flat(data["counts"] or {}))  # fmt: skip
        yield (f"Data {code(data['hash'][:12])}" + (f", by route {plain(str(route))}" if route else "")
               + (f": {plain(counts)}" if counts else ""))  # fmt: skip


def _recipes(table: Table) -> Lines:
    """What the models share, and what each has of its own beside the paper's name for its row."""
    rows = [row for row in table["models"] if row["config"]]
    if not rows:
        return []
    networks = [row["config"] for row in rows if row["config"].get("family") not in ALONE]
    shared = {n for n in networks[0] if all(c.get(n, ...) == networks[0][n] for c in networks)} if networks else set()
    kind = "models" if len(networks) == len(rows) else "networks"
    lines = [f"- All {kind}: {_settings(networks[0], shared)}"] if shared else []
    for row in rows:
        named = f" (in the paper: {plain(row['paper_label'])})" if row["paper_label"] else ""
        if row["of"]:
            lines.append(f"- **{plain(row['label'])}**{named}: another figure of the trials of {code(row['of'])}")
            continue
        rest = set(row["config"]) - (shared if row["config"] in networks else set())
        own = _settings(row["config"], rest) or "nothing of its own"
        lines.append(f"- **{plain(row['label'])}**, {code(row['model'])}{named}: {own}")
    return ["<details><summary>Recipes</summary>", "", *lines, "", "</details>", ""]


def _settings(config: dict[str, Any], names: set[str]) -> str:
    return plain(", ".join(f"{name} {shown(config[name])}" for name in config if name in names))
