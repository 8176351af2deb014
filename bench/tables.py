"""Whether a step's cost grows with its table, and what every process of a job with a huge one takes.

    python bench/tables.py --json tables.json             # 100 thousand rows beside 10 million, four optimizers
    python bench/tables.py --part cpu                     # processor time in one process: where others use the machine
    python bench/tables.py --part huge --json huge.json   # 50 million rows x 16, started under deferred(): memory
    python bench/tables.py --quick                        # does it work at all?

Two trainers and one server, every one a process, on `--cores` cores. Both sizes are alive at once and run in turn, so that
what slows the machine slows both; beside them one process gathers and writes a step's rows and nothing else, at both sizes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import crew, table
from bench.command import environment, load_average, run, say, use_cores, write_json
from bench.lists.tables import ALONE, HUGE, SIZES, job, of_sizes
from bench.measure import Measured, Settings, begin, end_all, measure, record_memory, warm_up
from bench.rates import seconds_per_minibatch
from bench.report import Figure, Times, bootstrap, pick
from bench.starting import Work
from bench.table_workloads import OPTIMIZERS

BAR = 1.2
TRAINER_MB = 1000.0
MODULE = "bench.table_workloads"


def growth(times: Times, small: str, large: str) -> Figure:
    """The time at the large size over that at the small one."""
    return bootstrap(pick(times, small, large), lambda medians: medians[large] / medians[small])


def run_sizes(optimizer: str, compile: bool | str, settings: Settings) -> dict:
    """Both sizes under one optimizer, as it stands in the JSON file."""
    contestants = of_sizes(compile)
    results = measure(Work(MODULE, optimizer), contestants, settings, say)
    times = {
        name: [each * results[name]["minibatches_per_step"] for each in mine]
        for name, mine in seconds_per_minibatch(results).items()
    }
    small, large = SIZES
    pairs = {"a step": (small, large), "its rows alone": (small + ALONE, large + ALONE)}
    statuses = {name: result["status"] for name, result in results.items()}
    title = f"{optimizer}: ms, medians of {settings.repeats}; 90% bootstrap interval in brackets"
    return {"contestants": results, "ratios": show_sizes(title, times, pairs, statuses)}


def run_cpu(optimizer: str, repeats: int) -> dict:
    """Both sizes in one process, by processor time."""
    from bench.one_process import cpu_seconds

    times = cpu_seconds(optimizer, SIZES, repeats)
    small, large = SIZES
    title = f"{optimizer}, all roles in one process: ms of processor time, medians of {repeats}"
    return {"seconds": times, "ratios": show_sizes(title, times, {"a step": (small, large)}, {})}


def show_sizes(
    title: str, times: Times, pairs: Mapping[str, tuple[str, str]], statuses: Mapping[str, str]
) -> dict[str, dict]:
    """Prints what both sizes take, and the ratio; who was not measured shows why."""
    small, large = SIZES
    shown = table.new_table(title, ("", small, large, "ratio", "promised"))
    found = {}
    for label, (one, other) in pairs.items():
        if one not in times or other not in times:
            shown.add_row(label, statuses[one], statuses[other], "-", "-")
            continue
        ratio = growth(times, one, other)
        found[label] = asdict(ratio)
        medians = [bootstrap(pick(times, name), lambda m, name=name: m[name]) for name in (one, other)]
        cells = [table.shown(each, "{:.2f}", 1e3) for each in medians]
        shown.add_row(label, *cells, table.shown(ratio, "{:.2f}"), f"{BAR:g}" if label == "a step" else "")
    table.console().print(shown)
    return found


def run_huge(optimizer: str, servers: int, compile: bool | str, steps: int, settings: Settings) -> dict:
    """Some steps on the huge table; the peak memory of every process."""
    one = Measured(job("huge", HUGE, servers, compile))
    work = Work(MODULE, optimizer)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            begin(one, work, "warm", Path(folder) / "cache", Path(folder), settings)
            warm_up(one, settings)
            answers = crew.ask(one.crew.ranks, {"ask": "block", "steps": steps}, settings.patience, one.crew.helpers)
            record_memory(one)
        finally:
            end_all([one])
    seconds = max(answer["seconds"] for answer in answers) / steps
    first = one.first_step_seconds["warm"][0]
    title = f"{HUGE:,} rows x 16, {optimizer}: first step after {first:.1f} s, then {1e3 * seconds:.1f} ms a step"
    shown = table.new_table(title, ("process", "peak MiB", "promised"))
    for label, peak in one.peaks_mb.items():
        shown.add_row(label, f"{peak:,.0f}", f"{TRAINER_MB:g}" if " rank " in label else "")
    table.console().print(shown)
    return {"first_step_seconds": first, "seconds_per_step": seconds, "losses": one.losses, "peaks_mb": one.peaks_mb}


def main(
    part: Annotated[
        Literal["sizes", "cpu", "huge"], typer.Option(help="two sizes in turn, in one process, or the huge one")
    ] = "sizes",
    optimizer: Annotated[list[str] | None, typer.Option(help=f"any of {', '.join(OPTIMIZERS)}; again for more")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks of everyone")] = 9,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="of the huge table")] = 200,
    servers: Annotated[int, typer.Option(min=1, help="of the huge table")] = 1,
    interpreted: Annotated[bool, typer.Option(help="compile nothing")] = False,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 600.0,
    cores: Annotated[int, typer.Option(min=1, help="for everybody together")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    quick: Annotated[bool, typer.Option(help="3 short repeats, nothing compiled: does it work at all?")] = False,
) -> None:
    """Measure tables of many rows."""
    chosen = optimizer or (["rowwise-adagrad"] if part == "huge" else list(OPTIMIZERS))
    if set(chosen) - set(OPTIMIZERS):
        raise typer.BadParameter(f"--optimizer is one of {', '.join(OPTIMIZERS)}, not {', '.join(chosen)}")
    use_cores(cores)
    settings = Settings(repeats, seconds, starts=1, warmup=12, patience=patience)
    compile: bool | str = False if interpreted or quick else "auto"
    if quick:
        settings = Settings(3, 0.3, 1, warmup=8, patience=patience)
    found: dict = {"environment": environment(), "settings": asdict(settings), part: {}}
    for name in chosen:
        before = load_average()
        match part:
            case "sizes":
                found[part][name] = run_sizes(name, compile, settings)
            case "cpu":
                found[part][name] = run_cpu(name, settings.repeats)
            case "huge":
                found[part][name] = run_huge(name, servers, compile, steps, settings)
        found[part][name]["load_average"] = [before, load_average()]
        say(f"{name}: load {before[0]:.1f} before, {load_average()[0]:.1f} at the end")
        write_json(found, json_file)


if __name__ == "__main__":
    run(main)
