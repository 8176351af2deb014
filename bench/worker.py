"""One process of one contestant. It answers the driver's requests, and is asleep between them.

    ask             answer
                    imported                   torch is imported; nothing else is done
    begin           begin: seconds, loss       the first step has ended
    warm: steps     warm: losses, seconds      seconds: the mean of the last steps
    ready           ready                      one untimed step: the caches are ours again
    block: steps    block: seconds             wall seconds of all the steps together
    memory          memory: peak_mb
    close                                      the process ends

A contestant that cannot run answers {"answer": "not available", "reason"}; one that raises, "failed".
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import resource
import socket
import time
import traceback

import torch

from bench.contestants import CONTESTANTS, NotAvailable, Running, Seat
from bench.wire import Channel


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MiB (Linux counts ru_maxrss in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(channel: Channel, contestant: str, workload: str, seat: Seat) -> None:
    channel.send({"answer": "imported"})
    if channel.receive() != {"ask": "begin"}:
        return
    began = time.perf_counter()
    running, batches = start(contestant, workload, seat)
    loss = running.step(*next(batches)).item()
    seconds = time.perf_counter() - began
    channel.send({"answer": "begin", "seconds": seconds, "loss": loss})
    while (request := channel.receive()) not in (None, {"ask": "close"}):
        channel.send({"answer": request["ask"], **answer(request, running, batches)})
    if request is not None:  # the driver is alive, so the other ranks close as well
        running.close()


def start(contestant: str, workload: str, seat: Seat) -> tuple[Running, itertools.cycle]:
    from bench.workloads import WORKLOADS

    chosen = CONTESTANTS[contestant]
    module = importlib.import_module(chosen.module)
    running = module.start(WORKLOADS[workload], seat, **chosen.options)
    return running, itertools.cycle(WORKLOADS[workload].batches(seat.rank))


def answer(request: dict, running: Running, batches: itertools.cycle) -> dict:
    match request["ask"]:
        case "warm":
            return warm(request["steps"], running, batches)
        case "ready":
            running.step(*next(batches)).item()
            return {}
        case "block":
            return {"seconds": block(request["steps"], running, batches)}
        case "memory":
            return {"peak_mb": peak_mb()}
        case other:
            raise AssertionError(f"the driver asked for {other!r}, which no worker knows")


def block(steps: int, running: Running, batches: itertools.cycle) -> float:
    """Wall seconds of `steps` steps; reading the last loss waits for whatever is still under way."""
    began = time.perf_counter()
    for _ in range(steps):
        loss = running.step(*next(batches))
    loss.item()
    return time.perf_counter() - began


def warm(steps: int, running: Running, batches: itertools.cycle) -> dict:
    """At least 8 steps: the losses of the first 4 (`begin` gave one more), the mean time of the last 4."""
    losses = [running.step(*next(batches)).item() for _ in range(steps - 4)]
    return {"losses": losses[:4], "seconds": block(4, running, batches) / 4}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--store", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    channel = Channel(socket.socket(fileno=given.socket))
    seat = Seat(given.rank, given.processes, given.store)
    try:
        serve(channel, given.contestant, given.workload, seat)
    except NotAvailable as error:
        channel.send({"answer": "not available", "reason": str(error)})
    except Exception as error:
        traceback.print_exc()
        channel.send({"answer": "failed", "reason": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
