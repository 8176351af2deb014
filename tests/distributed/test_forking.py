"""Roles that are forks of the launcher are what `python script` is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import CLI

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="roles are started anew here")]

SCRIPTS = {
    "itself": """
import os, pickle, sys, threading, torch
import beside
class Own: pass
print(__name__, os.path.basename(__file__), sys.argv[1:], beside.VALUE, type(pickle.loads(pickle.dumps(Own()))) is Own)
print(torch.get_num_threads(), threading.active_count(), os.environ["OMP_NUM_THREADS"])
print(repr(sys.stdin.read()), sys.path[0] == os.path.dirname(os.path.abspath(__file__)))
""",
    "processes of its own": """
import multiprocessing
def twice(x): return 2 * x
if __name__ == "__main__":
    for way in ("spawn", "fork"):
        with multiprocessing.get_context(way).Pool(1) as pool: print(way, pool.map(twice, [1, 2]))
""",
    "says nothing": "raise SystemExit",
    "a status": "raise SystemExit(5)",
    "a word": "raise SystemExit('so')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "raise KeyboardInterrupt",
    "an error": "def fails():\n    raise ValueError('here')\n\nfails()\n",
    "no Python": "x = ",
    "at exit": "import atexit; atexit.register(print, 'at exit')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('waited for'))).start()",
    "a pool": "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1).submit(print, 'pooled')",
}

FORKS = """
import json, os, sys
from syncwright.runtime.forking import fork, preload
preload()
found = {}
for script in sys.argv[1:]:
    role = fork("trainer 0", script, ["a b", "-c"], {**os.environ, "OMP_NUM_THREADS": "2"}, False, [])
    said = role.stdout.read().decode()
    found[script] = role.wait(), said
print(json.dumps(found))
"""


def forked(scripts: list[Path], environment: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Status and output of each script, run as a fork of one process."""
    command = [sys.executable, "-c", FORKS, *map(str, scripts)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {Path(script).stem: (status, said) for script, (status, said) in json.loads(done.stdout).items()}


def test_a_role_is_a_script_of_its_own_and_ends_as_one(tmp_path: Path, environment) -> None:
    """What it is told, what it imports, its status and every line that it writes, tracebacks among them."""
    (tmp_path / "beside.py").write_text("VALUE = 7")
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    paths = [tmp_path / f"{name}.py" for name in SCRIPTS]
    found = forked(paths, environment)
    for path in paths:
        alone = subprocess.run(
            [sys.executable, str(path), "a b", "-c"],
            env=environment | {"OMP_NUM_THREADS": "2"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert found[path.stem] == (alone.returncode, alone.stdout)


def test_random_numbers_are_a_roles_own(tmp_path: Path, environment) -> None:
    paths = [tmp_path / f"{name}.py" for name in ("one", "other")]
    for path in paths:
        path.write_text(
            "import random, torch, numpy\nprint(random.random(), float(torch.rand(())), numpy.random.rand())\n"
        )
    one, other = (said.split() for _, said in forked(paths, environment).values())
    assert len(one) == 3
    assert all(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_run_starts_roles_in_either_way(tmp_path: Path, environment, start: str) -> None:
    script = tmp_path / "role.py"
    script.write_text("import os, sys; print(os.environ['SYNCWRIGHT_ROLE'], sys.argv[1:], os.getpid() == os.getpgrp())")
    how = ["run", "--start", start, "--servers", "1", str(script), "-c"]
    done = subprocess.run([*CLI, *how], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    roles = ("server 0", "trainer 0", "trainer 1")
    assert sorted(done.stdout.splitlines()) == [f"[{role}] {role[:-2]} ['-c'] True" for role in roles]
