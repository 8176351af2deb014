"""Updates that a server has compiled give what they give node by node; what trainers have pulled is not overwritten."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import syncwright
from syncwright.runtime import inductor, server
from syncwright.runtime.interpreter import Compiler

WIDTH = 80  # more elements than a segment that is not worth compiling
STEPS = 3

pytestmark = pytest.mark.skipif(not inductor.is_available(), reason="nothing to compile with")


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def start(optimizer: type[torch.optim.Optimizer], mode: str, **settings: object) -> syncwright.runtime.Loopback:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    plan = f"default: {{parameter_server: {{mode: {mode}}}}}"
    return syncwright.loopback(
        step,
        model,
        optimizer(model.parameters(), **settings),
        plan=syncwright.Rules.from_yaml(plan),
        trainers=2,
        servers=1,
    )


def batches() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    source = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(5, WIDTH, generator=source), torch.randn(5, 1, generator=source)) for _ in range(2)]
        for _ in range(STEPS)
    ]


def states(job: syncwright.runtime.Loopback) -> tuple[list[dict], list[dict]]:
    """After three steps, after three more, and after three behind a load of the first; and these states as they were then."""
    found, copies = [], []

    def trained() -> None:
        for batch in batches():
            job.step(batch)
        found.append(job.state_dict())
        copies.append(copy.deepcopy(found[-1]))

    trained()
    trained()
    job.load_state_dict(found[0])
    trained()
    return found, copies


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}), (torch.optim.Adam, {"lr": 0.01})],
    ids=["momentum", "adam"],
)
def test_compiled_updates(optimizer, settings, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = states(start(optimizer, mode, **settings))
    monkeypatch.setattr(server, "Interpreter", Compiler)
    job = start(optimizer, mode, **settings)
    found, copies = states(job)
    assert job.servers[0].there[0].overwritten, "momentum is overwritten in place"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, copies, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg="what trainers have was written to")
