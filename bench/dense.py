"""Dense training on two trainers against the peers: `python bench/dense.py --help`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import report, table
from bench.command import chosen, environment, load_average, run, say, write_json
from bench.contestants import Contestant, Kind
from bench.lists.dense import CONTESTANTS, DEFAULT, LOSS_REFERENCE
from bench.measure import Settings, bare_memory, measure, measure_update
from bench.starting import Work

OURS, LIMIT = "syncwright", "limit"
REFERENCE = LOSS_REFERENCE[Kind.OURS]
WORKLOADS = ("mlp", "gpt")


def run_workload(workload: str, contestants: list[Contestant], settings: Settings, limit: str) -> dict:
    """One workload measured and summarised, as it stands in the JSON file."""
    bare = bare_memory(workload, settings)
    results = measure(Work("bench.workloads", workload), contestants, settings, say)
    peers = [contestant.name for contestant in contestants if contestant.kind is Kind.PEER]
    rows = report.rows(results, peers, limit, bare["bare_mb"])
    shows = report.workload_shows(workload, results, peers, OURS, limit, REFERENCE)
    printer = table.console()
    printer.print(table.speed_table(workload, rows))
    printer.print(table.start_table(workload, rows, bare))
    for line in table.absent(rows):
        printer.print(line, soft_wrap=True)
    return {
        "bare": bare,
        "contestants": results,
        "rows": [asdict(row) for row in rows],
        "shows": [asdict(show) for show in shows],
    }


def main(
    workload: Annotated[list[str] | None, typer.Option(help="mlp or gpt; may be given twice")] = None,
    contestants: Annotated[str, typer.Option(help=f"comma-separated; any of {', '.join(CONTESTANTS)}")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks per contestant")] = 15,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 1.5,
    starts: Annotated[int, typer.Option(min=1, help="starts per contestant, for the time to first step")] = 3,
    limit: Annotated[str, typer.Option(help="the contestant that overheads are counted from")] = LIMIT,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 900.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw every repeat here (png, svg, pdf)")] = None,
    quick: Annotated[bool, typer.Option(help="3 short repeats, 1 start: does it work at all?")] = False,
) -> None:
    """Measure dense training: every contestant is kept alive and asleep, and runs in turn."""
    workloads = workload or list(WORKLOADS)
    if set(workloads) - set(WORKLOADS):
        raise typer.BadParameter(f"--workload is one of {', '.join(WORKLOADS)}, not {', '.join(workloads)}")
    settings = Settings(repeats, seconds, starts, warmup=12, patience=patience)
    if quick:
        settings = Settings(3, 0.3, 1, warmup=8, patience=patience)
    found = {"environment": environment(), "settings": asdict(settings), "workloads": {}}
    for name in workloads:
        found["workloads"][name] = run_workload(name, chosen(contestants, CONTESTANTS, DEFAULT), settings, limit)
    found["update"] = measure_update(settings.repeats, 20, settings, say)
    finish(found, json_file, plot)


def finish(found: dict, json_file: Path | None, plot: Path | None) -> None:
    """Print what is left, write the files."""
    update = report.update_show(found["update"], OURS, "torch fused AdamW")
    shows = [report.Show(**show) for result in found["workloads"].values() for show in result.pop("shows")]
    found["shows"] = [asdict(show) for show in [*shows, update]]
    found["environment"]["load_average_at_end"] = load_average()
    printer = table.console()
    printer.print(table.update_table(found["update"]))
    printer.print(table.show_table([*shows, update]))
    write_json(found, json_file)
    if plot is not None:
        from bench.plot import save

        save(found["workloads"], plot)


if __name__ == "__main__":
    run(main)
