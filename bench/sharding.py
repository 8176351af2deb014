"""Sharded training against the peers that shard: `python bench/sharding.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import report, table
from bench.command import chosen, environment, load_average, run, say, write_json
from bench.contestants import Contestant, Kind
from bench.lists.sharding import BARS, CONTESTANTS, DEFAULT, WIRE_BAR, contestants, least_nbytes
from bench.measure import Settings, bare_memory, measure
from bench.starting import Work

LIMIT = "limit"
WORKLOADS = ("mlp", "gpt", "wide-gpt")


def run_workload(workload: str, everyone: list[Contestant], settings: Settings) -> dict:
    """One workload measured and summarised, as it stands in the JSON file."""
    bare = bare_memory(workload, settings)
    work = Work("bench.workloads", workload, isolated=True, bytes_counted=True)
    results = measure(work, everyone, settings, say)
    peers = [each.name for each in everyone if each.kind is Kind.PEER]
    rows = report.rows(results, peers, LIMIT, bare["bare_mb"])
    least = least_nbytes(everyone[0].processes, 4 * bare["parameters"])
    shows = overhead_shows(workload, results) + wire_shows(workload, results, least)
    printer = table.console()
    printer.print(table.speed_table(workload, rows))
    printer.print(table.start_table(workload, rows, bare))
    printer.print(table.wire_table(workload, results, least))
    printer.print(table.show_table(shows))
    for line in table.absent(rows):
        printer.print(line, soft_wrap=True)
    kept = {"bare": bare, "contestants": results}
    return kept | {"rows": [asdict(row) for row in rows], "shows": [asdict(show) for show in shows]}


def overhead_shows(workload: str, results: Mapping[str, Mapping]) -> list[report.Show]:
    """Of each of ours the overhead above the limit over that of the best of some peers."""
    times = {name: result["seconds_per_step"] for name, result in results.items() if report.measured(result)}
    return [
        report.overhead_show(
            f"{workload}: {ours}'s overhead over that of {' or '.join(peers)}",
            times,
            ours,
            report.fastest(times, peers),
            LIMIT,
            bar,
        )
        for ours, peers, bar in BARS
    ]


def wire_shows(workload: str, results: Mapping[str, Mapping], least: Mapping[str, int]) -> list[report.Show]:
    """Of each of ours the bytes of a step, of all trainers together, over the least possible."""
    return [
        report.wire_show(f"{workload}: {name}'s bytes over the least possible", results, name, least[name], WIRE_BAR)
        for name in least
    ]


def main(
    workload: Annotated[
        list[str] | None, typer.Option(help=f"any of {', '.join(WORKLOADS)}; may be given again")
    ] = None,
    trainers: Annotated[int, typer.Option(min=2, help="of every contestant, one thread each")] = 2,
    contestants_: Annotated[
        str, typer.Option("--contestants", help=f"comma-separated; any of {', '.join(CONTESTANTS)}")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks per contestant")] = 9,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 1.5,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    quick: Annotated[bool, typer.Option(help="3 short repeats: does it work at all?")] = False,
) -> None:
    """Measure sharded training: every contestant is kept alive and asleep, and runs in turn."""
    workloads = workload or list(WORKLOADS)
    if set(workloads) - set(WORKLOADS):
        raise typer.BadParameter(f"--workload is one of {', '.join(WORKLOADS)}, not {', '.join(workloads)}")
    settings = Settings(3, 0.3, 1, 8, patience) if quick else Settings(repeats, seconds, 1, 10, patience)
    found = {"environment": environment(), "settings": asdict(settings), "trainers": trainers, "workloads": {}}
    for name in workloads:
        found["workloads"][name] = run_workload(name, chosen(contestants_, contestants(trainers), DEFAULT), settings)
    found["environment"]["load_average_at_end"] = load_average()
    write_json(found, json_file)


if __name__ == "__main__":
    run(main)
