"""`sparse=True`: as the user wrote it, under every plan; rows that nobody touches stay as they are, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

import syncwright
from syncwright.errors import CaptureError
from syncwright.optim import RowWiseAdagrad
from syncwright.plan import Rules
from syncwright.plan.partition import Even
from syncwright.planning import make_plan
from tests.test_sparse import IDS, TARGETS, Table, bag, lookup, several, step, tied, weighted_bag

PLANS = {
    "all_reduce": ("all_reduce", 0),
    "parameter_server": ("parameter_server", 1),
    "partitioned": (Rules(default=syncwright.ParameterServer(partition=Even(2)), uncuttable="keep_whole"), 2),
    "parallax": ("parallax", 2),
}
every_plan = pytest.mark.parametrize("plan", PLANS)
MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda model: Adagrad(model.parameters(), lr=0.1),
    "RowWiseAdagrad": lambda model: RowWiseAdagrad(model.parameters(), lr=0.1),
    "SparseAdam": lambda model: SparseAdam(model.parameters(), lr=0.1),
}


def batches(steps: int, repeat: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids from 0 to 4 of a table of six rows; without repeats in a batch of two examples where `repeat` is false."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(steps):
        if repeat:
            ids = torch.randint(0, 5, (7, 2), generator=generator)
        else:
            ids = torch.randperm(5, generator=generator)[:4].view(2, 2)
        found.append((ids, torch.randn(len(ids), 3, generator=generator)))
    return found


def trained(model: nn.Module, make: Callable, plan: str, trainers: int, given: list[tuple]) -> tuple[dict, dict]:
    """The values after training on one device, and in a job; by name."""
    torch.manual_seed(0)
    ours = deepcopy(model)
    optimizer, our_optimizer = make(model), make(ours)
    job = syncwright.loopback(step, ours, our_optimizer, plan=PLANS[plan][0], trainers=trainers, servers=PLANS[plan][1])
    for ids, y in given:
        step(model, optimizer, ids, y)
        job.step(list(zip(ids.tensor_split(trainers), y.tensor_split(trainers), strict=True)))
    job.sync()
    return values(model, optimizer), values(ours, our_optimizer)


def values(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    held = optimizer.state.get(model.table.weight, {})
    found = {"weight": model.table.weight.detach(), **{k: torch.as_tensor(v) for k, v in held.items()}}
    return {name: value.to_dense() if value.is_sparse else value for name, value in found.items()}


@every_plan
@pytest.mark.parametrize("trainers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", MAKE)
def test_equals_one_device(optimizer: str, trainers: int, plan: str) -> None:
    expected, found = trained(Table(lookup, sparse=True), MAKE[optimizer], plan, trainers, batches(4, repeat=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", MAKE)
def test_rows_alone_travel_and_are_written_but_under_momentum(optimizer: str) -> None:
    model = Table(lookup, sparse=True)
    program = syncwright.capture(step, model, MAKE[optimizer](model), IDS, TARGETS)
    plan = make_plan("parallax", program, 2, 1)
    assert plan.sharing("table.weight").rows == ("all" if optimizer == "momentum" else "touched")


@every_plan
@pytest.mark.parametrize("trainers", [1, 2])
def test_sparse_adam_is_bit_equal_where_ids_do_not_repeat(trainers: int, plan: str) -> None:
    given = batches(4, repeat=False)
    expected, found = trained(Table(lookup, sparse=True), MAKE["SparseAdam"], plan, trainers, given)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "model",
    [
        Table(several, sparse=True),
        Table(lookup, sparse=True, padding_idx=2),
        Table(bag, "mean", sparse=True, padding_idx=2),
        Table(weighted_bag, "sum", sparse=True),
    ],
    ids=["several", "padding", "bag", "weighted bag"],
)
def test_sparse_adam_on_every_kind_of_lookup(model: Table) -> None:
    expected, found = trained(deepcopy(model), MAKE["SparseAdam"], "parallax", 2, batches(4, repeat=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@every_plan
def test_rows_that_nobody_touches_stay_with_their_state(plan: str) -> None:
    """Row 1 is touched in the first step only: Adam would go on moving it."""
    model = Table(lookup, sparse=True)
    optimizer = SparseAdam(model.parameters(), lr=0.1)
    job = syncwright.loopback(step, model, optimizer, plan=PLANS[plan][0], trainers=2, servers=PLANS[plan][1])
    job.step([(IDS[:1], TARGETS[:1]), (IDS[1:2], TARGETS[1:2])])
    job.sync()
    before = {name: value.clone() for name, value in values(model, optimizer).items()}
    job.step([(IDS[2:3], TARGETS[2:3]), (IDS[3:], TARGETS[3:])])
    job.sync()
    after = values(model, optimizer)
    assert (before["exp_avg"][1] != 0).all()
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][1:5], before[name][1:5]), name
        assert (after[name][[0, 5]] != before[name][[0, 5]]).all(), name
    assert optimizer.state[model.table.weight]["step"] == 2


@pytest.mark.parametrize("clear", [False, True])
def test_rows_of_several_backward_passes(clear: bool) -> None:
    """Both passes' rows count; after zero_grad() only the second's."""

    def two(model: nn.Module, optimizer: Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        F.mse_loss(model(ids[:1]), y[:1]).backward()
        if clear:
            optimizer.zero_grad()
        loss = F.mse_loss(model(ids[2:]), y[2:])
        loss.backward()
        optimizer.step()
        return loss

    model = Table(lookup, sparse=True)
    ours = deepcopy(model)
    optimizer, our_optimizer = SparseAdam(model.parameters(), lr=0.1), SparseAdam(ours.parameters(), lr=0.1)
    start = model.table.weight.detach().clone()
    two(model, optimizer, IDS, TARGETS)
    job = syncwright.loopback(two, ours, our_optimizer, plan="parallax", trainers=1, servers=1)
    job.step([(IDS, TARGETS)])
    job.sync()
    moved = (ours.table.weight != start).any(1).tolist()
    assert moved == ([True, False, False, False, False, True] if clear else [True, True, True, False, False, True])
    torch.testing.assert_close(ours.table.weight, model.table.weight)


def test_the_variable_says_that_it_is_lazy() -> None:
    model = Table(lookup, sparse=True)
    program = syncwright.capture(step, model, SparseAdam(model.parameters()), IDS, TARGETS)
    table = program.variables["table.weight"]
    assert (table.sparse, table.lazy) == (True, True)
    program = syncwright.capture(step, model, SGD(model.parameters(), lr=0.1), IDS, TARGETS)
    table = program.variables["table.weight"]
    assert (table.sparse, table.lazy) == (True, False)


def refused(model: nn.Module, optimizer: Optimizer, *parts: str) -> None:
    with pytest.raises(CaptureError) as caught:
        syncwright.capture(step, model, optimizer, IDS, TARGETS)
    for part in parts:
        assert part in str(caught.value)


def test_optimizers_that_take_no_sparse_gradients_are_refused() -> None:
    model = Table(lookup, sparse=True)
    line = "\"return model.table(ids).sum(1)\": 'table.weight' is looked up with sparse=True, "
    refused(model, Adam(model.parameters()), line, "but Adam takes no sparse gradients", "leave sparse=True out")
    decayed = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    refused(model, decayed, line, "but its SGD decays weights", "weight_decay=0")


def test_sparse_adam_with_a_dense_gradient_is_refused() -> None:
    model = Table(lookup)
    refused(model, SparseAdam(model.parameters()), "'table.weight' has a dense gradient", "use Adam")
    model = Table(tied, sparse=True)
    refused(model, SparseAdam(model.parameters()), "'table.weight' is looked up with sparse=True", "Use Adam")


def test_other_sparse_gradients_are_refused() -> None:
    class Gather(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.w.gather(0, ids[:, :1].expand(4, 3) % 4, sparse_grad=True)

    model = Gather()
    refused(model, SGD(model.parameters(), lr=0.1), "the gradient of 'w' is a sparse tensor", "dense form")
