"""`syncwright top`: one line for each role of a running job, once a second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from syncwright.errors import RequestError
from syncwright.runtime.announce import announced
from syncwright.runtime.heartbeat import Beat
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.watching import JobEnded, Seen, Watch
from syncwright.view.tables import Table, rich_table, show_table, show_text

EVERY_SECONDS = 1.0
SILENT_SECONDS = 5.0
COLUMNS = (
    "role",
    "step",
    "steps/s",
    "lag",
    "pushes/s",
    "pulls/s",
    "MB/s in",
    "MB/s out",
    "dropped",
    "waits for",
    "state",
)
NUMBERS = frozenset(COLUMNS[1:9])
UNKNOWN = "-"
HOW_TO_KNOW = "Messages are counted in jobs that are started with `syncwright run --metrics`."

Look = Mapping[Address, Seen]


def show_top(console: Console, at: str | None, once: bool) -> None:
    """Watches the job at `at`, or the one job of this host, until it ends; on no terminal, or with `once`, one table."""
    watch = Watch(_only_job() if at is None else at)
    try:
        before = watch.look()
        if once or not console.is_terminal:
            time.sleep(EVERY_SECONDS)
            after = watch.look()
            show_table(console, table_of(watch.at, before, after))
            for note in notes(after):
                show_text(console, f"\n{note}")
            return
        with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
            while True:
                time.sleep(EVERY_SECONDS)
                after = watch.look()
                shown = rich_table(table_of(watch.at, before, after))
                live.update(Group(shown, *map(Text, notes(after))), refresh=True)
                before = after
    except JobEnded:
        show_text(console, f"The job at {watch.at} has ended.")


def table_of(at: str, before: Look, after: Look) -> Table:
    """What the roles do, and what they did between two looks."""
    rows = tuple(_row(me, before.get(me), seen, after) for me, seen in after.items())
    return Table(f"The job at {at}", COLUMNS, rows, right=NUMBERS)


def notes(look: Look) -> list[str]:
    """What there is to say below the table."""
    if not look:
        return ["No role has come to its first step yet."]
    return [] if any(seen.numbers for seen in look.values()) else [HOW_TO_KNOW]


def _only_job() -> str:
    jobs = announced()
    if len(jobs) == 1:
        return jobs[0].store
    listed = ", ".join(f"{job.store} ({job.script})" for job in jobs) or "none"
    raise RequestError(
        f"--at: found {len(jobs)} jobs of yours on this host, expected one: {listed}. Say which: --at HOST:PORT."
    )


def _row(me: Address, before: Seen | None, now: Seen, look: Look) -> tuple[str, ...]:
    beat, numbers = now.beat, now.numbers
    step = beat.step if numbers is None else max(beat.step, int(numbers.steps))
    row = (str(me), str(step), _steps_per_second(before, now), _lag(me, look))
    if numbers is None:
        return (*row, *[UNKNOWN] * 6, state(beat))
    then = before.numbers if before is not None else None
    rates = [UNKNOWN] * 4
    if before is not None and then is not None:
        seconds = now.seconds - before.seconds
        kinds = (("pushes", 1.0), ("pulls", 1.0), ("received_nbytes", 1e6), ("sent_nbytes", 1e6))
        rates = [f"{(getattr(numbers, n) - getattr(then, n)) / unit / seconds:.1f}" for n, unit in kinds]
    return (*row, *rates, f"{numbers.dropped:.0f}", ", ".join(numbers.waiting) or UNKNOWN, state(beat))


def _steps_per_second(before: Seen | None, now: Seen) -> str:
    """By the role's own count where there is one, else by its beats and its host's clock."""
    if before is None:
        return UNKNOWN
    if before.numbers is not None and now.numbers is not None:
        steps, seconds = now.numbers.steps - before.numbers.steps, now.seconds - before.seconds
    else:
        steps, seconds = now.beat.step - before.beat.step, now.beat.seconds - before.beat.seconds
    return f"{steps / seconds:.1f}" if seconds > 0 else UNKNOWN


def _lag(me: Address, look: Look) -> str:
    """By the pushes that came to servers; without servers trainers go in step."""
    if me.kind is not Kind.TRAINER:
        return UNKNOWN
    known = [seen.numbers.lags[str(me)] for seen in look.values() if seen.numbers and str(me) in seen.numbers.lags]
    if known:
        return str(max(known))
    steps = [seen.beat.step for peer, seen in look.items() if peer.kind is Kind.TRAINER]
    return str(max(steps) - look[me].beat.step)


def state(beat: Beat) -> str:
    """`capturing the step for 12 s`, `silent for 8 s, last at pull w`, or what it does: `pull w`, `between steps`."""
    silent = time.time() - beat.seconds
    if beat.ended:
        return "ended"
    if silent > SILENT_SECONDS:
        return f"silent for {silent:.0f} s, last at {beat.node}"
    if beat.busy:
        return f"{beat.busy} for {beat.busy_seconds:.0f} s"
    return beat.node
