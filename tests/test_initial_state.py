"""The state before a first update: exact for any optimizer, and without memory where the parameter is large."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import syncwright
from syncwright.capture.initial import LARGE, initial_state
from syncwright.capture.state import Binding
from tests import zoo


class Anchored(torch.optim.Optimizer):
    """Pulls a parameter back to where it was at its first update: state that is a copy of the parameter."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["anchor"] = parameter.clone()
                parameter.add_(parameter.grad + parameter - state["anchor"], alpha=-group["lr"])


class Scaled(Anchored):
    """State that depends on the parameter's shape."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["scale"] = torch.full_like(parameter, 1 / parameter.numel())
                parameter.sub_(parameter.grad * state["scale"])


class Averaged(Anchored):
    """Makes its state by the other two ways that a dict has."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "count" not in state:
                    state.update(count=torch.tensor(0.0))
                average = state.setdefault("average", torch.full_like(parameter, 0.5))
                state["count"].add_(1)
                average.lerp_(parameter.grad, 0.1)
                parameter.sub_(average / state["count"])


def found(kind, sizes: tuple[int, int]) -> list[tuple[torch.Tensor, dict]]:
    torch.manual_seed(0)
    model = nn.Linear(*sizes)
    optimizers = zoo.as_tuple(kind(model))
    groups = [(each, group) for each in optimizers for group in each.param_groups]
    return [(p, initial_state(o, g, p, "w")) for o, g in groups for p in g["params"] if p.dim() == 2]


def exact(kind, sizes: tuple[int, int], monkeypatch) -> list[tuple[torch.Tensor, dict]]:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["syncwright.capture.initial"], "LARGE", 2**62)
        return found(kind, sizes)


@pytest.mark.parametrize("optimizer", zoo.OPTIMIZERS)
def test_of_a_large_parameter_is_what_its_own_first_update_starts_from(optimizer, monkeypatch):
    sizes = (300, 301)
    assert sizes[0] * sizes[1] >= LARGE
    ours, theirs = found(zoo.OPTIMIZERS[optimizer], sizes), exact(zoo.OPTIMIZERS[optimizer], sizes, monkeypatch)
    for (_, state), (_, expected) in zip(ours, theirs, strict=True):
        assert state.keys() == expected.keys()
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
        assert all(v.untyped_storage().nbytes() <= 8 for v in state.values())


@pytest.mark.parametrize("kind", [Anchored, Scaled])
def test_that_depends_on_the_parameter_is_found_on_the_parameter(kind, monkeypatch):
    def make(model):
        return kind(model.parameters())

    ((parameter, state),), ((_, expected),) = found(make, (300, 301)), exact(make, (300, 301), monkeypatch)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    wanted = parameter if kind is Anchored else torch.full_like(parameter, 1 / parameter.numel())
    assert torch.equal(next(iter(state.values())), wanted)


@pytest.mark.parametrize("plan", ["all_reduce", "parameter_server_partitioned", "parallax"])
def test_a_job_makes_it_where_it_is_owned(plan):
    def step(model, optimizer, ids):
        optimizer.zero_grad()
        loss = model(ids).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(3000, 32), nn.Linear(32, 2))
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    batches = [torch.randint(3000, (6,), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    model, optimizer = made()
    job = syncwright.loopback(step, model, optimizer, plan=plan, servers=2)
    moments = Binding(model, optimizer).values()["0.weight.exp_avg"]
    assert moments.shape == (3000, 32)
    assert moments.untyped_storage().nbytes() == 4
    for batch in batches:
        job.step([(batch,)])
    plain, its_optimizer = made()
    for batch in batches:
        step(plain, its_optimizer, batch)
    expected = {"model": plain.state_dict(), "optimizer": its_optimizer.state_dict()}
    torch.testing.assert_close(job.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Anchored, Scaled, Averaged])
def test_state_of_ones_own_optimizer_however_it_is_made(kind):
    def made():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, kind(model.parameters())

    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss

    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    job = syncwright.loopback(step, *made(), plan="parameter_server", servers=1)
    model, optimizer = made()
    for batch in batches:
        job.step([(batch,)])
        step(model, optimizer, batch)
    expected = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.testing.assert_close(job.state_dict(), expected, rtol=0, atol=0)
