"""Recommenders with large tables on two trainers, against the peers: `python bench/sparse.py --help`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import rates, table
from bench.command import chosen, environment, interpreted, load_average, run, say, use_cores, write_json
from bench.contestants import Contestant, Kind
from bench.lists.sparse import CONTESTANTS, LIMIT, TRAINERS, default
from bench.measure import Settings, measure
from bench.sparse_workloads import WORKLOADS
from bench.starting import Work

DEFAULT_WORKLOADS = ("bag-sgd", "bag-adagrad", "dlrm-sgd")
CORES = 2


def run_workload(workload: str, contestants: list[Contestant], settings: Settings) -> dict:
    """One workload measured and summarised, as it stands in the JSON file."""
    needed = WORKLOADS[workload].must_move(TRAINERS)
    results = measure(
        Work("bench.sparse_workloads", workload, isolated=True, bytes_counted=True), contestants, settings, say
    )
    peers = [contestant.name for contestant in contestants if contestant.kind is Kind.PEER]
    found = rates.rates(results, peers, LIMIT, needed)
    printer = table.console()
    title = f"{workload}: medians, 90% bootstrap interval in brackets; a step must move {needed / 1e6:.2f} MB"
    printer.print(table.rate_table(title, found))
    for line in table.absent(found):
        printer.print(line, soft_wrap=True)
    for name in rates.disagreeing(found):
        printer.print(f"{name}: its first losses are not those of one device", soft_wrap=True)
    return {"must_move_bytes": needed, "contestants": results, "rates": [asdict(rate) for rate in found]}


def main(
    workload: Annotated[
        list[str] | None, typer.Option(help=f"any of {', '.join(WORKLOADS)}; may be given again")
    ] = None,
    contestants: Annotated[str, typer.Option(help=f"comma-separated; any of {', '.join(CONTESTANTS)}")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks per contestant")] = 15,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 1.5,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 600.0,
    cores: Annotated[int, typer.Option(min=1, help="for everybody together")] = CORES,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    quick: Annotated[bool, typer.Option(help="3 short repeats, nothing compiled: does it work at all?")] = False,
) -> None:
    """Measure recommenders: every contestant is kept alive and asleep, and runs in turn."""
    workloads = workload or list(DEFAULT_WORKLOADS)
    if set(workloads) - set(WORKLOADS):
        raise typer.BadParameter(f"--workload is one of {', '.join(WORKLOADS)}, not {', '.join(workloads)}")
    use_cores(cores)
    settings = Settings(repeats, seconds, starts=1, warmup=12, patience=patience)
    if quick:
        settings = Settings(3, 0.3, 1, warmup=8, patience=patience)
    found = {"environment": environment(), "settings": asdict(settings), "workloads": {}}
    for name in workloads:
        everyone = chosen(contestants, CONTESTANTS, default(name))
        found["workloads"][name] = run_workload(name, interpreted(everyone) if quick else everyone, settings)
        write_json(found, json_file)
    found["environment"]["load_average_at_end"] = load_average()
    write_json(found, json_file)


if __name__ == "__main__":
    run(main)
