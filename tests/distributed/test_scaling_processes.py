"""A loss scale in processes: flags over collectives and between servers give what loopback gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import test_scaling as given
from tests.distributed.launching import launched

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("plan", ["zero3", "a mix"])
def test_all_skip_or_none(plan: str, tmp_path: Path, environment: dict[str, str]) -> None:
    script = str(Path(__file__).parent / "scaled_job.py")
    assert launched(script, [str(tmp_path), plan], 2, given.PLANS[plan][1], environment=environment) == 0
    job = given.job_of(plan, given.scaler_of(), given.ADAMW, clip=True)
    given.trained(job, given.batches())
    for rank in range(2):
        report = torch.load(tmp_path / f"{rank}.pt")
        assert report["numbers"] == list(given.NUMBERS)
        given.check_equal(report["model"], dict(job.model.state_dict()))
