"""Layout: aligned text for pipes, tables and trees for terminals. From plain data to one string; prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal

from checkpointer.cli.output import clean, color_system, one_line
from checkpointer.config.rules import keep_text
from checkpointer.policy.cost import SaveCost
from checkpointer.policy.values import roughly
from checkpointer.repository.verify import extra_text

if TYPE_CHECKING:
    from rich.tree import Tree

    from checkpointer.cli.gather import Checked, Details, Row, Rules
    from checkpointer.format.event import Event
    from checkpointer.format.index import TensorSpec
    from checkpointer.format.tree_text import Node
    from checkpointer.policy.retention import RetentionPlan
    from checkpointer.repository.doctor import Diagnosis

NOTHING = "-"
STYLES = {
    "ok": "green",
    "keep": "green",
    "fixed": "green",
    "problem": "bold red",
    "note": "yellow",
    "damaged": "bold red",
    "unreadable": "bold red",
    "unsupported": "yellow",
    "remove": "red",
    "commit": "green",
    "removal": "red",
    "damage": "bold red",
    "quarantine": "yellow",
    "signal": "yellow",
}
_SHORT = 100
"""Characters of a value that a terminal shows."""


@dataclass(frozen=True)
class Column:
    """``wide`` columns are left out on terminals narrower than 110 characters, empty ones on all terminals."""

    title: str
    align: Literal["left", "right"] = "left"
    wide: bool = False
    fold: bool = False
    """Whether a terminal may break its lines."""
    separator: str = ","
    """Between several texts in a pipe."""


@dataclass(frozen=True)
class Table:
    """Cells are text, or several texts."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str | tuple[str, ...]]]


# ---------------------------------------------------------------------------------------------------- documents


def listing_table(rows: Iterable[Row], now: datetime) -> Table:
    """One line for each checkpoint."""
    columns = (
        Column("step", "right"),
        Column("epoch", "right"),
        Column("sequence", "right", wide=True),
        Column("created", wide=True),
        Column("age", "right"),
        Column("size", "right"),
        Column("metrics", fold=True),
        Column("best", fold=True),
        Column("tags", fold=True),
        Column("pinned"),
        Column("finite"),
        Column("status"),
    )
    return Table(columns, [_listing_cells(row, now) for row in rows])


def _listing_cells(row: Row, now: datetime) -> list[str | tuple[str, ...]]:
    info = row.info
    if info is None:
        return [str(row.step), *[NOTHING] * 10, row.status]
    return [
        str(info.step),
        NOTHING if info.epoch is None else str(info.epoch),
        str(info.sequence),
        utc(info.created),
        age(now - info.created),
        human_size(info.size),
        tuple(f"{name}={value:.6g}" for name, value in info.metrics.items()) or NOTHING,
        row.best or NOTHING,
        info.tags or NOTHING,
        "yes" if info.pinned else NOTHING,
        NOTHING if info.finite is None else yes_no(value=info.finite),
        row.status,
    ]


def statistics_table(rows: Iterable[Row]) -> Table:
    """What each save has cost."""
    columns = (
        Column("step", "right"),
        Column("mode"),
        Column("wait", "right"),
        Column("stall", "right"),
        Column("write", "right"),
        Column("fsync", "right"),
        Column("size", "right"),
        Column("written", "right"),
        Column("shared", "right"),
        Column("status"),
    )
    return Table(columns, [_statistics_cells(row) for row in rows])


def _statistics_cells(row: Row) -> list[str | tuple[str, ...]]:
    cost = SaveCost.from_statistics(row.info.statistics if row.info else {})
    return [
        str(row.step),
        cost.mode or NOTHING,
        *(NOTHING if time is None else roughly(time) for time in (cost.wait, cost.stall, cost.write, cost.fsync)),
        human_size(row.info.size) if row.info else NOTHING,
        *(NOTHING if size is None else human_size(size) for size in (cost.written, cost.shared)),
        row.status,
    ]


