"""A table that no trainer ever holds: two trainers and two servers in processes of their own, against loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import syncwright
from syncwright.runtime.sharding import part_of
from tests.distributed.launching import CLI
from tests.scripts import deferred

pytestmark = pytest.mark.processes

MOST_SECONDS = 300.0


def test_a_deferred_table_is_trained_by_its_servers_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    how = ["run", "--trainers", "2", "--servers", "2", deferred.__file__, str(tmp_path)]
    done = subprocess.run(
        [*CLI, *how], env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    model, optimizer = deferred.build(deferred=False)
    job = syncwright.loopback(deferred.step, model, optimizer, plan=deferred.PLAN, trainers=2, servers=2)
    parts = [[part_of(batch, 2, rank) for rank in range(2)] for batch in deferred.batches()]
    losses = [float(job.step(each)) for each in parts]  # type: ignore[arg-type]
    state = job.state_dict()
    table, sums = state["model"]["table.weight"], state["optimizer"]["state"][0]["sum"]  # type: ignore[index]
    for rank in range(2):
        assert (tmp_path / f"{rank}.said").read_text() == deferred.said(losses, table, sums)
        largest = int((tmp_path / f"{rank}.nbytes").read_text())
        assert (
            largest <= 1.2 * deferred.AT_A_TIME * deferred.WIDTH * 4
        )  # of what it asked for; the table has 30 times that
