"""Trainers whose loaders end after different numbers of batches, in processes: what the loopback gives, and one device."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path

import pytest
import torch

import syncwright
from tests.distributed.launching import launched
from tests.scripts import uneven

pytestmark = pytest.mark.processes

NONE = (torch.empty(0, 4), torch.empty(0, 2))


def calls() -> list[list[tuple]]:
    """By step what every trainer has."""
    found = []
    for epoch in range(len(uneven.EPOCHS)):
        of_each = [uneven.batches(epoch, trainer) for trainer in range(uneven.TRAINERS)]
        found += [list(parts) for parts in zip_longest(*of_each, fillvalue=NONE)]
    return found


def test_all_go_on_until_the_last_loader_has_ended(tmp_path: Path, environment: dict[str, str]) -> None:
    script = str(Path(uneven.__file__))
    assert launched(script, [str(tmp_path)], uneven.TRAINERS, 0, environment=environment) == 0
    for name, plan in uneven.PLANS.items():
        model, optimizer = uneven.build()
        job = syncwright.loopback(uneven.step_of(name), model, optimizer, plan=plan, trainers=3, servers=3)
        losses = [job.step(parts) for parts in calls()]
        job.leave()
        job.sync()
        for rank in range(uneven.TRAINERS):
            report = torch.load(tmp_path / f"{name} {rank}.pt")
            assert [len(each) for each in report["losses"]] == [max(each) for each in uneven.EPOCHS]
            if name != "silent":
                assert [*map(float, chain(*report["losses"]))] == pytest.approx([*map(float, losses)], rel=1e-5)  # type: ignore[arg-type]
            for key, value in model.state_dict().items():
                assert torch.allclose(report["end"][key], value, atol=1e-6), (name, key)
    model, optimizer = uneven.build()
    for parts in calls():
        uneven.step(model, optimizer, *map(torch.cat, zip(*parts, strict=True)))
    mixed = torch.load(tmp_path / "mixed 0.pt")["end"]
    silent = torch.load(tmp_path / "silent 0.pt")["end"]
    for key, value in model.state_dict().items():
        assert torch.allclose(mixed[key], value, atol=1e-5), key
        assert torch.allclose(silent[key], value, atol=1e-5), key
