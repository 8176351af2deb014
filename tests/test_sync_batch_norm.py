"""Batch norm over the examples of all trainers: as one device, as `SyncBatchNorm`, whatever shares the variables."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Rules, Shard, ops
from syncwright.errors import PlanError
from syncwright.plan import Plan
from syncwright.runtime.loopback import Loopback
from tests.test_checking import check

STEPS, EXAMPLES = 4, 12
MIXED = {"1.*": AllReduce(), "4.*": ParameterServer()}
PLANS = {
    "all_reduce": Rules(AllReduce(), sync_batch_norm=True),
    "zero1": Rules(Shard(1), sync_batch_norm=True),
    "zero3": Rules(Shard(3), sync_batch_norm=True),
    "servers": Rules(ParameterServer(), sync_batch_norm=True),
    "a mixture": Rules(Shard(3), tuple(MIXED.items()), sync_batch_norm=True),
}


def model(affine: bool = True, tracked: bool = True, momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(1)
    settings = {"affine": affine, "track_running_stats": tracked, "momentum": momentum}
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, **settings), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(48, 5), nn.BatchNorm1d(5, **settings), nn.Linear(5, 2)),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(EXAMPLES, 2, 6, 6, generator=generator), torch.randn(EXAMPLES, 2, generator=generator))
        for _ in range(STEPS)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def alone(net: nn.Module, the_step: Callable = step) -> dict[str, torch.Tensor]:
    optimizer = sgd(net)
    for batch in batches():
        the_step(net, optimizer, *batch)
    return net.state_dict()


def together(net: nn.Module, plan: Rules, sizes: list[int], the_step: Callable = step) -> Loopback:
    job = syncwright.loopback(the_step, net, sgd(net), plan=plan, trainers=len(sizes), servers=1)
    for x, y in batches():
        job.step(list(zip(x.split(sizes), y.split(sizes), strict=True)))
    job.sync()
    return job


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}")


@pytest.mark.parametrize("sizes", [[6, 6], [7, 0, 5], [3, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_equals_one_device(plan, sizes):
    """Parameters, running statistics and counts; parts of several sizes, one of them empty."""
    job = together(model(), PLANS[plan], sizes)
    check_close(job.model.state_dict(), alone(model()))


@pytest.mark.parametrize("settings", [{"affine": False}, {"tracked": False}, {"momentum": 0.7}], ids=str)
def test_every_kind_of_batch_norm(settings):
    job = together(model(**settings), PLANS["all_reduce"], [5, 7])
    check_close(job.model.state_dict(), alone(model(**settings)))


def test_without_it_trainers_normalise_by_themselves():
    job = together(model(), Rules(AllReduce()), [6, 6])
    apart = job.model.state_dict()["1.running_var"] - alone(model())["1.running_var"]
    assert apart.abs().max() > 1e-4


def test_losses_that_are_sums():
    def summed(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).sum() / 50
        loss.backward()
        optimizer.step()
        return loss

    plan = Rules(AllReduce(reduce="sum"), sync_batch_norm=True)
    check_close(together(model(), plan, [8, 4], summed).model.state_dict(), alone(model(), summed))


def test_statistics_are_the_same_on_all_trainers_and_travel_once():
    """Two norms: one gathering each, forward and backward; running statistics are not averaged."""
    job = together(model(), PLANS["all_reduce"], [5, 7])
    values = [replica.values for replica in job.replicas]
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        assert torch.equal(values[0][name], values[1][name])  # type: ignore[arg-type]
    program = job.job.trainer["step"]  # type: ignore[union-attr]
    assert len(program.graph.find_nodes(op="call_function", target=ops.gather_parts)) == 4


def test_numbers():
    """Trainers with x = 1, 3 and x = 5, 11: mean 5, variance 14, and not 2 and 8; running mean 0.5 and variance 0.9 + 56 / 30."""
    norm = nn.BatchNorm1d(1)

    def forward(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    rules = Rules(AllReduce(), sync_batch_norm=True)
    job = syncwright.loopback(forward, norm, torch.optim.SGD(norm.parameters(), lr=0.0), plan=rules, trainers=2)
    loss = job.step([(torch.tensor([[1.0], [3.0]]),), (torch.tensor([[5.0], [11.0]]),)])
    job.sync()
    torch.testing.assert_close(loss, torch.tensor(14 / (14 + 1e-5)))
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.5]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 + 5.6 / 3]))


def test_half_precision_is_normalised_in_full():
    def cast(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    found = together(model(), PLANS["all_reduce"], [6, 6], cast).model.state_dict()
    for name, value in alone(model(), cast).items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-2)


def test_one_trainer_and_norms_that_do_not_train_are_left_alone():
    net = model().eval()
    job = together(copy.deepcopy(net), PLANS["all_reduce"], [6, 6])
    assert not job.job.trainer["step"].graph.find_nodes(op="call_function", target=ops.gather_parts)  # type: ignore[union-attr]
    check_close(job.model.state_dict(), alone(net))
    assert torch.equal(
        together(model(), PLANS["all_reduce"], [12]).model.state_dict()["1.running_mean"],
        alone(model())["1.running_mean"],
    )


def test_verify_compares_with_the_whole_batch():
    net, batch = model(), batches()[0]
    found = check(step, net, sgd(net), batch, plan=PLANS["zero3"])
    assert found.together
    assert not found.mixing
    assert not found.beyond
    assert all(d.whole is not None for d in found.differences)


def test_what_cannot_be_meant_is_refused():
    text = PLANS["zero3"].to_yaml()
    assert Rules.from_yaml(text) == PLANS["zero3"]
    assert "sync_batch_norm: true" in text
    for sync in (LocalSteps(2), ParameterServer(mode="async")):
        with pytest.raises(
            PlanError, match=r"found sync_batch_norm: true with '0.bias'|with '0.weight', which has no step"
        ):
            together(model(), Rules(sync, sync_batch_norm=True), [6, 6])
    mixed = Rules(AllReduce(), (("4.*", AllReduce(reduce="sum")),), sync_batch_norm=True)
    with pytest.raises(PlanError, match="gradients averaged and others added up"):
        together(model(), mixed, [6, 6])


def test_a_complete_plan_says_so():
    job = together(model(), PLANS["all_reduce"], [6, 6])
    plan = job.job.plan  # type: ignore[union-attr]
    assert plan.sync_batch_norm
    assert Plan.from_yaml(plan.to_yaml()) == plan