def plan_table(plan: RetentionPlan, now: datetime) -> Table:
    """The decisions of retention, in commit order."""
    columns = (
        Column("action"),
        Column("step", "right"),
        Column("age", "right"),
        Column("size", "right"),
        Column("reasons", fold=True, separator=", "),
    )
    verdicts = [("keep", *decision) for decision in plan.keep] + [("remove", *decision) for decision in plan.remove]
    verdicts.sort(key=lambda verdict: (verdict[1].sequence, verdict[1].created, verdict[1].id))
    return Table(
        columns,
        [[verb, str(info.step), age(now - info.created), human_size(info.size), why] for verb, info, why in verdicts],
    )


def rules_line(rules: Rules) -> str:
    """Which rules a plan goes by, and who says so."""
    nothing = " (nothing is set, so everything stays)" if rules.keep.is_empty else ""
    return clean(f"by the rules of {rules.source}: {keep_text(rules.keep)}{nothing}")


def plan_summary(plan: RetentionPlan, *, dry_run: bool) -> str:
    """What the plan comes to."""
    count = len(plan.remove)
    verb = "would remove" if dry_run else "removed"
    return f"{verb} {count} of {count + len(plan.keep)} checkpoints ({human_size(plan.freed)})"


def history_table(events: Iterable[Event]) -> Table:
    """One line for each event, in the order in which they were written."""
    columns = (
        Column("time"),
        Column("event"),
        Column("step", "right"),
        Column("what", fold=True, separator=", "),
        Column("by", wide=True),
    )
    return Table(columns, [_event_cells(event) for event in events])


def _event_cells(event: Event) -> list[str | tuple[str, ...]]:
    by = [event.host or "?", *([] if event.pid is None else [str(event.pid)])]
    return [
        utc(event.time),
        event.kind,
        NOTHING if event.step is None else str(event.step),
        tuple(_event_texts(event)) or NOTHING,
        NOTHING if event.host is None and event.pid is None else ":".join(by),
    ]


def _event_texts(event: Event) -> Iterator[str]:
    """Why, or what it came to."""
    if event.reason:
        yield " ".join(event.reason.split())
    yield from (f"{name}={value:.6g}" for name, value in event.metrics.items())
    size = event.details.get("size")
    if isinstance(size, int) and size >= 0:
        yield human_size(size)
    cost = SaveCost.from_statistics(event.statistics)
    yield from (
        f"{name} {roughly(time)}" for name, time in (("stall", cost.stall), ("write", cost.write)) if time is not None
    )


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """One line for each finding."""
    columns = (
        Column("level"),
        Column("what"),
        Column("where", fold=True),
        Column("meaning", fold=True),
        Column("what to do", fold=True),
    )
    rows = [(level, item.kind, item.path, item.meaning, item.advice) for level, item in diagnosis.verdicts()]
    return Table(columns, rows)


def diagnosis_lines(diagnosis: Diagnosis) -> str:
    """One line for each finding, as plain text."""
    return "\n".join(
        f"{level}: {item.kind}: {one_line(item.path)}: {one_line(item.meaning)}; {one_line(item.advice)}"
        for level, item in diagnosis.verdicts()
    )


def diagnosis_summary(diagnosis: Diagnosis) -> str:
    """What it comes to."""
    count = diagnosis.checkpoints
    problems = sum(finding.level == "problem" for finding in diagnosis.findings)
    fixed = f", {len(diagnosis.fixed)} fixed" if diagnosis.fixed else ""
    verdict = "healthy" if diagnosis.ok else f"{problems} problem{'' if problems == 1 else 's'}"
    unread = " (bytes not read; --deep reads them)" if diagnosis.ok and count and not diagnosis.deep else ""
    return f"{count} checkpoint{'' if count == 1 else 's'}{fixed}, {verdict}{unread}"


def checked_lines(checked: Checked) -> str:
    """The verdict on one checkpoint, then a line for each problem."""
    lines = [f"{checked.row.name}  {checked.row.status}  {human_size(checked.bytes_read)} read"]
    lines += [f"  problem: {problem}" for problem in checked.problems]
    lines += [f"  extra file: {extra_text(name)}" for name in checked.extra]
    return "\n".join(map(clean, lines))


