"""Ray's parameter server pattern: actors that keep variables, actors that compute gradients, arrays in its object store.

The one rank is the script that passes references on; it holds no array itself.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.contestants import Running, Seat
from bench.server_models import Shelf
from bench.server_workloads import Training, Transfer, shares

Workload = Transfer | Training


class Keeper:
    """A server's variables. Changes with every push."""

    def __init__(self, workload: Workload, servers: int, server: int) -> None:
        quiet()
        parameters = list(workload.model().parameters())
        kept = shares([parameter.numel() for parameter in parameters], servers)[server]
        self.shelf = Shelf(parameters, kept, workload.optimizer_of)

    def push(self, *contributions: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.shelf.push([list(map(tensor, gradients)) for gradients in contributions])
        return self.values()

    def values(self) -> list[np.ndarray]:
        return [value.numpy() for value in self.shelf.values()]


class Learner:
    """A trainer. Changes: the batches are used in turn."""

    def __init__(self, workload: Workload, servers: int, rank: int) -> None:
        quiet()
        self.learn = workload.learner(rank)
        counts = [parameter.numel() for parameter in workload.model().parameters()]
        self.kept = shares(counts, servers)

    def gradients(self, *values: Sequence[np.ndarray]) -> tuple:
        """From what every server gave: the loss, and what each server gets."""
        by_place = {
            place: tensor(value)
            for places, found in zip(self.kept, values, strict=True)
            for place, value in zip(places, found, strict=True)
        }
        loss, gradients = self.learn([by_place[place] for place in range(len(by_place))])
        return loss, *([gradients[place].numpy() for place in places] for places in self.kept)


def tensor(array: np.ndarray) -> torch.Tensor:
    """Without a copy."""
    return torch.from_numpy(array)


def quiet() -> None:
    """One thread; and Ray's arrays cannot be written, which nobody here does."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(slots=True)
class Pattern:
    """The two loops of Ray's example. Changes: holds the references to the newest values.

    keepers, learners  actors
    newest             of each server, what it answered last
    """

    keepers: list
    learners: list
    newest: list

    def compute(self, learner: object) -> list:
        """References: the loss, and what each server gets."""
        return learner.gradients.options(num_returns=1 + len(self.keepers)).remote(*self.newest)

    def sync(self, steps: int) -> list:
        """All trainers compute from the same values, servers take the mean. The last step's losses."""
        for _ in range(steps):
            computed = [self.compute(learner) for learner in self.learners]
            self.newest = [
                keeper.push.remote(*(found[1 + server] for found in computed))
                for server, keeper in enumerate(self.keepers)
            ]
        return [found[0] for found in computed]

    def asynchronous(self, steps: int) -> list:
        """Each trainer's gradients are taken as they come, and it goes on from what the servers then have."""
        import ray

        left = steps * len(self.learners)
        running = {}
        last = []
        for learner in self.learners:
            found = self.compute(learner)
            running[found[0]] = (learner, found)
            left -= 1
        while running:
            (ready, *_), _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            learner, found = running.pop(ready)
            last = [*last, found[0]][-len(self.learners) :]
            self.newest = [keeper.push.remote(found[1 + server]) for server, keeper in enumerate(self.keepers)]
            if left:
                again = self.compute(learner)
                running[again[0]] = (learner, again)
                left -= 1
        return last


def start(workload: Workload, seat: Seat, mode: str, trainers: int, servers: int) -> Running:
    ray = begin(seat, trainers + servers)
    keepers = [ray.remote(num_cpus=1)(Keeper).remote(workload, servers, server) for server in range(servers)]
    learners = [ray.remote(num_cpus=1)(Learner).remote(workload, servers, rank) for rank in range(trainers)]
    pattern = Pattern(keepers, learners, [keeper.values.remote() for keeper in keepers])
    loop = pattern.sync if mode == "sync" else pattern.asynchronous

    def finish(losses: list) -> float:
        ray.wait(pattern.newest, num_returns=len(keepers), fetch_local=False)
        return float(np.mean(ray.get(losses)))

    def block(steps: int, batches: Iterator[tuple]) -> None:
        finish(loop(steps))

    return Running(lambda: finish(loop(1)), ray.shutdown, itertools.repeat(()), block)


def begin(seat: Seat, processes: int):
    """Ray on this host alone: no dashboard, no report of its use."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DEDUP_LOGS"] = "0"
    import ray

    ray.init(
        num_cpus=processes,
        include_dashboard=False,
        object_store_memory=2 * 2**30,
        _memory=2**30,  # said, not found out: it is only counted, and others may use the machine's now
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(Path(seat.store).parent / f"r{os.getpid()}"),  # short: sockets have their names there
    )
    return ray
