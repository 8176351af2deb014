"""A loss scale of the plan's own: a step without a scaler trains as the same step with torch's GradScaler, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, ParameterServer, Plan, Rules, Shard
from syncwright.capture.own_scale import ScaledStep, scaled_by
from syncwright.capture.state import Binding
from syncwright.errors import CaptureError, PlanError
from syncwright.plan import Dynamic
from syncwright.runtime.loopback import Loopback
from tests.test_scaling import NUMBERS, Net, batches, scaled, scaler_of, values

SCALE = Dynamic(init_scale=8.0, growth_interval=3)
MIX = {"first.weight": ParameterServer(), "second.weight": Shard(stage=3), "second.bias": ParameterServer()}
RULES: dict[str, tuple[Rules, int]] = {
    "all_reduce": (Rules(AllReduce()), 0),
    "zero1": (Rules(Shard(stage=1)), 0),
    "zero3": (Rules(Shard(stage=3)), 0),
    "parameter_server": (Rules(ParameterServer()), 1),
    "a mix": (Rules.of(AllReduce(), MIX), 2),
}


def plain(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def with_scaler() -> Callable:
    return scaled(scaler_of(), clip=True)


def job_of(step: Callable, rules: Rules | Plan, servers: int, **options) -> Loopback:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=servers, **options)


@pytest.mark.parametrize("name", RULES)
def test_it_is_torchs_scaler_in_the_step(name: str) -> None:
    """Scale and count of the semantics on every trainer, and every value that of the step with a scaler, to the bit."""
    rules, servers = RULES[name]
    ours = job_of(plain, replace(rules, loss_scale=SCALE), servers, check_replicas=True)
    theirs = job_of(with_scaler(), rules, servers)
    for parts, numbers in zip(batches(), NUMBERS, strict=True):
        assert torch.equal(ours.step(parts), theirs.step(parts))
        for replica in ours.replicas:
            assert (float(replica.values["scaler.scale"]), int(replica.values["scaler.growth_tracker"])) == numbers
    mine, other = values(ours), values(theirs)
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert torch.equal(mine[key], value), key


def test_small_gradients_in_half_precision_are_not_lost() -> None:
    """A loss of 2**-12 per number gives gradients of 2**-28 in fp16, which are zero; scaled by 2**16 they are exact."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.half() @ self.w.half()

    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = (model(x) * 2.0**-14).float().sum() * 2.0**-14
        loss.backward()
        optimizer.step()
        return loss

    moved = {}
    for scale in (None, Dynamic()):
        model = Half()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**20)
        rules = Rules(AllReduce(reduce="sum"), loss_scale=scale)
        job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=2)
        job.step([(torch.ones(2, 4),), (torch.ones(2, 4),)])
        job.sync()
        moved[scale] = 1 - model.w.detach()
    assert torch.equal(moved[None], torch.zeros(4, 4))
    assert torch.equal(moved[Dynamic()], torch.full((4, 4), 4 * 2.0**-8))


@pytest.mark.parametrize("name", ["all_reduce", "zero3", "parameter_server"])
def test_several_backward_calls_are_one_gradient(name: str) -> None:
    """An infinity in either skips the step; else the gradients add up, unscaled. Powers of two stay exact."""

    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        for half in (x, y):
            (model(half) * 0.5).mean().backward()
        optimizer.step()
        return model(x).mean()

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    rules, servers = RULES[name]
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    job = syncwright.loopback(
        step, model, optimizer, plan=replace(rules, loss_scale=SCALE), trainers=2, servers=servers
    )
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 8.0]])
    job.step([(one, two), (one, two)])
    job.sync()
    assert torch.equal(model.w.detach(), torch.tensor([1 - 2.5, 1 - 5.0]))
    for bad in ((one * float("inf"), two), (one, two * float("inf"))):
        job.step([(one, two), bad])
    job.sync()
    assert torch.equal(model.w.detach(), torch.tensor([1 - 2.5, 1 - 5.0]))
    assert job.state_dict()["scaler"]["scale"] == 2.0


def test_optimizers_that_take_turns_skip_each_for_itself() -> None:
    def step(model, optimizers, x, y):
        for each, target in zip(optimizers, (y, 2 * y), strict=True):
            each.zero_grad()
            ((model(x) - target) ** 2).mean().backward()
            each.step()
        return model(x).mean()

    def trained(scale: Dynamic | None) -> dict[str, torch.Tensor]:
        model = Net()
        optimizers = tuple(torch.optim.SGD(part.parameters(), lr=0.5) for part in (model.first, model.second))
        job = syncwright.loopback(step, model, optimizers, plan=Rules(AllReduce(), loss_scale=scale), trainers=2)
        for parts in batches()[:3]:
            job.step(parts)
        return {**job.state_dict()["model"]}

    without, scaled = trained(None), trained(Dynamic(init_scale=2.0**10))
    assert all(torch.equal(without[key], scaled[key]) for key in without)


def test_on_one_device_the_same_step_runs_as_it_is() -> None:
    """What `syncwright verify` compares with."""
    model, other = Net(), Net()
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other))
    mine = scaled_by(plain, SCALE)
    theirs_step = with_scaler()
    for parts in batches():
        batch = [torch.cat(each) for each in zip(*parts, strict=True)]
        assert torch.equal(mine(model, ours, *batch), theirs_step(other, theirs, *batch))
    found, expected = Binding(model, ours).values(), Binding(other, theirs).values()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in expected)
    assert "step" not in vars(ours)


def test_another_plan_scales_by_its_own() -> None:
    step = scaled_by(plain, SCALE)
    assert isinstance(step, ScaledStep)
    assert scaled_by(step, SCALE) is step
    other = scaled_by(step, Dynamic())
    assert isinstance(other, ScaledStep)
    assert other.step is plain
    assert scaled_by(step, None) is plain


def test_a_plan_says_it_and_a_checkpoint_holds_it(tmp_path) -> None:
    rules = Rules.from_yaml("default: all_reduce\nloss_scale: {dynamic: {init_scale: 8, growth_interval: 3}}\n")
    assert rules.loss_scale == SCALE
    assert Rules.from_yaml(rules.to_yaml()) == rules
    assert Rules.from_yaml("default: all_reduce\nloss_scale: dynamic\n").loss_scale == Dynamic()
    job = job_of(plain, rules, 0)
    for parts in batches():
        job.step(parts)
    saved, plan = job.state_dict(), job.job.plan
    assert saved["scaler"]["scale"] == 8.0
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml())
    assert Plan.from_yaml(path) == plan
    again = job_of(plain, plan, 0)
    again.load_state_dict(saved)
    assert again.state_dict()["scaler"] == saved["scaler"]


def test_a_step_with_a_scaler_of_its_own_is_refused() -> None:
    job = job_of(with_scaler(), Rules(AllReduce(), loss_scale=SCALE), 0)
    with pytest.raises(CaptureError, match=r"test_scaling.py.*found GradScaler.scale\(\), and loss_scale in the plan"):
        job.step(batches()[0])


def test_scales_that_never_grow_are_refused() -> None:
    with pytest.raises(PlanError, match=r"growth_factor: 1 and backoff_factor: 0\.5, expected a growth above 1"):
        Dynamic(growth_factor=1.0)