def verify_summary(results: Sequence[Checked]) -> str:
    """How many, and how many of them have a problem."""
    counts = Counter(checked.row.status for checked in results)
    others = "".join(f", {counts[status]} {status}" for status in ("unreadable", "unsupported") if counts[status])
    return f"{len(results)} checkpoint{'' if len(results) == 1 else 's'} checked, {counts['damaged']} damaged{others}"


def facts(details: Details, now: datetime) -> list[tuple[str, str]]:
    """What a manifest and its notes say, by name."""
    manifest, row = details.manifest, details.row
    info = row.info or manifest.info(row.path)
    return [
        ("checkpoint", row.path),
        ("step", str(info.step)),
        ("epoch", NOTHING if info.epoch is None else str(info.epoch)),
        ("sequence", str(info.sequence)),
        ("id", info.id),
        ("parent", info.parent or NOTHING),
        ("run", manifest.run or NOTHING),
        ("created", f"{utc(info.created)} ({age(now - info.created)} ago)"),
        ("size", f"{human_size(manifest.size)} in {manifest.files} files"),
        ("metrics", ", ".join(f"{name}={value!r}" for name, value in info.metrics.items()) or NOTHING),
        ("tags", ", ".join(info.tags) or NOTHING),
        ("note", info.note or NOTHING),
        ("pinned", yes_no(value=info.pinned)),
        ("finite", "unknown" if info.finite is None else yes_no(value=info.finite)),
        ("status", row.status),
        ("world size", str(manifest.world_size)),
        *((f"environment.{name}", _joined(value)) for name, value in manifest.environment.items()),
        *((f"statistics.{name}", _joined(value)) for name, value in manifest.statistics.items()),
    ]


def shared_with(details: Details, path: str) -> str:
    """Which checkpoints share the bytes of a file, for as long as they stay; nothing where there are none."""
    names = details.shared.get(path)
    return f"shared with {', '.join(names)}" if names else ""


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def components(details: Details) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """A title and the content of each component."""
    from checkpointer.format.tree_text import describe_component

    for name, component in details.components.items():
        size = human_size(sum(spec.nbytes for spec in component.tensors.values()))
        count = len(component.tensors)
        saved_by = component.meta.get("class")
        kind = f"{component.kind}, {saved_by}" if isinstance(saved_by, str) else component.kind
        yield f"{name} ({kind}, {count} tensor{'' if count == 1 else 's'}, {size})", describe_component(component)


# -------------------------------------------------------------------------------------------------- plain text


def plain_table(table: Table) -> str:
    """Columns aligned with spaces, complete, without any control characters."""
    texts = [[column.title.upper() for column in table.columns]]
    texts += [list(map(_cell, row, table.columns)) for row in table.rows]
    return aligned(texts, [column.align for column in table.columns])


def _cell(content: str | tuple[str, ...], column: Column) -> str:
    return clean(content if isinstance(content, str) else column.separator.join(content))


