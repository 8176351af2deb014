"""What the commands share: whom to measure, the machine's facts, the file, and an end that leaves nobody behind."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import typer

from bench.contestants import Contestant


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_average() -> list[float]:
    return list(os.getloadavg())


def environment() -> dict:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": load_average(),
    }


def use_cores(count: int) -> None:
    """This process and all that it starts from now on run on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def chosen(names: str, known: Mapping[str, Contestant], default: Sequence[str]) -> list[Contestant]:
    """Those of a comma-separated list, or the default. Raises typer.BadParameter for a name that is not known."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(default)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def interpreted(contestants: Sequence[Contestant]) -> list[Contestant]:
    """The same, but who could compile first does not: to see soon whether all works."""
    return [
        replace(one, options={**one.options, "compile": False}) if "compile" in one.options else one
        for one in contestants
    ]


def write_json(found: dict, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def run(main: Callable) -> None:
    """The command line of `main`. A polite end signal takes the same way out as Ctrl-C: all processes are ended."""

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    typer.run(main)
