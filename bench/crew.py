"""The processes of one contestant, seen from the driver: started, asked, waited for with a deadline, ended.

    BenchError
    ├── Late         a rank did not answer in time
    ├── Died         a rank's process ended, or raised
    └── Unavailable  the contestant says that it cannot run here

Only processes that this file started are ever signalled, each by its own Popen.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.contestants import Contestant
from bench.wire import Channel

ROOT = Path(__file__).resolve().parent.parent


class BenchError(Exception):
    """A contestant could not be measured; the message names it."""


class Late(BenchError):
    """A rank did not answer in time."""


class Died(BenchError):
    """A rank's process ended, or raised."""


class Unavailable(BenchError):
    """The contestant says that it cannot run here."""


@dataclass(slots=True)
class Child:
    """One process and our end of its socket. Changes with what the process does."""

    label: str  # "ddp rank 1": how errors name it
    process: subprocess.Popen
    channel: Channel
    log: Path


def spawn(label: str, module: str, arguments: list[str], folder: Path, variables: dict[str, str]) -> Child:
    """Start `python -m module --socket N arguments...`; its output goes to a log in `folder`.

    A session of its own: Ctrl-C reaches the driver alone, which then ends everybody in order.
    """
    here, there = socket.socketpair()
    log = folder / f"{label.replace(' ', '-')}-{time.monotonic_ns()}.log"
    with there, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--socket", str(there.fileno()), *arguments],
            cwd=ROOT,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(there.fileno(),),
            start_new_session=True,
        )
    return Child(label, process, Channel(here), log)


def environment(variables: dict[str, str]) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    local = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **one_thread, **local, **variables}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(contestant: Contestant, workload: str, cache: Path, folder: Path) -> list[Child]:
    """All ranks of a contestant; they import torch and wait to be asked to begin."""
    store = folder / f"store-{contestant.name}-{time.monotonic_ns()}"
    port = free_port()
    crew: list[Child] = []
    try:
        for rank in range(contestant.processes):
            crew.append(start_rank(contestant, workload, rank, store, port, cache, folder))
    except BaseException:
        end(crew)
        raise
    return crew


def start_rank(
    contestant: Contestant, workload: str, rank: int, store: Path, port: int, cache: Path, folder: Path
) -> Child:
    count = str(contestant.processes)
    torchrun = {"RANK": str(rank), "WORLD_SIZE": count, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return spawn(
        f"{contestant.name} rank {rank}",
        "bench.worker",
        [
            *("--contestant", contestant.name, "--workload", workload),
            *("--rank", str(rank), "--processes", count, "--store", str(store)),
        ],
        folder,
        {**torchrun, **meeting, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )


# --- asking and waiting --------------------------------------------------------------------------------


def ask(crew: list[Child], request: dict, seconds: float) -> list[dict]:
    """The same request to all ranks at once; their answers in rank order.

    Raises Late, Died or Unavailable, as soon as one rank gives cause.
    """
    for child in crew:
        try:
            child.channel.send(request)
        except (BrokenPipeError, ConnectionResetError):
            raise dead(child, request["ask"]) from None
    return wait(crew, request["ask"], seconds)


def wait(crew: list[Child], expected: str, seconds: float) -> list[dict]:
    """One answer of the kind `expected` from every rank."""
    deadline = time.monotonic() + seconds
    answers: dict[str, dict] = {}
    with selectors.DefaultSelector() as selector:
        for child in crew:
            selector.register(child.channel.end, selectors.EVENT_READ, child)
        while len(answers) < len(crew):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise late(crew, answers, expected, seconds)
            for key, _ in ready:
                child = key.data
                answers[child.label] = checked(child, child.channel.receive(), expected)
                selector.unregister(child.channel.end)
    return [answers[child.label] for child in crew]


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


def late(crew: list[Child], answers: dict[str, dict], expected: str, seconds: float) -> Late:
    missing = ", ".join(child.label for child in crew if child.label not in answers)
    return Late(f"{missing}: no answer to {expected!r} within {seconds:.0f} s")


def dead(child: Child, at: str) -> Died:
    try:
        status = child.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        status = "unknown"
    last = " | ".join(child.log.read_text(errors="replace").strip().splitlines()[-5:])
    return Died(f"{child.label} ended with status {status} at {at!r}; it last wrote: {last or 'nothing'}")


# --- ending --------------------------------------------------------------------------------------------


def end(crew: list[Child], patience: float = 15.0) -> None:
    """Ask every rank to close, then terminate, then kill; returns when all are gone."""
    for child in crew:
        try:
            child.channel.send({"ask": "close"})
        except OSError:
            continue  # already gone
    if not gone(crew, patience):
        for child in crew:
            child.process.terminate()
    if not gone(crew, 5.0):
        for child in crew:
            child.process.kill()
        gone(crew, 30.0)
    for child in crew:
        child.channel.end.close()


def gone(crew: list[Child], seconds: float) -> bool:
    """Whether all processes ended within that time (in total, not each)."""
    deadline = time.monotonic() + seconds
    for child in crew:
        try:
            child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True
