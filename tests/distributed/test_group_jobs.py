"""Groups of trainers in processes: four on this machine, taken for two hosts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import syncwright
from tests.scripts import groups

pytestmark = pytest.mark.processes

SCRIPT = Path(groups.__file__)
CLI = [sys.executable, "-c", "from syncwright.cli import app; app()", "run", "--trainers", "4"]


def test_processes_do_what_loopback_does(tmp_path: Path, environment) -> None:
    """Over a node, by node, within a node and among two, in one step: to the bit what all trainers in one process do; and what
    all trainers share is one device."""
    more = {**environment, "SYNCWRIGHT_HOSTS": "2,2"}
    run = subprocess.run([*CLI, str(SCRIPT), str(tmp_path)], env=more, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    model, optimizer = groups.make()
    job = syncwright.loopback(groups.step, model, optimizer, plan=groups.RULES, trainers=4, hosts=(2, 2))
    losses = [float(job.step(groups.parts(k))) for k in range(groups.STEPS)]  # type: ignore[arg-type]
    job.sync()
    alone, optimizer = groups.make()
    for k in range(groups.STEPS):
        groups.step(alone, optimizer, *groups.batch(k))
    for rank, replica in enumerate(job.replicas):
        report = torch.load(tmp_path / f"{rank}.pt")
        assert (report["groups"], report["losses"]) == ((2, 2), losses)
        for name, value in report["model"].items():
            assert torch.equal(value, replica.values.get(name, dict(model.named_parameters()).get(name))), name  # type: ignore[arg-type]
            if name.startswith(("first", "second")):
                torch.testing.assert_close(value, dict(alone.named_parameters())[name].detach(), rtol=1e-12, atol=1e-12)
