"""Trainers that train alone between exchanges: against a simulation of all trainers in plain PyTorch, by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import LocalSteps, Rules
from syncwright.plan import Optimizer
from syncwright.runtime.loopback import Loopback

DILOCO = Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True)
Batch = tuple[torch.Tensor, torch.Tensor]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
INNER: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def model_of(inner: str = "momentum") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, INNER[inner](list(model.parameters()))


def batches(parts: Sequence[int], steps: int) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [[(draw(n, 3), draw(n, 1)) for n in parts] for _ in range(steps)]


class Simulation:
    """Plain PyTorch: a model for each trainer, exchanged by hand. Changes with every step.

    outer  makes the outer optimizer over base; None: the mean
    """

    def __init__(
        self, trainers: int, every: int, start: int = 0, inner: str = "momentum", outer: Make | None = None
    ) -> None:
        self.every, self.start, self.inner, self.outer = every, start, inner, outer
        made = [model_of(inner) for _ in range(trainers)]
        self.models, self.optimizers = [m for m, _ in made], [o for _, o in made]
        self.steps = 0
        self._begin()

    def _begin(self) -> None:
        self.base = [nn.Parameter(p.detach().clone()) for p in self.models[0].parameters()]
        self.outer_optimizer = self.outer(self.base) if self.outer else None
        self.examples, self.alone = [0] * len(self.models), 0

    def step(self, parts: Sequence[Batch]) -> None:
        if self.steps < self.start:
            self._together(parts)
        else:
            for k, (x, y) in enumerate(parts):
                if len(x):
                    step(self.models[k], self.optimizers[k], x, y)
                self.examples[k] += len(x)
            self.alone += 1
            if self.alone == self.every:
                self.exchange()
        self.steps += 1

    def _together(self, parts: Sequence[Batch]) -> None:
        total = sum(len(x) for x, _ in parts)
        shares = []
        for model, (x, y) in zip(self.models, parts, strict=True):
            loss = (
                ((model(x) - y) ** 2).mean() * (len(x) / total)
                if len(x)
                else 0 * sum(p.sum() for p in model.parameters())
            )
            shares.append(torch.autograd.grad(loss, list(model.parameters())))
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            for p, *each in zip(model.parameters(), *shares, strict=True):
                p.grad = torch.stack(each).sum(0)
            optimizer.step()
        self._begin()

    @torch.no_grad()
    def exchange(self) -> None:
        """base - mean(latest) is the gradient of the outer optimizer; the mean of deltas is added without one."""
        if self.alone == 0:
            return
        total = sum(self.examples)
        for index, base in enumerate(self.base):
            latest = [list(model.parameters())[index] for model in self.models]
            mean = sum((n / total) * (value - base) for n, value in zip(self.examples, latest, strict=True))
            base.grad = -mean
        if self.outer_optimizer is not None:
            self.outer_optimizer.step()
        else:
            for base in self.base:
                base -= base.grad
        for model in self.models:
            for p, base in zip(model.parameters(), self.base, strict=True):
                p.copy_(base)
        self.examples, self.alone = [0] * len(self.models), 0


def run(simulation: Simulation, sync: LocalSteps, parts: Sequence[int], steps: int) -> Loopback:
    """The job, compared with the simulation after every step and after the end."""
    model, optimizer = model_of(simulation.inner)
    job = syncwright.loopback(
        step, model, optimizer, plan=Rules(sync), trainers=len(parts), check_replicas=len(parts) > 1
    )
    names = [name for name, _ in model.named_parameters()]
    for each in batches(parts, steps):
        job.step(each)
        simulation.step(each)
        for replica, its in zip(job.replicas, simulation.models, strict=True):
            for name, expected in its.named_parameters():
                close(replica.values[name], expected)
        found = job.state_dict()["model"]
        for name, expected in zip(names, simulation.base, strict=True):
            close(found[name], expected)  # type: ignore[index]
    job.leave()
    simulation.exchange()
    job.sync()
    for p, expected in zip(model.parameters(), simulation.base, strict=True):
        close(p, expected)
    return job


def close(found: object, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("parts", [(2, 2), (4, 2, 1), (2, 0)])
def test_local_sgd(inner, parts):
    run(Simulation(len(parts), 3, inner=inner), LocalSteps(3), parts, 7)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("parts", [(2, 2), (4, 2, 1), (3,)])
def test_diloco_is_nesterov_on_what_all_have_gone(inner, parts):
    def outer(base: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(base, lr=0.7, momentum=0.9, nesterov=True)

    run(Simulation(len(parts), 3, inner=inner, outer=outer), LocalSteps(3, DILOCO), parts, 8)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    every=st.integers(1, 4),
    start=st.integers(0, 3),
    parts=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
    inner=st.sampled_from(list(INNER)),
    outer=st.sampled_from([None, "nesterov", "adam"]),
)
def test_any_clock(every, start, parts, inner, outer):
    made: dict[str, tuple[Optimizer, Make]] = {
        "nesterov": (DILOCO, lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
        "adam": (Optimizer.of("Adam", lr=0.02, betas=(0.8, 0.9)), lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.9))),
    }
    sync = LocalSteps(every, made[outer][0], start) if outer else LocalSteps(every, start=start)
    run(Simulation(len(parts), every, start, inner, made[outer][1] if outer else None), sync, parts, 7)
