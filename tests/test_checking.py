"""Jobs against one device: what is a reference, what is put back, what is found."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncwright.capture import capture
from syncwright.checking import Check, check_plan, relative
from syncwright.plan import AllReduce, ParameterServer, Rules
from syncwright.planning import make_plan
from syncwright.runtime.intercept import FirstStep


def check(step, model, optimizer, batch, plan="all_reduce", trainers=2, servers=1, state=None, **more) -> Check:
    first = FirstStep(step, model, optimizer, state or {}, plan, None, batch)
    program = capture(step, model, optimizer, *batch, state=state)
    return check_plan(first, program, make_plan(plan, program, trainers, servers), steps=3, **more)


def descend(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def summed(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y, reduction="sum")
    loss.backward()
    optimizer.step()
    return loss.detach() / len(x)


def masked(model, optimizer, x, y):
    optimizer.zero_grad()
    chosen = (x[:, 0] > 0).float()
    loss = (((model(x) - y) ** 2).mean(1) * chosen).sum() / chosen.sum()
    loss.backward()
    optimizer.step()
    return loss


def linear():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), (torch.randn(5, 4), torch.randn(5, 2))


def held(model, optimizer) -> dict:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_the_users_objects_and_random_stream_are_put_back_to_the_bit():
    model, optimizer, batch = linear()
    descend(model, optimizer, *batch)
    before, grads, random = held(model, optimizer), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    assert not check(descend, model, optimizer, batch).beyond
    after = held(model, optimizer)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("trainers", [1, 2, 3, 7])
@pytest.mark.parametrize("plan", ["all_reduce", "parameter_server"])
def test_ragged_and_empty_parts_equal_one_device(trainers, plan):
    found = check(descend, *linear(), plan=plan, trainers=trainers)
    assert not found.beyond
    assert found.mixing == ()


@pytest.mark.parametrize("sync", [AllReduce(reduce="sum"), ParameterServer(reduce="sum")])
def test_a_sum_of_losses_is_summed(sync):
    assert not check(summed, *linear(), plan=Rules.of(sync)).beyond


def test_a_mean_of_sums_is_found():
    found = check(summed, *linear())
    assert found.weights == pytest.approx((1, 1))
    assert {d.variable.name for d in found.beyond} >= {"weight", "bias"}


def test_a_mean_over_something_else_than_examples_is_found():
    model, optimizer, (x, y) = linear()
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    found = check(masked, model, optimizer, (x, y))
    assert found.weights == pytest.approx((2 / 3, 1 / 3))
    assert found.beyond


def test_a_loss_over_pairs_of_a_batch_is_judged_by_the_parts():
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x) @ y.T, torch.arange(len(x)))
        loss.backward()
        optimizer.step()
        return loss

    found = check(step, *linear())
    assert found.mixing
    assert not found.beyond


def test_a_gradient_behind_another_update_is_averaged_too():
    torch.manual_seed(0)
    model = nn.ModuleDict({"maker": nn.Linear(4, 3), "judge": nn.Linear(3, 1)})
    optimizers = tuple(torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.5) for each in model.values())

    def step(model, optimizers, noise, real):
        optimizers[0].zero_grad()
        fooled = F.softplus(-model["judge"](model["maker"](noise))).mean()
        fooled.backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        made = model["maker"](noise).detach()
        judged = (F.softplus(model["judge"](made)) + F.softplus(-model["judge"](real))).mean()
        judged.backward()
        optimizers[1].step()
        return fooled + judged

    found = check(step, model, optimizers, (torch.randn(6, 4), torch.randn(6, 3)))
    assert all(d.parts == 0 for d in found.differences)


def test_an_average_of_weights_is_compared():
    model, optimizer, batch = linear()
    average = copy.deepcopy(model).requires_grad_(False)

    def step(model, optimizer, x, y):
        loss = descend(model, optimizer, x, y)
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9).add_(new, alpha=0.1)
        return loss

    found = check(step, model, optimizer, batch, plan="parameter_server", state={"average": average})
    assert not found.beyond
    assert "average.weight" in {d.variable.name for d in found.differences}


def test_batch_norm_in_train_mode_is_named_and_judged_by_the_parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(6, 4), torch.randn(6, 2))
    found = check(descend, model, optimizer, batch)
    assert found.mixing == ("1 (BatchNorm1d)",)
    assert all(d.whole is None and d.parts == 0 for d in found.differences)
    assert "1.running_mean" in {d.variable.name for d in found.differences}


def test_batch_norm_in_eval_mode_writes_nothing_and_joins_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(5, 4), torch.randn(5, 2))
    assert not [name for name in capture(descend, model, optimizer, *batch).writes if "running" in name]
    found = check(descend, model, optimizer, batch)
    assert found.mixing == ()
    assert not found.beyond


def test_relative():
    one = torch.tensor([1.0, -4.0])
    assert relative(one, one) == 0
    assert relative(torch.tensor([2.0, -4.0]), one) == 0.25
    assert relative(torch.tensor([float("nan"), -4.0]), one) == float("inf")
    assert relative(one, torch.zeros(2)) == float("inf")
    assert relative(torch.tensor(3), torch.tensor(2)) == 0.5


@pytest.mark.parametrize("plan", ["all_reduce", "parameter_server"])
def test_every_trainer_computes_again_with_its_own_masks(plan):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    model = Again()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = check(descend, model, optimizer, (torch.randn(6, 4), torch.randn(6, 2)), plan=plan, trainers=3)
    assert not found.beyond
    assert len(found.mixing) == 1


@pytest.mark.parametrize("plan", ["all_reduce", "zero3", "parameter_server"])
def test_a_loss_scale_is_compared_and_put_back(plan):
    """A scale that grows in the second of three steps, in all three ways of training."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def scaled(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    model, optimizer, batch = linear()
    before = held(model, optimizer)
    found = check(scaled, model, optimizer, batch, plan)
    assert not found.beyond
    assert {"scaler.scale", "scaler.growth_tracker"} <= {d.variable.name for d in found.differences}
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (8.0, 0)
    torch.testing.assert_close(held(model, optimizer), before, rtol=0, atol=0)
