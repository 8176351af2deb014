"""The report as tables: colours on a terminal, plain text when piped."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.rates import Rate, Transfer
from bench.report import Figure, Row, Show, median_seconds

PLAIN_WIDTH = 150


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, no_color=True)


def new_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    return table


def speed_table(workload: str, rows: Sequence[Row]) -> Table:
    table = new_table(
        f"{workload}: medians, 90% bootstrap interval in brackets",
        (
            "contestant",
            "ms per step",
            "over limit",
            "over best peer",
            "ms above limit",
            "that over best peer's",
        ),
    )
    for row in (row for row in rows if row.status == "measured"):
        table.add_row(
            row.name,
            shown(row.step, "{:.2f}", 1e3),
            shown(row.over_limit, "{:.3f}"),
            shown(row.over_best, "{:.3f}"),
            shown(row.overhead, "{:.2f}", 1e3),
            shown(row.overhead_over_best, "{:.2f}"),
        )
    return table


def wire_table(workload: str, results: Mapping[str, Mapping], least: Mapping[str, int]) -> Table:
    """What all trainers of each contestant together send in a step, and at least have to."""
    table = new_table(f"{workload}: bytes over the loopback in a step", ("contestant", "MB per step", "least MB"))
    for name, result in results.items():
        if result.get("step_bytes") is not None:
            possible = f"{least[name] / 1e6:.2f}" if name in least else "-"
            table.add_row(name, f"{result['step_bytes'] / 1e6:.2f}", possible)
    return table


def absent(rows: Sequence[Row | Rate | Transfer]) -> list[str]:
    """A line for everyone who was not measured, with the reason."""
    return [escape(f"{row.name}: {row.status}") for row in rows if row.status != "measured"]


def start_table(workload: str, rows: Sequence[Row], bare: dict) -> Table:
    table = new_table(
        f"{workload}: first step, memory, losses (a bare process has {bare['bare_mb']:.0f} MiB, "
        f"with Inductor imported {bare['with_inductor_mb']:.0f} MiB)",
        (
            "contestant",
            "first step cold s",
            "warm s",
            "peak MiB",
            "above bare",
            "losses compared with",
            "max difference",
            "relative",
        ),
    )
    for row in (row for row in rows if row.status == "measured"):
        table.add_row(
            row.name,
            number(row.first_cold, "{:.2f}"),
            number(row.first_warm, "{:.2f}"),
            number(row.peak_mb, "{:.0f}"),
            number(row.above_bare_mb, "{:.0f}"),
            row.loss_reference,
            number(row.loss_absolute, "{:.1e}"),
            number(row.loss_relative, "{:.1e}"),
        )
    return table


def update_table(update: dict) -> Table:
    table = new_table("the GPT's update alone, 1 thread", ("update", "ms"))
    for name, seconds in update["seconds"].items():
        table.add_row(f"update: {name} ms", shown(median_seconds({name: seconds}, name), "{:.2f}", 1e3))
    for name, reason in update["missing"].items():
        table.add_row(f"update: {name} ms", escape(f"not available: {reason}"))
    return table


def rate_table(title: str, rates: Sequence[Rate]) -> Table:
    table = new_table(
        title,
        (
            "contestant",
            "minibatches/s",
            "x best peer",
            "x limit",
            "MB/step",
            "x needed",
            "rank MiB",
            "others MiB",
            "losses differ",
        ),
    )
    for rate in (rate for rate in rates if rate.status == "measured"):
        table.add_row(
            rate.name,
            shown(rate.per_second, "{:.1f}"),
            shown(rate.over_best, "{:.2f}"),
            shown(rate.over_limit, "{:.2f}"),
            number(rate.step_mb, "{:.2f}"),
            number(rate.over_needed, "{:.2f}"),
            number(rate.rank_mb, "{:.0f}"),
            number(rate.other_mb, "{:.0f}"),
            number(rate.loss, "{:.1e}"),
        )
    return table


def transfer_table(title: str, transfers: Sequence[Transfer], bare: Sequence[str]) -> Table:
    table = new_table(title, ("contestant", "ms", "GB/s", *(f"x {name}" for name in bare)))
    for one in (one for one in transfers if one.status == "measured"):
        table.add_row(
            one.name,
            shown(one.milliseconds, "{:.1f}"),
            number(one.gigabytes, "{:.2f}"),
            *(shown(figure, "{:.2f}") for figure in one.over),
        )
    return table


def show_table(shows: Sequence[Show]) -> Table:
    table = new_table("shows", ("name", "value", "bar", "holds", "note"))
    for show in shows:
        holds = {None: "not known", True: "yes", False: "NO"}[show.holds]
        table.add_row(show.name, number(show.value, "{:.3g}"), f"{show.bar:g}", holds, escape(show.note))
    return table


def shown(figure: Figure, form: str, scale: float = 1.0) -> str:
    if figure.value is None:
        return "-"
    ends = ("undefined" if end is None else form.format(end * scale) for end in (figure.low, figure.high))
    return f"{form.format(figure.value * scale)} \\[{' '.join(ends)}]"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
