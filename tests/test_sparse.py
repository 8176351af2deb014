"""Embedding tables: which are sparse, and what lookups do to their gradients and updates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncwright
from syncwright.errors import LoweringError

IDS = torch.tensor([[1, 2], [2, 3], [5, 0], [5, 5]])
TARGETS = torch.arange(12.0).view(4, 3) / 7

Read = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Table(nn.Module):
    """A table of six rows, 3 wide, and how it is read."""

    def __init__(self, read: Read, bag: str | None = None, **options: object) -> None:
        super().__init__()
        self.read = read
        kind = nn.Embedding if bag is None else lambda *sizes, **o: nn.EmbeddingBag(*sizes, mode=bag, **o)
        self.table = kind(6, 3, **options)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.read(self, ids)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.mse_loss(model(ids), y)
    loss.backward()
    optimizer.step()
    return loss


def lookup(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.table(ids).sum(1)


def bag(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.table(ids)


def weighted_bag(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.table(ids, per_sample_weights=1.0 / (1 + ids))


def several(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.table(ids[:, 0]) + model.table(ids[:, 1]) * model.table(ids[:, 0])


def tied(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return (lookup(model, ids) @ model.table.weight.t())[:, :3]


def penalised(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return lookup(model, ids) + model.table.weight.square().sum()


def normalised(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        size = model.table.weight.norm()
    return lookup(model, ids) / size


def sparse_in(model: nn.Module, ids: torch.Tensor = IDS, step: Callable = step) -> list[str]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    program = syncwright.capture(step, model, optimizer, ids, TARGETS)
    return [v.name for v in program.variables.values() if v.sparse]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_sparse(mode: str) -> None:
    assert sparse_in(Table(bag, mode)) == ["table.weight"]


@pytest.mark.parametrize(
    "model",
    [
        Table(lookup),
        Table(lookup, padding_idx=2),
        Table(several),
        Table(bag, "sum", padding_idx=2),
        Table(weighted_bag, "sum"),
    ],
    ids=["lookup", "padding", "several", "bag with padding", "weighted bag"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_tables_that_are_only_looked_up_are_sparse(model: Table, dtype: torch.dtype) -> None:
    assert sparse_in(model, IDS.to(dtype)) == ["table.weight"]


@pytest.mark.parametrize("read", [tied, penalised, normalised], ids=lambda read: read.__name__)
def test_tables_that_are_also_read_whole_are_dense(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "syncwright"):
        assert sparse_in(Table(read)) == []
    assert "'table.weight' is looked up, and also read whole (at " in caplog.text


def test_a_metric_of_the_whole_table_makes_it_dense() -> None:
    def with_norm(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> tuple:
        return step(model, optimizer, *batch), {"norm": model.table.weight.norm()}

    def with_gradient_norm(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> tuple:
        loss = step(model, optimizer, *batch)
        return loss, {"norm": model.table.weight.grad.norm()}

    assert sparse_in(Table(lookup), step=with_norm) == []
    assert sparse_in(Table(lookup), step=with_gradient_norm) == ["table.weight"]


EVERY_PLAN = [("all_reduce", 0), ("parameter_server", 1), ("parallax", 1)]


@pytest.mark.parametrize(("plan", "servers"), EVERY_PLAN)
@pytest.mark.parametrize(
    "option", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=lambda option: next(iter(option))
)
@pytest.mark.parametrize(("read", "mode"), [(lookup, None), (bag, "sum")], ids=["lookup", "bag"])
def test_what_only_the_whole_batch_tells_is_refused(
    read: Read, mode: str, option: dict, plan: str, servers: int
) -> None:
    model = Table(read, mode, **option)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(step, model, optimizer, plan=plan, trainers=2, servers=servers)
    with pytest.raises(LoweringError, match=f"'table.weight' is looked up with {next(iter(option))}"):
        job.step([(IDS[:2], TARGETS[:2]), (IDS[2:], TARGETS[2:])])


@pytest.mark.parametrize(("plan", "servers"), EVERY_PLAN)
@pytest.mark.parametrize(
    "option", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}], ids=lambda option: next(iter(option))
)
def test_one_trainer_has_the_whole_batch(option: dict, plan: str, servers: int) -> None:
    """But a server does not hold what the forward rescales; `parallax` does not ask it to, as that needs all rows."""
    model = Table(lookup, **option)
    ours = deepcopy(model)
    optimizer, our_optimizer = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, ours))
    job = syncwright.loopback(step, ours, our_optimizer, plan=plan, trainers=1, servers=servers)
    if plan == "parameter_server" and "max_norm" in option:
        with pytest.raises(LoweringError, match="with max_norm"):
            job.step([(IDS, TARGETS)])
        return
    for _ in range(3):
        step(model, optimizer, IDS, TARGETS)
        job.step([(IDS, TARGETS)])
    job.sync()
    assert torch.equal(ours.table.weight, model.table.weight)
