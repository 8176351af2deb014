"""Parameter servers against the peers and against bare transports: `python bench/servers.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import rates, table
from bench.command import chosen, environment, interpreted, load_average, run, say, use_cores, write_json
from bench.contestants import Kind
from bench.lists.servers import BARE, MODES, Setting, trainings, transfers
from bench.measure import Settings, measure
from bench.server_workloads import MEGABYTE, SIZES
from bench.starting import Work

PARTS = ("transfer", "mlp")
WORKLOADS = "bench.server_workloads"
CORES = 2
TRAINERS, SERVERS = 2, 1  # of the MLP


def measure_transfer(size: int, setting: Setting, contestants: str, settings: Settings) -> dict:
    """One size in one setting, as it stands in the JSON file."""
    known = transfers(setting)
    everyone = chosen(contestants, known, tuple(known))
    results = measure(Work(WORKLOADS, f"transfer-{size}", isolated=True), everyone, settings, say)
    found = rates.transfers(results, size * MEGABYTE, setting.trainers, BARE)
    printer = table.console()
    title = f"{size} MB, {setting}: medians, 90% intervals"
    printer.print(table.transfer_table(title, found, BARE))
    for line in table.absent(found):
        printer.print(line, soft_wrap=True)
    return {
        "megabytes": size,
        **asdict(setting),
        "contestants": results,
        "transfers": [asdict(transfer) for transfer in found],
    }


def measure_training(contestants: str, settings: Settings, quick: bool) -> dict:
    """The MLP trained by everyone, as it stands in the JSON file."""
    known = trainings(TRAINERS, SERVERS)
    everyone = chosen(contestants, known, tuple(known))
    if quick:
        everyone = interpreted(everyone)
    results = measure(Work(WORKLOADS, "mlp", isolated=True, bytes_counted=True), everyone, settings, say)
    peers = [contestant.name for contestant in everyone if contestant.kind is Kind.PEER]
    found = rates.rates(results, peers, "alone", None)
    printer = table.console()
    title = f"mlp over {SERVERS} server, {TRAINERS} trainers: medians, 90% bootstrap interval in brackets"
    printer.print(table.rate_table(title, found))
    for line in table.absent(found):
        printer.print(line, soft_wrap=True)
    for name in rates.disagreeing(found):
        printer.print(f"{name}: its first losses are not those of one device", soft_wrap=True)
    return {"contestants": results, "rates": [asdict(rate) for rate in found]}


def checked(given: Sequence, known: Sequence, option: str) -> list:
    wrong = [one for one in given if one not in known]
    if wrong:
        raise typer.BadParameter(f"{option} is one of {', '.join(map(str, known))}, not {wrong[0]}")
    return list(given)


def main(
    part: Annotated[list[str] | None, typer.Option(help="transfer or mlp; may be given twice")] = None,
    size: Annotated[
        list[int] | None, typer.Option(help=f"megabytes of a transfer: {SIZES}; may be given again")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="sync or async; may be given twice")] = None,
    trainers: Annotated[list[int] | None, typer.Option(help="of a transfer: 1 to 4; may be given again")] = None,
    servers: Annotated[list[int] | None, typer.Option(help="of a transfer: 1 or 2; may be given twice")] = None,
    contestants: Annotated[str, typer.Option(help="comma-separated names, as the tables have them")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks per contestant")] = 9,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 1.0,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 300.0,
    cores: Annotated[int, typer.Option(min=1, help="for everybody together")] = CORES,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    quick: Annotated[
        bool, typer.Option(help="3 short repeats, 2 trainers, 1 server, nothing compiled: does it work?")
    ] = False,
) -> None:
    """Measure pushes and pulls of whole variables, and an MLP trained over servers."""
    parts = checked(part or PARTS, PARTS, "--part")
    sizes = checked(size or SIZES, SIZES, "--size")
    modes = checked(mode or MODES, MODES, "--mode")
    counts = product(trainers or ([2] if quick else range(1, 5)), servers or ([1] if quick else (1, 2)))
    use_cores(cores)
    settings = Settings(repeats, seconds, starts=1, warmup=8, patience=patience)
    if quick:
        settings = Settings(3, 0.3, 1, warmup=8, patience=patience)
    found = {"environment": environment(), "settings": asdict(settings), "transfers": [], "mlp": None}
    if "transfer" in parts:
        for size_, mode_, (trainers_, servers_) in product(sizes, modes, counts):
            setting = Setting(mode_, trainers_, servers_)
            found["transfers"].append(measure_transfer(size_, setting, contestants, settings))
            write_json(found, json_file)
    if "mlp" in parts:
        found["mlp"] = measure_training(contestants, settings, quick)
    found["environment"]["load_average_at_end"] = load_average()
    write_json(found, json_file)


if __name__ == "__main__":
    run(main)
