"""Random schedules: whatever arrives when, no push is lost or applied twice, bounds hold, and nobody waits for ever."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.programs import Programs
from syncwright.runtime.replay import Replay

MOST = 4
SYNCS = (
    ParameterServer(),
    ParameterServer(staged=True),
    ParameterServer(mode="async"),
    ParameterServer(mode="async", staleness=0),
    ParameterServer(mode="async", staleness=1),
    ParameterServer(mode="async", staleness=3),
    ParameterServer(mode="async", take=2),
    ParameterServer(mode="async", merge=2),
    ParameterServer(mode="async", merge=3),
)


class Pair(nn.Module):
    """Two weights on two servers. Their gradients are powers of two, one for each trainer and step: sums tell them all."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.v + self.w) * x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


@cache
def captured(sync: ParameterServer, trainers: int) -> Programs:
    """Every schedule of one way of sharing runs the same programs."""
    job = made(sync, trainers)
    job.session.prepared(job.session.part(batch(0, 0)))
    return job.session.programs()


def made(sync: ParameterServer, trainers: int) -> Loopback:
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return syncwright.loopback(step, model, optimizer, plan=Rules(sync), trainers=trainers, servers=2)


def batch(rank: int, number: int) -> tuple:
    return (torch.tensor([2.0 ** (MOST * rank + number)], dtype=torch.float64),)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[ParameterServer, list[int], list[int]]:
    """A way of sharing, how many steps each trainer makes, and whose message arrives next, again and again."""
    sync = draw(st.sampled_from(SYNCS))
    trainers = draw(st.integers(1, 3))
    steps = draw(st.lists(st.integers(1, MOST), min_size=trainers, max_size=trainers))
    return sync, steps, draw(st.lists(st.integers(0, 7), max_size=40))


@settings(max_examples=1000, deadline=None)
@given(jobs())
def test_random_schedules(drawn: tuple[ParameterServer, list[int], list[int]]) -> None:
    sync, steps, order = drawn
    job = made(sync, len(steps))
    job.session.use(captured(sync, len(steps)))
    replay = Replay(job, [[batch(rank, n) for n in range(count)] for rank, count in enumerate(steps)])
    left: set[int] = set()
    while True:
        for rank, count in enumerate(steps):
            if rank not in left and len(replay.returned[rank]) == count:
                left.add(rank)
                job.replicas[rank].client.leave(count)
        check_bound(sync, replay, left)
        possible = [index for _, index in replay.next]
        if not possible:
            break
        replay.deliver(possible[(order.pop() if order else 0) % len(possible)])
    assert [len(returned) for returned in replay.returned] == steps, f"nobody waits for ever: {replay.waits}"
    assert all(server.done for server in job.servers)
    check_applied(sync, job, steps)


def check_bound(sync: ParameterServer, replay: Replay, left: set[int]) -> None:
    """No step has returned to a trainer further ahead than the plan allows."""
    lead = sync.staleness
    live = [len(mine) for rank, mine in enumerate(replay.returned) if rank not in left]
    if lead is not None and live:
        assert max(live) - min(live) <= lead + 1, "one more push than returned steps may be with the server"


def check_applied(sync: ParameterServer, job: Loopback, steps: list[int]) -> None:
    every = sum(2.0 ** (MOST * rank + n) for rank, count in enumerate(steps) for n in range(count))
    for server, name in zip(job.servers, ("v", "w"), strict=True):
        found = -server.held(name).item()
        if sync.in_step:
            means = [[2.0 ** (MOST * r + n) for r, count in enumerate(steps) if n < count] for n in range(max(steps))]
            assert abs(found - sum(sum(each) / len(each) for each in means)) < 1e-9 * every
        elif sync.merge == 1 and sync.take == 1:
            assert found == every, "each push is applied exactly once"
        elif sync.take > 1:
            assert server.step == sum(steps) // sync.take, "each push is in one mean"
            assert found <= every / sync.take
        else:
            assert every / sync.merge <= found <= every, "each gradient is in one mean"
