"""RowWiseAdagrad: its arithmetic one row at a time, sparse as dense, and as any optimizer in a job."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import syncwright
from syncwright.optim import RowWiseAdagrad
from syncwright.update import find_updates
from tests.test_sparse import Table, lookup, step
from tests.test_sparse_gradients import PLANS, batches


def gradients(shape: tuple[int, ...], steps: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def trained(optimizer: RowWiseAdagrad, parameter: nn.Parameter, given: list[torch.Tensor]) -> torch.Tensor:
    for gradient in given:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach()


def of_rows(rows: list[int], shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A sparse gradient of these rows, which may repeat."""
    values = torch.randn(len(rows), shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


@pytest.mark.parametrize("shape", [(5, 3), (5,), (4, 3, 2), ()])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_arithmetic_row_by_row(shape, maximize):
    lr, eps, begin = 0.3, 0.01, 0.5
    parameter = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = RowWiseAdagrad([parameter], lr=lr, eps=eps, initial_accumulator_value=begin, maximize=maximize)
    expected = torch.ones(shape, dtype=torch.float64)
    given = gradients(shape)
    for row in range(shape[0] if shape else 1):
        at = row if shape else ...
        total = begin
        for gradient in given:
            total += sum(g * g for g in gradient[at].flatten().tolist()) / gradient[at].numel()
            change = lr * gradient[at] / (total**0.5 + eps)
            expected[at] = expected[at] + change if maximize else expected[at] - change
    torch.testing.assert_close(trained(optimizer, parameter, given), expected, rtol=1e-12, atol=1e-14)
    assert optimizer.state[parameter]["sum"].shape == (shape[:1] + (1,) * (len(shape) - 1))


def test_two_numbers():
    """g = [3, 4]: mean(g**2) = 12.5; w = 1 - 0.1 * g / (sqrt(12.5) + 0.5); eps is outside of the root."""
    parameter = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    found = trained(
        RowWiseAdagrad([parameter], lr=0.1, eps=0.5), parameter, [torch.tensor([[3.0, 4.0]], dtype=torch.float64)]
    )
    assert found.tolist() == [[pytest.approx(1 - 0.3 / 4.035533905932738), pytest.approx(1 - 0.4 / 4.035533905932738)]]


def test_one_axis_is_adagrad():
    mine, theirs = nn.Parameter(torch.ones(7).double()), nn.Parameter(torch.ones(7).double())
    ours = trained(RowWiseAdagrad([mine], lr=0.1, eps=1e-3), mine, gradients((7,)))
    torch.testing.assert_close(ours, trained(torch.optim.Adagrad([theirs], lr=0.1, eps=1e-3), theirs, gradients((7,))))  # type: ignore[arg-type]


@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients_give_the_bits_of_dense_ones(maximize):
    """Rows that repeat are added first; rows without a gradient stay."""
    mine, other = nn.Parameter(torch.ones(6, 3)), nn.Parameter(torch.ones(6, 3))
    given = [of_rows([1, 4, 1], (6, 3)), of_rows([0, 4], (6, 3), 1), of_rows([], (6, 3))]
    sparse = RowWiseAdagrad([mine], lr=0.1, maximize=maximize)
    dense = RowWiseAdagrad([other], lr=0.1, maximize=maximize)
    found = trained(sparse, mine, given)
    assert torch.equal(found, trained(dense, other, [g.coalesce().to_dense() for g in given]))
    assert torch.equal(sparse.state[mine]["sum"], dense.state[other]["sum"])
    assert torch.equal(found[[2, 3, 5]], torch.ones(3, 3))
    assert not (found[[0, 1, 4]] == 1).any()


def test_a_gradient_that_is_sparse_along_more_axes_is_refused():
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.eye(2).to_sparse()
    with pytest.raises(ValueError, match="found a gradient that is sparse along 2 axes; expected one that is"):
        RowWiseAdagrad([parameter]).step()


def test_state_groups_and_closure():
    first, second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
    optimizer = RowWiseAdagrad([{"params": [first], "lr": 0.5}], lr=0.1, initial_accumulator_value=0.25)
    optimizer.add_param_group({"params": [second], "initial_accumulator_value": 2.0})
    assert not optimizer.state

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (first**2).sum() + (second**3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 8
    assert [optimizer.state[p]["sum"].flatten()[0].item() for p in (first, second)] == [4.25, 11.0]
    saved, copies = deepcopy(optimizer.state_dict()), [nn.Parameter(p.detach().clone()) for p in (first, second)]
    again = RowWiseAdagrad([{"params": [copies[0]]}, {"params": [copies[1]]}])
    again.load_state_dict(saved)
    optimizer.step(closure)
    for copy, p in zip(copies, (first, second), strict=True):
        copy.grad = p.grad
    again.step()
    assert all(torch.equal(copy, p) for copy, p in zip(copies, (first, second), strict=True))
    assert again.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("setting", ["lr", "eps", "initial_accumulator_value"])
def test_settings_below_zero_are_refused(setting):
    with pytest.raises(ValueError, match=f"RowWiseAdagrad: found {setting}=-1; expected a number of at least 0"):
        RowWiseAdagrad([nn.Parameter(torch.ones(1))], **{setting: -1})


@pytest.mark.parametrize("sparse", [False, True])
def test_its_update_is_row_wise(sparse):
    model = Table(lookup, sparse=sparse)
    ids, y = batches(1, repeat=True)[0]
    program = syncwright.capture(step, model, RowWiseAdagrad(model.parameters()), ids, y)
    assert find_updates(program).kinds() == {"table.weight": "row-wise"}
    assert (program.variables["table.weight"].sparse, program.variables["table.weight"].lazy) == (True, False)
    assert program.variables["table.weight.sum"].shape == (6, 1)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_job_is_bit_equal_to_one_device_where_ids_do_not_repeat(plan, sparse):
    """Interpreted on two trainers, each with one of two examples."""
    torch.manual_seed(0)
    model = Table(lookup, sparse=sparse)
    ours = deepcopy(model)
    optimizer, our_optimizer = (RowWiseAdagrad(m.parameters(), lr=0.1) for m in (model, ours))
    job = syncwright.loopback(step, ours, our_optimizer, plan=PLANS[plan][0], trainers=2, servers=PLANS[plan][1])
    for ids, y in batches(4, repeat=False):
        step(model, optimizer, ids, y)
        job.step([(ids[:1], y[:1]), (ids[1:], y[1:])])
    job.sync()
    assert torch.equal(ours.table.weight, model.table.weight)
    assert torch.equal(our_optimizer.state[ours.table.weight]["sum"], optimizer.state[model.table.weight]["sum"])
