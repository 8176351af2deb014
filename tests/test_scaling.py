"""Loss scaling: a step with torch's GradScaler, on every kind of sharing, against the same step on one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.capture.state import Binding
from syncwright.plan import Shard
from syncwright.runtime.loopback import Loopback

FINITE = (1, 1, 1, 0, 1)
NUMBERS = ((8.0, 1), (8.0, 2), (16.0, 0), (8.0, 0), (8.0, 1))
"""SEMANTICS section 7: scale and count behind every step, from scale 8 with a growth interval of 3."""

SGD: Callable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
ADAMW: Callable = lambda p: torch.optim.AdamW(p, lr=0.01)  # noqa: E731
PLANS: dict[str, tuple[object, int]] = {
    "all_reduce": ("all_reduce", 0),
    "zero1": (Rules(default=Shard(stage=1)), 0),
    "zero2": (Rules(default=Shard(stage=2)), 0),
    "zero3": (Rules(default=Shard(stage=3)), 0),
    "parameter_server": ("parameter_server", 1),
    "parameter_server_partitioned": ("parameter_server_partitioned", 2),
    "a mix": (
        Rules.of(
            AllReduce(),
            {"first.weight": ParameterServer(), "second.weight": Shard(stage=3), "second.bias": ParameterServer()},
        ),
        2,
    ),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def scaler_of(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 8.0, "growth_interval": 3, **options})


def scaled(scaler: torch.amp.GradScaler, clip: bool = False) -> Callable:
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def batches(finite: tuple[int, ...] = FINITE, trainers: int = 2, bad: int = -1) -> list[list[tuple]]:
    """A batch for each trainer, of steps of which some have an infinite target, on one trainer only."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for good in finite:
        parts = [
            (torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(trainers)
        ]
        if not good:
            parts[bad][1][0, 0] = float("inf")
        found.append(parts)
    return found


def job_of(plan: str, scaler, make: Callable = SGD, trainers: int = 2, clip: bool = False, **options) -> Loopback:
    model, (rules, servers) = Net(), PLANS[plan]
    return syncwright.loopback(
        *(scaled(scaler, clip), model, make(model.parameters())),
        plan=rules,
        trainers=trainers,
        servers=servers,
        **options,
    )


def values(job: Loopback) -> dict[str, torch.Tensor]:
    job.sync()
    return {name: torch.as_tensor(value).clone() for name, value in job.binding.values().items()}


def on_one_device(
    scaler, given: list[list[tuple]], make: Callable = SGD, clip: bool = False
) -> dict[str, torch.Tensor]:
    """The same steps on whole batches, in plain PyTorch."""
    model = Net()
    optimizer, step = make(model.parameters()), scaled(scaler, clip)
    for parts in given:
        step(model, optimizer, *(torch.cat(each) for each in zip(*parts, strict=True)))
    binding = Binding(model, optimizer)
    binding.add_scaler(scaler)
    return {name: torch.as_tensor(value).clone() for name, value in binding.values().items()}


@pytest.mark.parametrize("plan", PLANS)
def test_scale_and_count_are_those_of_the_semantics_on_every_trainer(plan: str) -> None:
    scaler = scaler_of()
    job, before = job_of(plan, scaler, check_replicas=True), None
    for finite, parts, numbers in zip(FINITE, batches(), NUMBERS, strict=True):
        before = values(job) if job.replicas else None
        job.step(parts)
        for replica in job.replicas:
            assert (float(replica.values["scaler.scale"]), int(replica.values["scaler.growth_tracker"])) == numbers
        after = values(job)
        assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == numbers
        if before is not None:
            kept = [name for name in after if not name.startswith("scaler.")]
            same = [torch.equal(before[name], after[name]) for name in kept]
            assert not any(same) if finite else all(same), dict(zip(kept, same, strict=True))


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("plan", PLANS)
def test_one_trainer_is_one_device_bit_for_bit(plan: str, make: Callable) -> None:
    """Step counts and the batch's loss scale among them, behind steps that are skipped too."""
    given = batches(trainers=1)
    expected = on_one_device(scaler_of(), given, make, clip=True)
    job = job_of(plan, scaler_of(), make, trainers=1, clip=True)
    for parts in given:
        job.step(parts)
    found = values(job)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("plan", PLANS)
def test_two_trainers_are_one_device(plan: str, clip: bool) -> None:
    expected = on_one_device(scaler_of(), batches(), ADAMW, clip)
    job = job_of(plan, scaler_of(), ADAMW, clip=clip)
    for parts in batches():
        job.step(parts)
    for name, value in values(job).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
