"""Syncwright with servers in processes of their own, through its public names only, as `syncwright run` starts it."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch

from bench.contestants import NotAvailable, Running, Seat
from bench.contestants.alone import whole_batches
from bench.contestants.ours import step
from bench.workloads import Workload

LOOPBACK, ANOTHER_HOST = "127.0.0.1", "0.0.0.0"  # the second reaches the same place, and does not say so


def start(
    workload: Workload,
    seat: Seat,
    plan: str,
    compile: bool | str,
    model: Mapping[str, object] | None = None,
    shard: bool = True,
    tcp: bool = False,
) -> Running:
    """
    plan     a strategy's name, or rules in YAML
    model    arguments of the workload's model
    shard    batches come from `trainer.shard`, which is given the batches of all trainers together
    tcp      roles talk over TCP as if they were on different hosts, so that a loopback can count their bytes
    """
    trainer = joined(workload, seat, plan, compile, model, tcp)
    batches = None
    if shard:
        batches = trainer.shard(itertools.cycle(whole_batches(workload, seat.processes)))
    return Running(refusing(trainer.step), trainer.close, batches)


def serve(
    workload: Workload,
    seat: Seat,
    plan: str,
    compile: bool | str,
    model: Mapping[str, object] | None = None,
    shard: bool = True,
    tcp: bool = False,
) -> None:
    """The store that a launcher keeps for its roles, or a server: the same script up to its first step."""
    if seat.role == "store":
        keep_store(seat)
    trainer = joined(workload, seat, plan, compile, model, tcp)
    refusing(trainer.step)(*workload.batches(0)[0])


def joined(workload: Workload, seat: Seat, plan: str, compile: bool | str, model: Mapping | None, tcp: bool):
    """The job's `Trainer` in this process."""
    os.environ.update(variables(seat, tcp))
    try:
        from syncwright import distribute
    except ImportError as error:
        raise NotAvailable(f"ImportError: {error.msg}") from error
    module = workload.model(**(model or {}))
    return refusing(distribute)(step, module, workload.optimizer(module, False), plan=rules(plan), compile=compile)


def variables(seat: Seat, tcp: bool) -> dict[str, str]:
    """What `syncwright run` tells a role."""
    sockets = Path(f"{seat.store}-s")
    sockets.mkdir(exist_ok=True)
    return {
        "SYNCWRIGHT_ROLE": "trainer" if seat.role == "rank" else "server",
        "SYNCWRIGHT_RANK": str(seat.rank),
        "SYNCWRIGHT_TRAINERS": str(seat.processes),
        "SYNCWRIGHT_SERVERS": str(seat.count("server")),
        "SYNCWRIGHT_STORE": f"{ANOTHER_HOST if tcp else LOOPBACK}:{seat.ports[-1]}",
        "SYNCWRIGHT_HOST": LOOPBACK,
        "SYNCWRIGHT_SOCKETS": str(sockets),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(seat.ports[-1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def rules(plan: str) -> object:
    """A strategy's name as it is; anything longer is rules in YAML."""
    if "\n" not in plan and ":" not in plan:
        return plan
    from syncwright import Rules

    return refusing(Rules.from_yaml)(plan)


def refusing(function: Callable) -> Callable:
    """`function`, where a plan that Syncwright refuses is one that cannot run here, with its reason."""
    from syncwright import errors

    def call(*arguments: object, **named: object) -> object:
        try:
            return function(*arguments, **named)
        except (errors.CaptureError, errors.PlanError, errors.LoweringError, errors.ProgramError) as error:
            raise NotAvailable(f"{type(error).__name__}: {error}") from error

    return call


def keep_store(seat: Seat) -> None:
    """Listens until the process is ended."""
    store = torch.distributed.TCPStore(
        LOOPBACK, seat.ports[-1], is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1)
    )
    threading.Event().wait()
    del store
