"""A workload of bench/table_workloads.py with a table of so many rows, on servers as in `ours_served`."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from bench.contestants import Running, Seat, ours_served
from bench.table_workloads import OneTable
from bench.workloads import Workload


def start(workload: OneTable, seat: Seat, rows: int, plan: str, compile: bool | str, tcp: bool = False) -> Running:
    """
    rows  of the table
    plan  rules in YAML
    """
    return ours_served.start(sized(workload, rows), seat, plan, compile, tcp=tcp)


def serve(workload: OneTable, seat: Seat, rows: int, plan: str, compile: bool | str, tcp: bool = False) -> None:
    """A server, or the store."""
    ours_served.serve(sized(workload, rows), seat, plan, compile, tcp=tcp)


def sized(workload: OneTable, rows: int) -> Workload:
    """The workload with so many rows; it has all that is asked of one."""
    return cast(Workload, replace(workload, rows=rows))
