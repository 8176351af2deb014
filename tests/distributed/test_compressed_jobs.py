"""Gradients compressed in every way, over sockets and many buckets: what the loopback computes, to the bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

import syncwright
from tests.distributed.launching import launched
from tests.scripts import compressed

pytestmark = pytest.mark.processes


def test_every_compression_in_buckets_of_its_own(tmp_path: Path, environment: dict[str, str]) -> None:
    """In memory that trainers share, and over sockets."""
    script = str(Path(compressed.__file__))
    assert launched(script, [str(tmp_path)], 2, 0, environment=environment) == 0
    job = syncwright.loopback(
        compressed.step, *compressed.build(), plan=compressed.PLAN, trainers=2, check_replicas=True
    )
    losses = [
        float(job.step([compressed.batch(rank, at) for rank in range(2)]))  # type: ignore[arg-type]
        for at in range(compressed.STEPS)
    ]
    for way, rank in product(compressed.SHARED, range(2)):
        values, found = torch.load(tmp_path / f"{way}.{rank}.pt")
        assert found == losses
        for name, value in job.state_dict()["model"].items():
            assert torch.equal(values[name], value), (way, name)
