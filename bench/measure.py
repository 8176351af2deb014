"""How the driver measures: starts in rounds, then blocks of steps in rounds, one contestant at a time.

Between its turns a contestant's processes sleep on a socket, and whose do not are stopped. A contestant that cannot
run or fails is recorded with the reason and left out of what follows; it never stops the others.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import crew, starting
from bench.contestants import Contestant, Kind
from bench.crew import BenchError, Crew, Unavailable
from bench.starting import Work

TRAFFIC_STEPS = 8

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """repeats  timed blocks per contestant
    seconds  what one block should last
    starts   how often every contestant is started (each time with a cold and a warm cache if it compiles)
    warmup   steps before the first block, the first excluded; at least 8
    patience seconds that any one answer may take: a cold compile is the longest
    """

    repeats: int
    seconds: float
    starts: int
    warmup: int
    patience: float


@dataclass(slots=True)
class Measured:
    """What one contestant has shown so far. Changes as rounds go by.

    peaks_mb    of every process, by its label
    step_bytes  over loopback, by all processes together; None: not counted
    curve       the loss of every step of a start of its own
    """

    contestant: Contestant
    status: str = "measured"
    first_step_seconds: dict[str, list[float]] = field(default_factory=lambda: {"cold": [], "warm": []})
    seconds_per_step: list[float] = field(default_factory=list)
    steps_per_block: int = 0
    losses: list[float] = field(default_factory=list)
    peaks_mb: dict[str, float] = field(default_factory=dict)
    step_bytes: float | None = None
    curve: list[float] = field(default_factory=list)
    crew: Crew = field(default_factory=Crew)

    def result(self) -> dict:
        """As the report and the JSON file take it."""
        return {
            "status": self.status,
            "kind": self.contestant.kind.value,
            "processes": self.contestant.processes,
            "minibatches_per_step": self.contestant.minibatches_per_step,
            "first_step_seconds": self.first_step_seconds,
            "seconds_per_step": self.seconds_per_step,
            "steps_per_block": self.steps_per_block,
            "losses": self.losses,
            "loss_reference": self.contestant.loss_reference,
            "peaks_mb": self.peaks_mb,
            "step_bytes": self.step_bytes,
            "curve": self.curve,
        }


def measure(work: Work, contestants: Sequence[Contestant], settings: Settings, say: Say) -> dict[str, dict]:
    """Everything about one workload, by contestant. All processes have ended when this returns or raises."""
    everyone = [Measured(contestant) for contestant in contestants]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        for round_ in range(settings.starts):
            start_round(work, everyone, settings, folder, round_, say)
        for round_ in range(settings.repeats):
            block_round(work.workload, everyone, settings, round_, say)
        attempt_all(everyone, record_memory, say)
        if work.bytes_counted:
            attempt_all(everyone, lambda one: record_traffic(one, work, folder, settings, say), say)
        if work.curve:
            attempt_all(everyone, lambda one: record_curve(one, work, folder, settings), say)
        end_all(everyone)
    except BaseException:
        end_all(everyone, patience=2.0)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {one.contestant.name: one.result() for one in everyone}


def end_all(everyone: Sequence[Measured], patience: float = 15.0) -> None:
    crew.end(*(one.crew for one in everyone), patience=patience)


def bare_memory(workload: str, settings: Settings) -> dict:
    """Peak MiB of a process that only imported torch and built the model; again with Inductor imported."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        child = starting.spawn("bare", "bench.bare", ["--workload", workload], Path(folder), {})
        try:
            (answer,) = crew.wait([child], "bare", settings.patience)
        finally:
            crew.end(Crew([child]))
    return {key: answer[key] for key in ("bare_mb", "with_inductor_mb", "parameters")}


