"""What `show --memory` says, against what roles hold."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Rules, Shard
from syncwright.held import most_at_once
from syncwright.plan.compression import Cast, ErrorFeedback
from syncwright.runtime.loopback import Loopback
from syncwright.text import parse
from syncwright.view.memory import Memory, memory_of

BATCH = 16
PLANS = {
    "all_reduce": Rules(AllReduce()),
    "residuals": Rules(AllReduce(compress=ErrorFeedback(Cast("bfloat16")))),
    "zero1": Rules(Shard(1)),
    "zero3": Rules(Shard(3)),
    "a mixture": Rules.of(Shard(3), {"0.*": ParameterServer(), "2.weight": AllReduce()}),
    "alone": Rules(LocalSteps(2)),
}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def job_of(plan: Rules, make: Callable = torch.optim.AdamW, trainers: int = 2, steps: int = 3) -> Loopback:
    net = model()
    job = syncwright.loopback(step, net, make(net.parameters()), plan=plan, trainers=trainers, servers=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        job.step([(torch.randn(BATCH, 30, generator=generator),) for _ in range(trainers)])
    return job


def said(job: Loopback) -> dict[str, Memory]:
    return memory_of(job.session.programs().latest.captured.program, job.job)  # type: ignore[union-attr, arg-type]


def nbytes_of(values: object) -> int:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]  # type: ignore[union-attr]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", PLANS)
def test_what_trainers_hold_between_steps(name):
    job = job_of(PLANS[name])
    memory = said(job)["every trainer"]
    for replica in job.replicas:
        outer = [value for each in replica.outers for value in each._values.values()]
        assert memory.held == nbytes_of([*replica.values.values(), *outer])


def test_what_servers_hold_between_steps():
    job = job_of(PLANS["a mixture"])
    (server,) = job.servers
    assert said(job)["server 0"].held == nbytes_of([server.held(v.name) for v in job.job.servers[0].holds])  # type: ignore[union-attr]


def test_who_keeps_a_matrix_holds_more():
    def muon(parameters) -> torch.optim.Optimizer:
        return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.01)

    net = nn.Sequential(nn.Linear(30, 50, bias=False), nn.Linear(50, 3, bias=False))
    job = syncwright.loopback(step, net, muon(net.parameters()), plan=Rules(Shard(3)), trainers=2)
    job.step([(torch.ones(4, 30),), (torch.ones(4, 30),)])
    found = said(job)
    assert [found[f"trainer {k}"].parameters for k in range(2)] == [30 * 50 * 4, 50 * 3 * 4]
    for replica, memory in zip(job.replicas, found.values(), strict=True):
        assert memory.held == nbytes_of(replica.values.values())


class Watched(TorchDispatchMode):
    """The most bytes that tensors hold behind any operation: those given, and what operations make, while they are there."""

    def __init__(self, given: Iterable[object]) -> None:
        super().__init__()
        self.most = 0
        self._tensors, self._sizes = Counter[int](), {}
        self._note(given)

    def _note(self, found: Iterable[object]) -> None:
        for tensor in found:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._tensors[storage.data_ptr()] += 1
                self._sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(tensor, self._tensors.subtract, [storage.data_ptr()])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self._note(found if isinstance(found, list | tuple) else [found])
        self.most = max(self.most, sum(self._sizes[at] for at, count in self._tensors.items() if count))
        return found


@pytest.mark.parametrize("name", ["all_reduce", "zero1", "zero3"])
def test_the_most_within_a_step(name):
    """One trainer's step, watched: what is said is what there is, to a few numbers of scalars."""
    job = job_of(PLANS[name], trainers=1)
    expected = said(job)["trainer 0"].step
    batch = torch.randn(BATCH, 30)
    with Watched([*job.replicas[0].values.values(), batch]) as watched:
        job.step([(batch,)])
    assert watched.most == pytest.approx(expected, rel=0.05)


def test_a_value_is_there_until_nothing_looks_at_it():
    program = parse(
        """program

input  "x": f32[8]
output "y": f32[8]

%x: f32[8] = read "x"

%a: f32[8] = aten.exp.default(%x)
%v: f32[2,4] = aten.view.default(%a, [2, 4])
%b: f32[8] = aten.neg.default(%x)
%c: f32[2,4] = aten.neg.default(%v)
%d: f32[8] = aten.view.default(%c, [8])
%e: f32[8] = aten.add.Tensor(%d, %b)

write "y" = %e
"""
    )
    assert most_at_once(program) == 32 * 4  # x, %b and %c with %a, then with %e
