"""Trainers that push and pull once for each host, in processes: four on this machine, taken for two hosts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "scripts" / "on_host.py"
CLI = [sys.executable, "-c", "from syncwright.cli import app; app()", "run", "--servers", "1"]
LONGEST = 240.0


def run(folder: Path, trainers: int, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "--trainers", str(trainers), str(SCRIPT), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="memory that processes share")
def test_hosts_push_and_pull_once_and_go_on_without_who_leaves(tmp_path: Path, environment) -> None:
    """Gradients are 1, 2, 3, 4; trainer 0, which pushes and pulls for its host, leaves after a step, then 3, then 1, then 2.

    The means are 2.5, 3 of three, 2.5 of two, 3 of one; who leaves sees the value after its own last step. Beside a push for the
    host each trainer sends its part of the loss in each of its steps, and pulls the loss; who pulls for the host asks for the
    value of each of those steps and for the last, the others for the last.
    """
    done = run(tmp_path, 4, {**environment, "SYNCWRIGHT_HOSTS": "2,2"})
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [0.0, -2.5 * 3, -5.5 * 2.5, -8.0 * 3]
    expected = [
        [[2, 2], losses[:1], 1 + 1, 1 + 1 + 1, -2.5],
        [[2, 2], losses[:3], 3 + 2, 3 + 2 + 1, -8.0],
        [[2, 2], losses[:4], 4 + 4, 4 + 4 + 1, -11.0],
        [[2, 2], losses[:2], 2 + 0, 2 + 0 + 1, -5.5],
    ]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)] == expected


def test_without_memory_to_share_it_says_so(tmp_path: Path, environment) -> None:
    done = run(tmp_path, 2, {**environment, "SYNCWRIGHT_SHARED_MEMORY": "0"})
    assert done.returncode != 0
    assert (
        "ClusterError: merge_on_host, copy_on_host: the trainers of this host share no memory"
        in done.stdout + done.stderr
    )
