"""Where servers keep variables. A machine without an accelerator can tell what is refused, and where tensors would be."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
from torch import nn

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.errors import JobError, PlanError
from syncwright.lower import lower
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.runtime.devices import HOST, device_for, devices_of, moved, taken_to
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.slots import as_tensor
from tests.test_rows import Bags, batches, capture, parts

META = torch.device("meta")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).pow(2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def started(sync: ParameterServer, model: nn.Module) -> Loopback:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    return syncwright.loopback(step, model, optimizer, plan=Rules(sync), trainers=2, servers=2)


def test_host_memory_by_name_is_the_default() -> None:
    model, x = nn.Linear(4, 3), torch.randn(4, 4)
    found = []
    for device in (None, "cpu"):
        job = started(ParameterServer(partition=Even(2), device=device), mine := deepcopy(model))
        for _ in range(3):
            job.step([(x[:2],), (x[2:],)])
        job.sync()
        found.append(mine.state_dict())
        assert not any(part._devices for server in job.servers for part in server.there)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_device_that_the_host_does_not_have_is_named_when_the_server_starts() -> None:
    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    job = started(ParameterServer(device=f"cuda:{there + 7}"), nn.Linear(4, 3))
    with pytest.raises(
        JobError, match=rf"server 0: 'weight' is to be kept on the device 'cuda:{there + 7}', but its host has cpu"
    ):
        job.open((torch.ones(2, 4),))


@pytest.mark.parametrize("device", ["meta", "gpu", ""])
def test_what_is_no_device_is_refused_in_the_plan(device: str) -> None:
    with pytest.raises(
        PlanError, match=rf"^ParameterServer.device: found {re.escape(repr(device))}, expected a device that"
    ):
        ParameterServer(device=device)


def test_tables_of_rows_stay_in_host_memory() -> None:
    program = capture(model := Bags(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        PlanError, match=r"'table.weight': found device: cuda for a table of which rows travel; .* host memory"
    ):
        make_plan(Rules(ParameterServer(device="cuda")), program, 2, 1)


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, torch.optim.Rprop, torch.optim.ASGD], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("pieces", [1, 2])
def test_all_tensors_of_an_update_are_on_its_device(make: type, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on shapes alone: an operation on tensors of two devices would raise. State goes where its parameter goes."""
    monkeypatch.setattr("syncwright.runtime.devices._there", lambda device, variable, rank: META)
    model = nn.Linear(6, 4)
    program = syncwright.capture(step, model, make(model.parameters(), lr=0.1), torch.ones(2, 6))
    rules = Rules.of(ParameterServer(), {"weight": ParameterServer(partition=Even(pieces), device="cuda")})
    job = lower(program, make_plan(rules, program, 2, 2))
    ran = 0
    for part in job.servers:
        devices = devices_of(job, part)
        expected = {v.name for v in part.holds if v.shape and v.name.startswith("weight")}
        assert devices == dict.fromkeys(expected, META)
        for each in part.programs:
            device = device_for(each, devices)
            if device == HOST:
                assert moved(each, device) is each
                continue
            given = {n: _given(each.placeholders[n].meta["val"], device) for n in each.reads}
            results = moved(each, device).run(given)
            found = {n: r.device for n, r in results.items() if isinstance(r, torch.Tensor) and r.dim()}
            assert found
            assert set(found.values()) == {META}
            ran += 1
    assert ran >= pieces


def _given(val: object, device: torch.device) -> object:
    """Numbers stay in host memory; tensors come from there."""
    if not isinstance(val, torch.Tensor):
        return 0.5
    return taken_to(device, torch.ones(val.shape, dtype=val.dtype))


def test_what_travels_is_in_host_memory() -> None:
    assert as_tensor(torch.ones(2)).device == HOST
    assert as_tensor(0.5).tolist() == 0.5
    assert taken_to(META, torch.ones(2)).device == META  # type: ignore[attr-defined]
    assert taken_to(META, torch.ones(())).device == HOST  # type: ignore[attr-defined]


def test_tables_beside_are_as_they_were() -> None:
    model = Bags()
    rules = Rules.of(ParameterServer(), {"head.*": ParameterServer(device="cpu")})

    def rows(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(ids) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(rows, model, optimizer, plan=rules, trainers=2, servers=1)
    losses = [job.step(list(each)) for each in zip(*parts(batches(), 2), strict=True)]
    assert len(losses) == len(batches())
