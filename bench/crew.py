"""The processes of one contestant, seen from the driver: asked, waited for with a deadline, ended.

    BenchError
    ├── Late         a rank did not answer in time
    ├── Died         a process ended, or raised
    └── Unavailable  the contestant says that it cannot run here

Only processes that `bench/starting.py` started, and those that descend from them, are ever signalled.
"""

from __future__ import annotations

import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench import proc
from bench.wire import Channel


class BenchError(Exception):
    """A contestant could not be measured; the message names it."""


class Late(BenchError):
    """A rank did not answer in time."""


class Died(BenchError):
    """A process ended, or raised."""


class Unavailable(BenchError):
    """The contestant says that it cannot run here."""


@dataclass(slots=True)
class Child:
    """One process and our end of its socket. Changes with what the process does."""

    label: str  # "ddp rank 1": how errors name it
    process: subprocess.Popen
    channel: Channel
    log: Path


@dataclass(slots=True)
class Crew:
    """All processes of a contestant. Changes while it is started.

    ranks    those that are asked to step
    helpers  its further processes, in the contestant's order
    network  the process that holds the network of their own; None: they share the machine's
    """

    ranks: list[Child] = field(default_factory=list)
    helpers: list[Child] = field(default_factory=list)
    network: Child | None = None

    def __bool__(self) -> bool:
        return bool(self.ranks or self.helpers or self.network)


# --- asking and waiting --------------------------------------------------------------------------------


def begin(crew: Crew, seconds: float) -> list[dict]:
    """Everyone has imported and begins; the ranks' answers when they have run their first step."""
    wait([*crew.ranks, *crew.helpers], "imported", seconds)
    for child in crew.helpers:
        child.channel.send({"ask": "begin"})
    return ask(crew.ranks, {"ask": "begin"}, seconds, crew.helpers)


def ask(ranks: Sequence[Child], request: dict, seconds: float, watched: Sequence[Child] = ()) -> list[dict]:
    """The same request to all ranks at once; their answers in rank order.

    Raises Late, Died or Unavailable, as soon as one of them gives cause, or one of `watched`, who do not answer.
    """
    for child in ranks:
        try:
            child.channel.send(request)
        except (BrokenPipeError, ConnectionResetError):
            raise dead(child, request["ask"]) from None
    return wait(ranks, request["ask"], seconds, watched)


def wait(ranks: Sequence[Child], expected: str, seconds: float, watched: Sequence[Child] = ()) -> list[dict]:
    """One answer of the kind `expected` from every rank."""
    deadline = time.monotonic() + seconds
    answers: dict[str, dict] = {}
    with selectors.DefaultSelector() as selector:
        for child in [*ranks, *watched]:
            selector.register(child.channel.end, selectors.EVENT_READ, child)
        while len(answers) < len(ranks):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise late(ranks, answers, expected, seconds)
            for key, _ in ready:
                child, message = key.data, key.data.channel.receive()
                selector.unregister(child.channel.end)
                if message is None and child in watched and ended_well(child):
                    continue  # a server without anything to keep
                answers[child.label] = checked(child, message, expected)
    return [answers[child.label] for child in ranks]


def checked(child: Child, message: dict | None, expected: str) -> dict:
    if message is None:
        raise dead(child, expected)
    if message["answer"] == "not available":
        raise Unavailable(message["reason"])
    if message["answer"] == "failed":
        raise Died(f"{child.label} failed at {expected!r}: {message['reason']}")
    if message["answer"] != expected:
        raise Died(f"{child.label} answered {message['answer']!r}, expected {expected!r}")
    return message


def ended_well(child: Child) -> bool:
    return gone([child], 5.0) and child.process.returncode == 0


def late(ranks: Sequence[Child], answers: dict[str, dict], expected: str, seconds: float) -> Late:
    missing = ", ".join(child.label for child in ranks if child.label not in answers)
    return Late(f"{missing}: no answer to {expected!r} within {seconds:.0f} s")


def dead(child: Child, at: str) -> Died:
    try:
        status = child.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        status = "unknown"
    last = " | ".join(child.log.read_text(errors="replace").strip().splitlines()[-5:])
    return Died(f"{child.label} ended with status {status} at {at!r}; it last wrote: {last or 'nothing'}")


# --- what they use ---------------------------------------------------------------------------------------


def peaks_mb(crew: Crew) -> dict[str, float]:
    """Peak MiB by process: ranks and helpers by their labels, and who descends from them by its program and number."""
    known = {child.process.pid: child.label for child in [*crew.ranks, *crew.helpers]}
    others = {process.pid: f"{process.name()} {process.pid}" for process in proc.descendants(known)}
    found = {}
    for pid, label in {**known, **others}.items():
        with suppress(ProcessLookupError):  # a descendant may come and go
            found[label] = proc.peak_mb(pid)
    return found


def sent_bytes(crew: Crew) -> int:
    """Bytes over the loopback that the crew sees: its own, where it has a network."""
    return proc.loopback_bytes(crew.ranks[0].process.pid)


# --- stopping for others -----------------------------------------------------------------------------------


def stop(crew: Crew) -> None:
    """Nobody of the crew, and nobody who descends from it, runs until `go_on`."""
    signal_all(crew, signal.SIGSTOP)


def go_on(crew: Crew) -> None:
    """After `stop`, or without it."""
    signal_all(crew, signal.SIGCONT)


def signal_all(crew: Crew, number: signal.Signals) -> None:
    children = [child.process for child in [*crew.ranks, *crew.helpers]]
    others = proc.descendants(process.pid for process in children)
    for process in [*children, *others]:
        with suppress(psutil.NoSuchProcess):  # a descendant may come and go
            process.send_signal(number)


# --- ending ----------------------------------------------------------------------------------------------


def end(*crews: Crew, patience: float = 15.0) -> None:
    """Close the ranks, then the helpers, then the networks; terminate and kill who stays. Returns when all are gone."""
    for crew in crews:
        go_on(crew)
    ranks = [child for crew in crews for child in crew.ranks]
    helpers = [child for crew in crews for child in crew.helpers]
    others = proc.descendants(child.process.pid for child in [*ranks, *helpers])
    end_all(ranks, patience)
    end_all(helpers, min(patience, 5.0))
    end_all([crew.network for crew in crews if crew.network], 5.0)
    end_others(others)


def end_all(children: Sequence[Child], patience: float) -> None:
    for child in children:
        try:
            child.channel.send({"ask": "close"})
        except OSError:
            continue  # already gone
    if not gone(children, patience):
        for child in children:
            child.process.terminate()
    if not gone(children, 5.0):
        for child in children:
            child.process.kill()
        gone(children, 30.0)
    for child in children:
        child.channel.end.close()


def end_others(others: Sequence[psutil.Process]) -> None:
    """Who descends from a process that has ended, and is still there."""
    _, alive = psutil.wait_procs(others, timeout=5.0)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10.0)


def gone(children: Sequence[Child], seconds: float) -> bool:
    """Whether all processes ended within that time (in total, not each)."""
    deadline = time.monotonic() + seconds
    for child in children:
        try:
            child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True