def aligned(rows: Sequence[Sequence[str]], align: Sequence[str], indent: str = "") -> str:
    """Cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, align, strict=True)
        padded = (text.rjust(width) if side == "right" else text.ljust(width) for text, width, side in cells)
        lines.append((indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def plain_details(details: Details, now: datetime) -> str:
    """Facts, files, then one line for each tensor and value, by its full path."""
    blocks = [aligned([(name, clean(value)) for name, value in facts(details, now)], ("left", "left"))]
    files = [
        (clean(path), human_size(file.size), file.xxh3, shared_with(details, path))
        for path, file in details.files.items()
    ]
    blocks.append("files\n" + aligned(files, ("left", "right", "left", "left"), "  "))
    for title, nodes in components(details):
        blocks.append("\n".join([clean(title), *_plain_leaves(nodes)]))
    return "\n\n".join(blocks)


def _plain_leaves(nodes: Iterable[Node]) -> Iterator[str]:
    from checkpointer.format.tree_text import leaves

    found = [(clean(path), node) for path, node in leaves(nodes)]
    names = max((len(path) for path, _ in found), default=0)
    tensors = [_tensor_cells(node.spec, node.text) for _, node in found if node.spec is not None]
    lines = iter(aligned(tensors, ("left", "left", "right", "left")).splitlines() if tensors else ())
    for path, node in found:
        yield f"  {path:<{names}}  {clean(f'= {node.shown}') if node.spec is None else next(lines)}"


def _tensor_cells(spec: TensorSpec, what: str) -> tuple[str, str, str, str]:
    return spec.dtype, str(list(spec.shape)), human_size(spec.nbytes), f"({what})" if what else ""


# ---------------------------------------------------------------------------------------------------- terminals


def rich_table(table: Table) -> str:
    """A table as wide as the terminal, without the columns that hold nothing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(color_system=color_system(), highlight=False)
    shown = [
        (index, column)
        for index, column in enumerate(table.columns)
        if any(row[index] != NOTHING for row in table.rows) and not (column.wide and console.width < 110)
    ]
    out = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for _, column in shown:
        out.add_column(column.title, justify=column.align, no_wrap=not column.fold, overflow="fold")
    for row in table.rows:
        cells = [row[index] for index, _ in shown]
        texts = [clean(cell if isinstance(cell, str) else ", ".join(cell)) for cell in cells]
        out.add_row(*(Text(text, style=STYLES.get(text, "dim" if text == NOTHING else "")) for text in texts))
    with console.capture() as capture:
        console.print(out)
    return capture.get()


def rich_details(details: Details, now: datetime) -> str:
    """Facts, then a tree of files and components."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text
    from rich.tree import Tree

    console = Console(color_system=color_system(), highlight=False)
    grid = RichTable.grid(padding=(0, 2))
    for name, value in facts(details, now):
        grid.add_row(Text(name, style="bold"), Text(clean(value), style=STYLES.get(value, "")))
    tree = Tree(Text(clean(details.row.name), style="bold"))
    files = tree.add(Text("files", style="bold cyan"))
    for path, file in details.files.items():
        files.add(
            Text.assemble(clean(path), "  ", (f"{human_size(file.size)}  {shared_with(details, path)}".rstrip(), "dim"))
        )
    for title, nodes in components(details):
        _grow(tree.add(Text(clean(title), style="bold cyan")), nodes)
    with console.capture() as capture:
        console.print(grid, "", tree, sep="\n")
    return capture.get()


def _grow(tree: Tree, nodes: Iterable[Node]) -> None:
    from rich.text import Text

    for node in nodes:
        label = clean(node.label)
        if node.spec is not None:
            tree.add(
                Text.assemble(label, "  ", (" ".join(_tensor_cells(node.spec, clean(node.text))).rstrip(), "green"))
            )
        elif node.children:
            _grow(tree.add(Text.assemble(label, "  ", (clean(node.text), "dim"))), node.children)
        else:
            tree.add(Text.assemble(label, " = ", (shortened(clean(node.shown)), "yellow")))


def shortened(text: str) -> str:
    """What a terminal shows of a long value (a generator's state): its beginning, and how much there is."""
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}… (and {len(text) - _SHORT} characters)"


# ------------------------------------------------------------------------------------------------------- values


def human_size(size: int) -> str:
    """Bytes in decimal units, as in the configuration: ``31.0kB``."""
    if size < 1000:
        return f"{size}B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f}{unit}"
    return f"{value / 1000:.1f}PB"


def age(delta: timedelta) -> str:
    """Time passed, in the largest unit that fits: ``5min``. A clock that was wrong counts as now."""
    seconds = max(0, int(delta.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def utc(time: datetime) -> str:
    """``2026-01-31T12:00:00Z``."""
    return time.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def yes_no(*, value: bool) -> str:
    return "yes" if value else "no"
