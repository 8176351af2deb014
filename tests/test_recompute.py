"""Activations computed again within a budget, and those that the user's own `torch.utils.checkpoint` computes again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import syncwright
from syncwright import AllReduce, ParameterServer, Rules, Shard
from syncwright.errors import LoweringError, PlanError
from syncwright.held import most_at_once
from syncwright.lower import lower
from syncwright.passes import COMPILED
from syncwright.planning import make_plan
from syncwright.regions import turn
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.segments import Segment, cut

WIDTH, BLOCKS, LENGTH = 32, 2, 64
GIB = 2**30
PLANS = {
    "all_reduce": Rules(AllReduce()),
    "zero1": Rules(Shard(1)),
    "zero3": Rules(Shard(3, bucket_mb=0.05)),
    "servers": Rules(ParameterServer()),
    "a mixture": Rules.of(Shard(3), {"0.*": ParameterServer(), "*.bias": AllReduce()}),
}


class Block(nn.Module):
    """Attention of one head, and two layers between which there are four times as many numbers."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.dropout(self.out(torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # type: ignore[return-value]


def blocks(checkpointed: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    made = [Block(dropout) for _ in range(BLOCKS)]
    return nn.Sequential(*[Checkpointed(each) if checkpointed else each for each in made])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def trained(rules: Rules, model: nn.Module, steps: int = 2) -> tuple[Loopback, list[torch.Tensor]]:
    """A job after some steps, and everything that these have made."""
    servers = 1 if any(isinstance(sync, ParameterServer) for _, sync in (("", rules.default), *rules.patterns)) else 0
    optimizer = torch.optim.AdamW(model.parameters())
    job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=servers)
    torch.manual_seed(1)
    x = torch.randn(16, LENGTH, WIDTH)
    losses = [job.step([(x[:8],), (x[8:],)]) for _ in range(steps)]
    return job, [*losses, *job.state_dict()["model"].values()]  # type: ignore[list-item, attr-defined]


def most(job: Loopback) -> int:
    assert job.job is not None
    return most_at_once(job.job.trainer["step"])


def within(rules: Rules, nbytes: int) -> Rules:
    return Rules(rules.default, rules.patterns, memory_gb=nbytes / GIB)


def products(job: Loopback) -> int:
    """How many matrix products a step computes."""
    assert job.job is not None
    targets = Counter(node.target for node in job.job.trainer["step"].graph.nodes)
    return targets[torch.ops.aten.addmm.default] + targets[torch.ops.aten.bmm.default]


@pytest.mark.parametrize("name", PLANS)
def test_a_step_holds_no_more_and_gives_the_same_bits(name: str):
    free, expected = trained(PLANS[name], blocks())
    budget = int(0.7 * most(free))
    job, found = trained(within(PLANS[name], budget), blocks())
    assert most(job) <= budget
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_takes_least_is_computed_again_first():
    """Norms and activation functions; where these are not enough, matrix products too."""
    free, _ = trained(PLANS["all_reduce"], blocks(), steps=1)
    little, _ = trained(within(PLANS["all_reduce"], int(0.85 * most(free))), blocks(), steps=1)
    much, _ = trained(within(PLANS["all_reduce"], int(0.6 * most(free))), blocks(), steps=1)
    assert products(free) == products(little) < products(much)


def test_what_is_drawn_is_kept():
    """Dropout's masks are not drawn again: results are those without a budget."""
    free, expected = trained(PLANS["all_reduce"], blocks(dropout=0.5))
    job, found = trained(within(PLANS["all_reduce"], int(0.75 * most(free))), blocks(dropout=0.5))
    assert most(job) <= 0.75 * most(free)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_it_costs_no_more_than_checkpoints_of_every_block():
    by_hand, expected = trained(PLANS["all_reduce"], blocks(checkpointed=True), steps=1)
    job, found = trained(within(PLANS["all_reduce"], most(by_hand)), blocks(), steps=1)
    assert most(job) <= most(by_hand)
    assert products(job) <= products(by_hand)
    assert torch.equal(found[0], expected[0])


def test_the_users_own_checkpoints_are_kept():
    """Also by the passes of compiled programs: what is computed twice is not joined again."""
    free, expected = trained(PLANS["all_reduce"], blocks())
    job, found = trained(PLANS["all_reduce"], blocks(checkpointed=True))
    assert most(job) < 0.8 * most(free)
    assert products(job) > products(free)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model = blocks(checkpointed=True)
    program = syncwright.capture(step, model, torch.optim.AdamW(model.parameters()), torch.randn(8, LENGTH, WIDTH))
    compiled = lower(program, make_plan("all_reduce", program, 2, 0), passes=COMPILED).trainer["step"]
    assert sum(n.target is torch.ops.aten.gelu.default for n in compiled.graph.nodes) == 2 * BLOCKS


def test_a_budget_that_cannot_be_met_says_what_can():
    free, _ = trained(PLANS["all_reduce"], blocks(), steps=1)
    with pytest.raises(
        LoweringError, match=r"memory_gb: found 0\.0005, but a trainer holds 0\.00\d+ GiB at once where all"
    ):
        trained(Rules(AllReduce(), memory_gb=0.0005), blocks())
    assert most(free) > 0.001 * GIB


def test_a_budget_is_more_than_nothing():
    with pytest.raises(PlanError, match="memory_gb"):
        Rules(AllReduce(), memory_gb=0.0)
    rules = Rules.from_yaml("default: all_reduce\nmemory_gb: 2.5\n")
    assert rules.memory_gb == 2.5
    assert Rules.from_yaml(rules.to_yaml()) == rules


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
def test_compiled_it_gives_what_it_gives_without_a_budget():
    found = []
    for budget in (None, 0.0002):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Tanh(), nn.Linear(64, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rules = Rules(AllReduce(), memory_gb=budget)
        with syncwright.distribute(step, model, optimizer, plan=rules, compile=True) as trainer:
            losses = [trainer.step(torch.randn(256, 4)) for _ in range(2)]
            assert budget is None or most_at_once(trainer.job.trainer["step"]) <= budget * GIB
        found.append([*losses, *(p.detach() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_short_forward_is_compiled_apart_from_what_computes_it_again():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Tanh(), nn.Linear(64, 1))
    for model, apart in ((plain, False), (Checkpointed(plain), True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        program = syncwright.capture(step, model, optimizer, torch.randn(256, 4))
        lowered = lower(program, make_plan("all_reduce", program, 1, 0), passes=COMPILED).trainer["step"]
        first = next(item for item in cut(lowered).items if isinstance(item, Segment))
        assert (turn(lowered) not in first.nodes) == apart