def measure_update(repeats: int, count: int, settings: Settings, say: Say) -> dict:
    """Seconds per optimizer update alone, by name, every repeat; and why a name is missing."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        child = starting.spawn("update", "bench.update", [], Path(folder), {})
        try:
            (prepared,) = crew.wait([child], "prepared", settings.patience)
            seconds: dict[str, list[float]] = {}
            for repeat in range(repeats):
                (answer,) = crew.ask([child], {"ask": "repeat", "count": count}, settings.patience)
                for name, value in answer["seconds"].items():
                    seconds.setdefault(name, []).append(value)
                shown = "  ".join(f"{name} {1e3 * value:.2f}" for name, value in answer["seconds"].items())
                say(f"update repeat {repeat + 1}/{repeats}, ms: {shown}")
        finally:
            crew.end(Crew([child]))
    return {"seconds": seconds, "missing": prepared["missing"]}


# --- rounds --------------------------------------------------------------------------------------------


def attempt_all(
    everyone: Sequence[Measured], act: Callable[[Measured], None], say: Say, seed: int | None = None
) -> None:
    """Let everyone still in the race act, in an order drawn from `seed`; who fails is out."""
    runners = [one for one in everyone if one.status == "measured"]
    if seed is not None:
        random.Random(seed).shuffle(runners)
    for one in runners:
        try:
            act(one)
        except BenchError as error:
            reason = str(error).replace(f"{starting.ROOT}{os.sep}", "")
            one.status = f"{'not available' if isinstance(error, Unavailable) else 'failed'}: {reason}"
            say(f"{one.contestant.name}: {one.status}")
            crew.end(one.crew, patience=1.0)
            one.crew = Crew()


def start_round(
    work: Work, everyone: Sequence[Measured], settings: Settings, folder: Path, round_: int, say: Say
) -> None:
    """Start everyone once more; after the last round the processes stay, warmed up."""
    stays = round_ == settings.starts - 1

    def act(one: Measured) -> None:
        cache = folder / f"cache-{one.contestant.name}-{round_}"
        if one.contestant.compiles:
            begin(one, work, "cold", cache, folder, settings)
            crew.end(one.crew)
        begin(one, work, "warm", cache, folder, settings)
        cold, warm = (times[-1:] for times in one.first_step_seconds.values())
        shown = f"cold {cold[0]:.1f} s, warm {warm[0]:.1f} s" if cold else f"{warm[0]:.1f} s"
        say(f"{work.workload} start {round_ + 1}/{settings.starts}, first step: {one.contestant.name} {shown}")
        if stays:
            warm_up(one, settings)
        else:
            crew.end(one.crew)
        rest(one)

    attempt_all(everyone, act, say, seed=round_)


def begin(one: Measured, work: Work, cache: str, cache_folder: Path, folder: Path, settings: Settings) -> None:
    """New processes up to the end of the first step, timed from when all of them have imported what they need."""
    one.crew = starting.start(one.contestant, work, cache_folder, folder)
    answers = crew.begin(one.crew, settings.patience)
    one.first_step_seconds[cache].append(max(answer["seconds"] for answer in answers))
    one.losses = [global_loss(one.contestant, [answer["loss"] for answer in answers])]


def rest(one: Measured) -> None:
    """Until its next turn it takes nothing from the others."""
    if one.contestant.restless:
        crew.stop(one.crew)


def ask(one: Measured, request: dict, settings: Settings) -> list[dict]:
    return crew.ask(one.crew.ranks, request, settings.patience, one.crew.helpers)


def warm_up(one: Measured, settings: Settings) -> None:
    """Run the untimed steps, complete the first five losses, choose the block's length."""
    answers = ask(one, {"ask": "warm", "steps": settings.warmup}, settings)
    by_step = zip(*(answer["losses"] for answer in answers), strict=True)
    one.losses += [global_loss(one.contestant, ranks) for ranks in by_step]
    slowest = max(answer["seconds"] for answer in answers)
    one.steps_per_block = max(3, round(settings.seconds / slowest))


def global_loss(contestant: Contestant, ranks: Sequence[float]) -> float:
    """The mean over ranks (a no-op for who returns that mean already); rank 0's where ranks train apart."""
    if contestant.kind in (Kind.LIMIT, Kind.APART):
        return ranks[0]
    return statistics.fmean(ranks)


def block_round(workload: str, everyone: Sequence[Measured], settings: Settings, round_: int, say: Say) -> None:
    """One timed block of everyone, in an order of the round's own."""

    def act(one: Measured) -> None:
        crew.go_on(one.crew)
        ask(one, {"ask": "ready"}, settings)
        answers = ask(one, {"ask": "block", "steps": one.steps_per_block}, settings)
        rest(one)
        one.seconds_per_step.append(max(answer["seconds"] for answer in answers) / one.steps_per_block)

    attempt_all(everyone, act, say, seed=round_)
    shown = "  ".join(
        f"{one.contestant.name} {1e3 * one.seconds_per_step[-1]:.1f}" for one in everyone if one.status == "measured"
    )
    say(f"{workload} repeat {round_ + 1}/{settings.repeats}, ms per step: {shown}")


def record_memory(one: Measured) -> None:
    one.peaks_mb = crew.peaks_mb(one.crew)


def record_traffic(one: Measured, work: Work, folder: Path, settings: Settings, say: Say) -> None:
    """Bytes of some steps over the contestant's own loopback, divided by the steps.

    Who sends in other ways (Unix sockets, shared memory) is started anew, with options that send the same over TCP.
    """
    if one.crew.network is None or not one.contestant.counted:
        return
    try:
        if one.contestant.wire is not None:
            start_over_tcp(one, work, folder, settings)
        crew.go_on(one.crew)
        before = crew.sent_bytes(one.crew)
        ask(one, {"ask": "block", "steps": TRAFFIC_STEPS}, settings)
        one.step_bytes = (crew.sent_bytes(one.crew) - before) / TRAFFIC_STEPS
        rest(one)
    except BenchError as error:
        say(f"{one.contestant.name}: its bytes could not be counted: {error}")


def record_curve(one: Measured, work: Work, folder: Path, settings: Settings) -> None:
    """The losses of a new start, from the first step on."""
    crew.end(one.crew)
    known = folder / f"cache-{one.contestant.name}-{settings.starts - 1}"
    one.crew = starting.start(one.contestant, work, known, folder)
    begun = crew.begin(one.crew, settings.patience)
    answers = ask(one, {"ask": "curve", "steps": work.curve - 1}, settings)
    by_step = zip(*(answer["losses"] for answer in answers), strict=True)
    every = [[answer["loss"] for answer in begun], *by_step]
    one.curve = [global_loss(one.contestant, ranks) for ranks in every]
    rest(one)


def start_over_tcp(one: Measured, work: Work, folder: Path, settings: Settings) -> None:
    contestant = one.contestant
    crew.end(one.crew)
    over_tcp = replace(contestant, options={**contestant.options, **(contestant.wire or {})})
    one.crew = starting.start(over_tcp, work, folder / f"cache-{contestant.name}-wire", folder)
    crew.begin(one.crew, settings.patience)
    ask(one, {"ask": "warm", "steps": 8}, settings)
