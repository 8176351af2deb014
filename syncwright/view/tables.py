"""Tables for people: by rich on a terminal, as aligned plain text anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.console import Console
from rich.text import Text

from syncwright.plan import Plan


@dataclass(frozen=True, slots=True)
class Table:
    """A title, column headings, rows of text, and lines of totals below a rule.

    right  the headings of columns that stand to the right (numbers)
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: tuple[tuple[str, ...], ...] = ()
    right: frozenset[str] = frozenset()


def show_table(console: Console, table: Table) -> None:
    """Prints `table`; only on a terminal with lines and colours."""
    if console.is_terminal:
        console.print(rich_table(table))
    else:
        show_text(console, plain(table))


def show_text(console: Console, text: str) -> None:
    """Prints text as it is: no markup, no colours, no wrapping."""
    console.print(Text(text), soft_wrap=True)


def plain(table: Table) -> str:
    """`table` as text: columns two spaces apart, no blanks at the ends of lines."""
    lines = [table.columns, *table.rows, *table.totals]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [_line(table, line, widths) for line in lines]
    rule = "-" * max(len(line) for line in text)
    body, totals = text[1 : 1 + len(table.rows)], text[1 + len(table.rows) :]
    return "\n".join([table.title, "", text[0], rule, *body, *([rule, *totals] if totals else [])])


def size_text(nbytes: float) -> str:
    """A number of bytes as people read it: `96 B`, `1.5 KiB`, `12.0 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 server`, `2 servers`, `3 pushes`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def roles_text(plan: Plan) -> str:
    """`2 trainers and 1 server`; servers where they own something."""
    trainers, served = counted(plan.trainers, "trainer"), plan.reducer is not None
    return f"{trainers} and {counted(plan.servers, 'server')}" if served else trainers


def _line(table: Table, line: Sequence[str], widths: list[int]) -> str:
    cells = [
        text.rjust(width) if heading in table.right else text.ljust(width)
        for heading, text, width in zip(table.columns, line, widths, strict=True)
    ]
    return "  ".join(cells).rstrip()


def rich_table(table: Table) -> rich.table.Table:
    """`table` with lines and colours."""
    made = rich.table.Table(title=table.title, title_justify="left")
    for heading in table.columns:
        made.add_column(heading, justify="right" if heading in table.right else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    if table.totals:
        made.add_section()
    for row in table.totals:
        made.add_row(*map(Text, row), style="bold")
    return made
