"""The result of a comparison with one device, as a table and sentences."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from syncwright.checking import Check, Difference, check_plan
from syncwright.view.look import Look
from syncwright.view.tables import Table, counted, roles_text, show_table, show_text

_COLUMNS = ("variable", "role", "to the whole batch", "to the parts", "floor", "tolerated", "verdict")


def show_check(out: Console, err: Console, seen: Look, steps: int, without: Sequence[str] = ()) -> bool:
    """Compares a plan with one device, with progress on `err` and the result on `out`; whether they are equal."""
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks = {}

        def progress(what: str, step: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=steps)
                if not err.is_terminal:
                    show_text(err, f"{what}: {counted(steps, 'step')}")
            bar.update(tasks[what], completed=step)

        check = check_plan(seen.first, seen.program, seen.plan, steps, without, progress)
    show_table(out, check_table(check))
    show_text(out, "\n" + "\n".join(check_notes(check)))
    return not check.beyond


def check_table(check: Check) -> Table:
    """Largest relative difference of every variable to one device, and what was tolerated."""
    who = roles_text(check.plan)
    steps = f"{counted(check.steps, 'step')}, all on the script's first batch"
    title = f"Largest relative difference of {who} to one device after {steps}"
    return Table(title, _COLUMNS, tuple(map(_row, check.differences)), right=frozenset(_COLUMNS[2:6]))


def check_notes(check: Check) -> list[str]:
    """What the table's columns mean here, and the verdict, last."""
    lines = [
        "the whole batch and the parts are plain PyTorch on one device; the floor is how far these two are apart",
    ]
    if check.together:
        lines = [
            "trainers normalise by all examples (sync_batch_norm), as the whole batch on one device does; in place of the parts "
            "stands the whole batch with its examples in reverse, and the floor is how far these two are apart"
        ]
    if check.mixing:
        lines = [
            f"compared with the parts only, as on N virtual batches: {', '.join(check.mixing)} "
            "joins the examples of a batch or draws at random, so the whole batch at once is another computation"
        ]
    if check.weights:
        lines.append(
            f"the whole batch's gradient is the parts' times {', '.join(f'{w:.3g}' for w in check.weights)}, "
            "but the plan weighs them otherwise: a loss that is a sum takes `reduce: sum` in the plan; one whose mean "
            "is not over the batch's leading axis takes distribute(..., examples=)"
        )
    return [*lines, _verdict(check)]


def _verdict(check: Check) -> str:
    beyond = check.beyond
    count = counted(len(check.differences), "variable")
    if not beyond:
        return f"equal: {count} within tolerance"
    names = ", ".join(d.variable.name for d in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
    return f"NOT equal: {len(beyond)} of {count} beyond tolerance: {names}"


def _row(difference: Difference) -> tuple[str, ...]:
    figures = (difference.whole, difference.parts, difference.floor, difference.limit)
    verdict = "equal" if difference.holds else "BEYOND"
    if difference.holds and difference.parts == 0:
        verdict = "bit-equal to the parts"
    return (difference.variable.name, difference.variable.role.value, *map(_figure, figures), verdict)


def _figure(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
