"""The whole matrix against one device: `python -m tests.matrix`.

Every optimizer x model x dtype x clip x plan x parts x servers x schedule, over 5 steps, in loopback. A family (what
shares captures) is one task of a process pool. `--only NAME` runs one case and shows where it goes wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests import zoo
from tests.equivalence import DTYPES, IDLE, PARTS, PLANS, RAGGED, Case, Difference, Family, Laboratory, Verdict

SERVERS = (1, 2)


def families() -> list[Family]:
    return [Family(*choice) for choice in product(zoo.MODELS, zoo.OPTIMIZERS, DTYPES, (False, True))]


def cases_of(family: Family) -> Iterator[Case]:
    for plan, parts, servers, schedule in product(PLANS, PARTS.values(), SERVERS, (False, True)):
        yield Case(family, plan, parts, servers, schedule)
    for plan, parts in product(PLANS, (RAGGED, IDLE)):
        yield Case(family, plan, parts, 2, True)


def run_family(family: Family) -> list[Verdict]:
    """All cases of one family; an exception is a failure of its case."""
    laboratory = Laboratory(family)
    return [run_case(laboratory, case) for case in cases_of(family)]


def run_case(laboratory: Laboratory, case: Case) -> Verdict:
    try:
        return laboratory.judge(case)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rsplit('/', 1)[-1]}:{last.lineno}"
        nothing = Difference("nothing", float("inf"), 0.0, 0.0)
        return Verdict(case, False, nothing, f"{type(error).__name__} at {where}: {error}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="CASE", help="one case, by its name")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--optimizers", default=",".join(zoo.OPTIMIZERS), help="separated by commas")
    parser.add_argument("--models", default=",".join(zoo.MODELS), help="separated by commas")
    options = parser.parse_args(arguments)
    console = Console()
    if options.only:
        return _one(Case.named(options.only), console)
    chosen = [
        f for f in families() if f.optimizer in options.optimizers.split(",") and f.model in options.models.split(",")
    ]
    verdicts = list(_all(chosen, options.processes, console))
    _summarise(verdicts, console)
    return 1 if any(v.failure for v in verdicts) else 0


def _one(case: Case, console: Console) -> int:
    verdict = Laboratory(case.family).judge(case)
    console.print(verdict)
    return 1 if verdict.failure else 0


def _all(chosen: list[Family], processes: int, console: Console) -> Iterator[Verdict]:
    columns = ["{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    done, total = 0, sum(len(list(cases_of(f))) for f in chosen)
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        context.Pool(processes, _one_thread, maxtasksperchild=20) as pool,
    ):
        task = progress.add_task("cases", total=total)
        for verdicts in pool.imap_unordered(run_family, sorted(chosen, key=_longest_first)):
            progress.advance(task, len(verdicts))
            done += len(verdicts)
            if not console.is_terminal and done * 20 // total > (done - len(verdicts)) * 20 // total:
                print(f"{done} of {total} cases", flush=True)
            for verdict in verdicts:
                if verdict.failure:
                    progress.console.print(
                        f"[red]failed[/red] {verdict.case.name}: {verdict.failure}", highlight=False, soft_wrap=True
                    )
            yield from verdicts


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _longest_first(family: Family) -> bool:
    return family.model not in ("transformer", "dropout")


def _summarise(verdicts: list[Verdict], console: Console) -> None:
    table = Table(
        "optimizer", "cases", "bit-equal", "to rounding", "failed", "worst", "limit", "floor", "variable", "case"
    )
    for optimizer in zoo.OPTIMIZERS:
        mine = [v for v in verdicts if v.case.family.optimizer == optimizer]
        if mine:
            table.add_row(optimizer, *_counts(mine), *_worst(mine))
    table.add_row("all", *_counts(verdicts), *_worst(verdicts))
    wide = Console(width=220) if not console.is_terminal else console
    wide.print(table)
    _print_failures([v for v in verdicts if v.failure], wide)
    wide.print(f"{len(verdicts)} cases, {sum(bool(v.failure) for v in verdicts)} failed, 0 skipped", highlight=False)


def _counts(verdicts: list[Verdict]) -> Iterable[str]:
    count = Counter("failed" if v.failure else "exact" if v.exact else "rounded" for v in verdicts)
    return str(len(verdicts)), *(str(count[kind]) for kind in ("exact", "rounded", "failed"))


def _worst(verdicts: list[Verdict]) -> Iterable[str]:
    """The case nearest to its limit, or farthest beyond it."""
    verdict = max(verdicts, key=lambda v: (bool(v.failure), v.worst.share, v.worst.found))
    worst = verdict.worst
    return f"{worst.found:.1e}", f"{worst.limit:.1e}", f"{worst.floor:.1e}", worst.variable, verdict.case.name


def _print_failures(failed: list[Verdict], console: Console) -> None:
    for verdict in failed[:50]:
        console.print(
            f"{verdict.failure}\n  python -m tests.matrix --only {verdict.case.name}", highlight=False, markup=False
        )
    if len(failed) > 50:
        console.print(f"... and {len(failed) - 50} more", highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
