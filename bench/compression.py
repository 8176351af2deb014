"""Compressed gradients over a narrow network, against DDP and its hooks: `python bench/compression.py --help`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `bench` as a package, `syncwright` beside it

import typer

from bench import crew, report, starting, table
from bench.command import chosen, environment, interpreted, load_average, run, say, use_cores, write_json
from bench.contestants import Contestant
from bench.crew import BenchError
from bench.lists.compression import BESIDE, CONTESTANTS, DEFAULT, MANY_BUCKETS, contestants
from bench.measure import Settings, measure
from bench.starting import Work

PARTS = ("speed", "runs")
LIMIT = "limit"


def speed(work: Work, everyone: Sequence[Contestant], settings: Settings) -> dict:
    """Everyone in turn, each in a network of its own with that bandwidth; as it stands in the JSON file."""
    results = measure(work, everyone, settings, say)
    times = {name: result["seconds_per_step"] for name, result in results.items() if report.measured(result)}
    shown = table.new_table(
        f"{work.workload}, {everyone[0].processes} trainers, {work.megabits:g} Mbit/s for all together",
        ("contestant", "ms per step", "steps/s", "x its peer's", "MB/step", f"loss after {work.curve} steps"),
    )
    for name in times:
        median, beside = report.median_seconds(times, name), BESIDE.get(name)
        over = report.ratio(times, beside, name) if beside in times else report.Figure(None)
        shown.add_row(
            name,
            table.shown(median, "{:.1f}", 1e3),
            table.number(1 / median.value if median.value else None, "{:.2f}"),
            table.shown(over, "{:.2f}"),
            table.number(_scaled(results[name]["step_bytes"], 1e-6), "{:.2f}"),
            table.number(results[name]["curve"][-1] if results[name]["curve"] else None, "{:.4f}"),
        )
    printer = table.console()
    printer.print(shown)
    for name, result in results.items():
        if not report.measured(result):
            printer.print(f"{name}: {result['status']}", soft_wrap=True, markup=False)
    return {"trainers": everyone[0].processes, "megabits": work.megabits, "contestants": results}


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def runs(work: Work, everyone: Sequence[Contestant], count: int, steps: int, patience: float) -> dict:
    """Everyone started so often, each time for so many steps: how many runs do all of them, and why others do not."""
    found: dict[str, dict] = {}
    for contestant in everyone:
        failures = []
        for number in range(count):
            reason = _run(contestant, work, steps, patience)
            failures += [] if reason is None else [reason]
            say(f"{contestant.name}: run {number + 1}/{count}: {reason or 'done'}")
        found[contestant.name] = {"runs": count, "done": count - len(failures), "failures": failures}
    shown = table.new_table(f"{work.workload}: runs that did {steps} steps", ("contestant", "done", "of"))
    for name, result in found.items():
        shown.add_row(name, str(result["done"]), str(result["runs"]))
    table.console().print(shown)
    return found


def _run(contestant: Contestant, work: Work, steps: int, patience: float) -> str | None:
    """One run from its start to its end; what went wrong, or None."""
    members = crew.Crew()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            members = starting.start(contestant, work, Path(folder) / "cache", Path(folder))
            crew.begin(members, patience)
            crew.ask(members.ranks, {"ask": "block", "steps": steps}, patience)
        except BenchError as error:
            return str(error)
        finally:
            crew.end(members, patience=5.0)
    return None


def main(
    part: Annotated[str, typer.Option(help=f"one of {', '.join(PARTS)}")] = "speed",
    workload: Annotated[str, typer.Option(help="mlp or gpt")] = "mlp",
    trainers: Annotated[int, typer.Option(min=2, help="of every contestant, one thread each")] = 2,
    megabits: Annotated[
        float, typer.Option(min=1.0, help="a second, of all trainers of a contestant together")
    ] = 200.0,
    contestants_: Annotated[
        str, typer.Option("--contestants", help=f"comma-separated; any of {', '.join(CONTESTANTS)}")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="timed blocks per contestant")] = 5,
    seconds: Annotated[float, typer.Option(help="what one block should last")] = 2.0,
    curve: Annotated[int, typer.Option(min=0, help="steps of which the loss is drawn")] = 100,
    count: Annotated[int, typer.Option(min=1, help="runs: so many of each")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="runs: so many steps each")] = 30,
    cores: Annotated[int, typer.Option(min=1, help="for this command and all that it starts")] = 2,
    patience: Annotated[float, typer.Option(help="seconds that any one answer may take")] = 300.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every figure here")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the losses here (png, svg, pdf)")] = None,
    quick: Annotated[bool, typer.Option(help="3 short repeats, interpreted: does it work at all?")] = False,
) -> None:
    """Measure training over a network of a given bandwidth, or whether runs with factors in many buckets always come through."""
    if part not in PARTS:
        raise typer.BadParameter(f"--part is one of {', '.join(PARTS)}, not {part}")
    use_cores(cores)
    everyone = chosen(contestants_, contestants(trainers), DEFAULT if part == "speed" else MANY_BUCKETS[:1])
    settings = Settings(repeats, seconds, 1, 8, patience)
    if quick:
        settings, curve = replace(settings, repeats=3, seconds=0.3), 8
        everyone = interpreted(everyone)
    work = Work("bench.workloads", workload, True, True, megabits, curve)
    found: dict = {"environment": environment(), "settings": asdict(settings)}
    if part == "speed":
        found |= speed(work, everyone, settings)
    else:
        found["runs"] = runs(replace(work, megabits=None), interpreted(everyone), count, steps, patience)
    found["environment"]["load_average_at_end"] = load_average()
    write_json(found, json_file)
    if plot is not None and part == "speed":
        from bench.plot import save_curves

        save_curves(curves(found["contestants"]), plot)


def curves(results: Mapping[str, Mapping]) -> dict[str, tuple[list[float], float]]:
    """By contestant the losses step by step, and the seconds that a step takes."""
    return {
        name: (result["curve"], sorted(result["seconds_per_step"])[len(result["seconds_per_step"]) // 2])
        for name, result in results.items()
        if report.measured(result) and result["curve"] and name != LIMIT
    }


if __name__ == "__main__":
    run(main)
