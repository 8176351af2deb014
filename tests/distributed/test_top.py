"""`syncwright top` beside a job in real processes."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.distributed import job
from tests.distributed.launching import CLI

pytestmark = pytest.mark.processes

ROLES = ["server 0", "trainer 0", "trainer 1"]


def top(environment: dict[str, str], *options: str) -> str:
    shown = subprocess.run([*CLI, "top", *options], env=environment, capture_output=True, text=True, timeout=200)
    return shown.stdout if shown.returncode == 0 else shown.stderr


def test_top_finds_the_job_of_this_host_and_shows_its_roles(tmp_path: Path, environment: dict[str, str]):
    with tempfile.TemporaryDirectory(prefix="t") as short:
        environment = {**environment, "TMPDIR": short, "COLUMNS": "200"}
        how = ["run", "--metrics", "--trainers", "2", "--servers", "1", job.__file__, "watched", str(tmp_path)]
        process = subprocess.Popen([*CLI, *how], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while not all((tmp_path / "watched" / f"{k}.ready").exists() for k in range(2)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            lines = top(environment, "--once").splitlines()
            by_address = top(environment, "--at", lines[0].split()[-1])
            (tmp_path / "watched" / "stop").touch()
            assert process.wait(240) == 0, process.stdout
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=60)
        assert lines[0].startswith("The job at 127.0.0.1:")
        assert [line[:9].strip() for line in lines[4:]] == ROLES
        for line in lines[4:]:
            pushes, pulls, _, _, dropped = line.split()[5:10]
            assert float(pushes) > 0
            assert float(pulls) > 0
            assert dropped == "0"
        assert [line[:9].strip() for line in by_address.splitlines()[4:]] == ROLES
        assert "found 0 jobs of yours on this host" in top(environment)
        assert os.listdir(short) == []
