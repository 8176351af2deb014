"""One process of one contestant. A rank answers the driver's requests, and is asleep between them.

    ask             answer
                    imported                   torch (or what the contestant names) is imported; nothing else is done
    begin           begin: seconds, loss       the first step has ended
    warm: steps     warm: losses, seconds      seconds: the mean of the last steps
    ready           ready                      one untimed step: the caches are ours again
    block: steps    block: seconds             wall seconds of all the steps together
    curve: steps    curve: losses              of every step
    close                                      the process ends

Any other process of a contestant, such as a server, answers "imported", serves from `begin` on, and ends at `close`.
A contestant that cannot run answers {"answer": "not available", "reason"}; one that raises, "failed".
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from types import ModuleType

from bench import namespace
from bench.contestants import NotAvailable, Running, Seat
from bench.wire import Channel


def serve_rank(channel: Channel, module: ModuleType, workload: object, seat: Seat, options: dict) -> None:
    channel.send({"answer": "imported"})
    if channel.receive() != {"ask": "begin"}:
        return
    began = time.perf_counter()
    running = module.start(workload, seat, **options)
    batches = running.batches or itertools.cycle(workload.batches(seat.rank))
    loss = float(running.step(*next(batches)))
    seconds = time.perf_counter() - began
    channel.send({"answer": "begin", "seconds": seconds, "loss": loss})
    while (request := channel.receive()) not in (None, {"ask": "close"}):
        channel.send({"answer": request["ask"], **answer(request, running, batches)})
    if request is not None:  # the driver is alive, so the other ranks close as well
        running.close()


def serve_others(channel: Channel, module: ModuleType, workload: object, seat: Seat, options: dict) -> None:
    """A process that no step runs in; another thread waits for the driver's last word."""
    channel.send({"answer": "imported"})
    if channel.receive() != {"ask": "begin"}:
        return

    def wait_for_close() -> None:
        channel.receive()
        os._exit(0)

    threading.Thread(target=wait_for_close, daemon=True).start()
    module.serve(workload, seat, **options)


def answer(request: dict, running: Running, batches: Iterator[tuple]) -> dict:
    match request["ask"]:
        case "warm":
            return warm(request["steps"], running, batches)
        case "ready":
            float(running.step(*next(batches)))
            return {}
        case "block":
            return {"seconds": block(request["steps"], running, batches)}
        case "curve":
            return {"losses": [float(running.step(*next(batches))) for _ in range(request["steps"])]}
        case other:
            raise AssertionError(f"the driver asked for {other!r}, which no worker knows")


def block(steps: int, running: Running, batches: Iterator[tuple]) -> float:
    """Wall seconds of `steps` steps; reading the last loss waits for whatever is still under way."""
    began = time.perf_counter()
    if running.block is not None:
        running.block(steps, batches)
    else:
        for _ in range(steps):
            loss = running.step(*next(batches))
        float(loss)
    return time.perf_counter() - began


def warm(steps: int, running: Running, batches: Iterator[tuple]) -> dict:
    """At least 8 steps: the losses of the first 4 (`begin` gave one more), the mean time of the last 4."""
    losses = [float(running.step(*next(batches))) for _ in range(steps - 4)]
    return {"losses": losses[:4], "seconds": block(4, running, batches) / 4}


def prepare(given: dict) -> tuple[ModuleType, object]:
    """Imports what the contestant needs before time counts; its module, and the workload."""
    library = importlib.import_module(given["imports"])
    if given["imports"] == "torch":
        library.set_num_threads(1)
    workloads = importlib.import_module(given["workloads"])
    return importlib.import_module(given["module"]), workloads.WORKLOADS[given["workload"]]


def main() -> None:
    namespace.end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument(
        "--given", required=True, help="JSON: module, options, imports, workloads, workload, seat, network"
    )
    arguments = parser.parse_args()
    given = json.loads(arguments.given)
    if given["network"] is not None:
        namespace.enter(given["network"])
    channel = Channel(socket.socket(fileno=arguments.socket))
    seat = Seat(**{key: tuple(value) if isinstance(value, list) else value for key, value in given["seat"].items()})
    serve = serve_rank if seat.role == "rank" else serve_others
    try:
        module, workload = prepare(given)
        serve(channel, module, workload, seat, given["options"])
    except NotAvailable as error:
        channel.send({"answer": "not available", "reason": str(error)})
    except Exception as error:
        traceback.print_exc()
        channel.send({"answer": "failed", "reason": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
