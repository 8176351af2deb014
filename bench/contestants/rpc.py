"""A parameter server over torch.distributed.rpc: one call pushes the gradients and brings the new values."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed import rpc
from torch.futures import Future

from bench.contestants import Running, Seat
from bench.server_models import Shelf
from bench.server_workloads import Training, Transfer, shares

Workload = Transfer | Training


@dataclass(slots=True)
class Keeper:
    """A server's variables and who waits for them. Changes with every push.

    together  how many pushes make an update: all trainers' where training is synchronous, otherwise one
    """

    shelf: Shelf
    together: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    pushed: list[Sequence[torch.Tensor]] = field(default_factory=list)
    waiting: list[Future] = field(default_factory=list)

    def push(self, gradients: Sequence[torch.Tensor]) -> Future:
        answer: Future = Future()
        with self.lock:
            self.pushed.append(gradients)
            self.waiting.append(answer)
            if len(self.pushed) < self.together:
                return answer
            values = self.shelf.push(self.pushed)
            if self.together == 1:
                values = [value.clone() for value in values]  # the next push may come while these are being sent
            for waiting in self.waiting:
                waiting.set_result(values)
            self.pushed, self.waiting = [], []
        return answer


_KEEPERS: list[Keeper] = []  # of this process; remote calls find it by no other way


@rpc.functions.async_execution
def push(gradients: list[torch.Tensor]) -> Future:
    return _KEEPERS[0].push(gradients)


def values() -> list[torch.Tensor]:
    return _KEEPERS[0].shelf.values()


def meet(seat: Seat, name: str, rank: int, tcp: bool) -> None:
    """tcp: through sockets only; otherwise through the memory of the host, too, as RPC chooses."""
    only_tcp = {"_transports": ["uv"], "_channels": ["basic"]} if tcp else {}
    rpc.init_rpc(
        name,
        rank=rank,
        world_size=seat.processes + seat.count("server"),
        rpc_backend_options=rpc.TensorPipeRpcBackendOptions(
            init_method=f"tcp://127.0.0.1:{seat.ports[-1]}",
            num_worker_threads=2 * seat.processes,
            rpc_timeout=600,
            **only_tcp,
        ),
    )


def kept_by(workload: Workload, servers: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    parameters = list(workload.model().parameters())
    return parameters, shares([parameter.numel() for parameter in parameters], servers)


def start(workload: Workload, seat: Seat, mode: str, tcp: bool = False) -> Running:
    servers = [f"server{server}" for server in range(seat.count("server"))]
    parameters, kept = kept_by(workload, len(servers))
    learn = workload.learner(seat.rank)
    meet(seat, f"trainer{seat.rank}", seat.rank, tcp)

    def placed(answers: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        by_place = {
            place: value
            for places, found in zip(kept, answers, strict=True)
            for place, value in zip(places, found, strict=True)
        }
        return [by_place[place] for place in range(len(parameters))]

    latest = placed([rpc.rpc_sync(server, values) for server in servers])

    def step(*batch: object) -> float:
        nonlocal latest
        loss, gradients = learn(latest)
        calls = [
            rpc.rpc_async(server, push, ([gradients[place] for place in places],))
            for server, places in zip(servers, kept, strict=True)
        ]
        latest = placed([call.wait() for call in calls])
        return loss

    return Running(step, rpc.shutdown)


def serve(workload: Workload, seat: Seat, mode: str, tcp: bool = False) -> None:
    parameters, kept = kept_by(workload, seat.count("server"))
    shelf = Shelf(parameters, kept[seat.rank], workload.optimizer_of)
    _KEEPERS.append(Keeper(shelf, seat.processes if mode == "sync" else 1))
    meet(seat, f"server{seat.rank}", seat.processes + seat.rank, tcp)
    rpc.shutdown()
