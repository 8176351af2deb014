"""Tables of any ids whose updates are made as contributions come: exact numbers for interleavings that are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.nn import Constant, CountFilter, HashEmbedding
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.replay import Replay

ID = 2**62


class One(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.w = HashEmbedding(1, capacity=8, initial=Constant(1.0), **options)


def step(model: nn.Module, optimizer: object, ids: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The gradient of a row is its slope."""
    optimizer.zero_grad()
    rows = model.w(ids)
    loss = (rows * slope).sum()
    loss.backward()
    optimizer.step()
    return rows.sum()


def started(model: nn.Module, momentum: float = 0.0, **options) -> Loopback:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    rules = Rules(ParameterServer(mode="async", reduce="sum", **options))
    return syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=1)


def batch(slope: float, identity: int = ID) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([identity]), torch.tensor([[slope]])


def row(job: Loopback, identity: int = ID) -> float:
    job.sync()
    table = job.model.w.eval()
    found = table(torch.tensor([identity])).item()
    table.train()
    return found


@pytest.mark.parametrize(("first", "expected"), [(0, 0.922), (1, 0.904)])
def test_each_push_is_applied_on_arrival(first: int, expected: float) -> None:
    """SGD with momentum 0.9, lr 0.1, w=1: pushes 0.2 then 0.4 give 0.922; 0.4 then 0.2 give 0.904."""
    job = started(One(), momentum=0.9, lazy=True)
    replay = Replay(job, [[batch(0.2)], [batch(0.4)]])
    replay.play(
        f"0 pulls w.weight \n 1 pulls w.weight \n {first} pushes w.weight \n {1 - first} pushes w.weight"
    ).drain()
    assert row(job) == pytest.approx(expected, abs=1e-6)


def test_a_row_is_made_by_whoever_asks_first_and_read_as_it_is_now() -> None:
    """Trainer 1 asks behind trainer 0's push of 0.2: it reads 0.98."""
    job = started(One())
    replay = Replay(job, [[batch(0.2)], [batch(0.5)]])
    replay.play("0 pulls w.weight \n 0 pushes w.weight \n 1 pulls w.weight \n 1 pushes w.weight").drain()
    assert [returned[0].item() for returned in replay.returned] == pytest.approx([1.0, 0.98])
    assert row(job) == pytest.approx(1 - 0.02 - 0.05)


def test_the_third_of_all_trainers_steps_admits_and_what_read_zeros_is_not_trained() -> None:
    """Trainer 0 looks up, trainer 1 too, trainer 0 again: that is the third. The gradient that trainer 1 made from zeros
    arrives behind it, and is dropped."""
    job = started(One(admission=CountFilter(3)))
    replay = Replay(job, [[batch(0.2), batch(0.4)], [batch(8.0)]])
    replay.play(
        "0 pulls w.weight \n 1 pulls w.weight \n 0 pushes w.weight \n 0 pulls w.weight \n 1 pushes w.weight"
    ).drain()
    assert [float(x) for returned in replay.returned for x in returned] == [0.0, 1.0, 0.0]
    assert row(job) == pytest.approx(1 - 0.1 * 0.4)
    assert job.model.w.clock.tolist()[0] == 3, "a step of the table is a step of a trainer"


def test_what_has_gone_since_it_was_looked_up_is_not_trained() -> None:
    """`shrink` between the lookup and the push; the slot is another id's by then."""
    job = started(One())
    Replay(job, [[batch(0.2)], []]).drain()
    server = job.servers[0]
    replay = Replay(job, [[batch(0.3)], [batch(0.5, identity=7)]])
    replay.play("0 pulls w.weight")
    table = server.there[0]._tables._parts["w.weight"].table.table
    table.rows.remove(torch.tensor([ID]), 0)
    replay.play("1 pulls w.weight \n 0 pushes w.weight \n 1 pushes w.weight").drain()
    assert row(job, 7) == pytest.approx(0.95)
    assert row(job) == 0.0


def test_the_last_values_come_when_all_have_left() -> None:
    model = One()
    job = started(model)
    Replay(job, [[batch(0.2), batch(0.2)], [batch(0.5)]]).drain()
    job.session.finish()
    assert model.w.eval()(torch.tensor([ID])).item() == pytest.approx(1 - 0.02 - 0.02 - 0.05)
