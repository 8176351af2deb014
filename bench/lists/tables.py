"""Who takes part in bench/tables.py: the same job on tables of two sizes, and what their rows cost alone."""

from __future__ import annotations

from bench.contestants import Contestant, Kind

SMALL, LARGE, HUGE = 100_000, 10_000_000, 50_000_000
PLAN = """default: parameter_server
variables:
  - "table.weight": {parameter_server: {lazy: true}}
"""
SIZES = {"rows-100k": SMALL, "rows-10m": LARGE}
ALONE = "-alone"


def job(name: str, rows: int, servers: int = 1, compile: bool | str = "auto") -> Contestant:
    """Two trainers and some servers, every one a process."""
    return Contestant(
        name,
        Kind.OURS,
        "bench.contestants.ours_tables",
        {"rows": rows, "plan": PLAN, "compile": compile},
        helpers=("store", *["server"] * servers),
    )


def rows_alone(name: str, rows: int) -> Contestant:
    return Contestant(name + ALONE, Kind.APART, "bench.contestants.rows_alone", {"rows": rows}, processes=1)


def of_sizes(compile: bool | str) -> list[Contestant]:
    """Every size, and its rows alone."""
    return [make for name, rows in SIZES.items() for make in (job(name, rows, compile=compile), rows_alone(name, rows))]
