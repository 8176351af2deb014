"""SGD with dampening: the first update of a parameter is another than all later ones, under every plan."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncwright
from syncwright.capture.state import Binding
from syncwright.checking import check_plan
from syncwright.planning import make_plan
from syncwright.runtime.intercept import FirstStep

GENERATOR = torch.Generator().manual_seed(2)
BATCHES = [(torch.randn(4, 3, generator=GENERATOR), torch.randn(4, 2, generator=GENERATOR)) for _ in range(5)]
PLANS = ("all_reduce", "parameter_server", "parameter_server_partitioned")


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def made(dampening: float = 0.3):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=dampening)


def plain(steps: int, dampening: float = 0.3):
    model, optimizer = made(dampening)
    for batch in BATCHES[:steps]:
        step(model, optimizer, *batch)
    return model, optimizer


def held(model, optimizer) -> dict:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("taken", [0, 2])
def test_goes_on_from_what_plain_pytorch_holds(plan, taken):
    """From no buffer and from one that two updates have made: always what PyTorch alone would hold after them."""
    model, optimizer = plain(taken)
    job = syncwright.loopback(step, model, optimizer, plan=plan, servers=2)
    for batch in BATCHES[taken:]:
        job.step([batch])
    assert_same(job.state_dict(), held(*plain(5)))


@pytest.mark.parametrize("plan", PLANS)
def test_a_state_dict_from_before_the_first_step_is_loaded_as_that(plan):
    model, optimizer = made()
    untouched = held(model, optimizer)
    with syncwright.distribute(step, model, optimizer, plan=plan, compile=False, example=BATCHES[0]) as trainer:
        assert_same(trainer.state_dict(), untouched)
        trainer.step(*BATCHES[4])
        trainer.load_state_dict(untouched)
        for batch in BATCHES[:3]:
            trainer.step(*batch)
        assert_same(trainer.state_dict(), held(*plain(3)))
        trainer.load_state_dict(held(*plain(2)))
        trainer.step(*BATCHES[2])
        assert_same(trainer.state_dict(), held(*plain(3)))


def test_a_buffer_of_none_is_one_that_no_update_has_made():
    """Older PyTorch writes None for it."""
    model, optimizer = made()
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = None
    assert Binding(model, optimizer).values()["weight.begun"] == 0
    job = syncwright.loopback(step, model, optimizer)
    for batch in BATCHES:
        job.step([batch])
    assert_same(job.state_dict(), held(*plain(5)))


def test_only_optimizers_that_dampen_have_the_mark():
    assert "weight.begun" not in Binding(*made(0.0)).variables
    assert Binding(*plain(1)).values()["weight.begun"] == 1
    model, _ = made()
    still = torch.optim.SGD(model.parameters(), lr=0.1, dampening=0.3)
    assert list(Binding(model, still).states) == []


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_is_checked_against_one_device(plan):
    model, optimizer = made()
    first = FirstStep(step, model, optimizer, {}, plan, None, BATCHES[0])
    program = syncwright.capture(step, model, optimizer, *BATCHES[0])
    found = check_plan(first, program, make_plan(plan, program, 2, 2), steps=3)
    assert not found.beyond
