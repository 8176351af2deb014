"""Roles are processes, and Python draws PYTHONHASHSEED anew for each: nothing that they must agree on depends on it.

The numbers of SEMANTICS for partitions, placements and reductions are tested exactly under two values of it, and what
two processes with different values derive is compared to the letter.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed import deriving

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SEEDS = ("0", "1")
EXACT = ("test_partition", "test_placement", "test_resolve", "test_strategies", "test_semantics")
UNRELATED = "clip or norms or schedule or test_buffers or backward or outlives or set_to_zero or average_of_weights"
"""What `test_semantics` holds beside reductions; it takes longer than all the rest."""
MOST_SECONDS = 300.0


def run(command: list[str], environment: dict[str, str]) -> list[str]:
    """What the command prints, under each of the seeds; it must end well under both."""

    def once(seed: str) -> str:
        variables = {**environment, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, *command], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=MOST_SECONDS
        )
        assert done.returncode == 0, f"PYTHONHASHSEED={seed} {' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    with ThreadPoolExecutor(len(SEEDS)) as pool:
        return list(pool.map(once, SEEDS))


def test_plans_programs_and_digests_are_the_same(environment: dict[str, str]):
    first, second = run(["-m", "tests.distributed.deriving"], environment)
    assert first.splitlines() == second.splitlines()
    plans = len(deriving.PLANS) + 1
    assert len(re.findall(r"^digest: [0-9a-f]{32}$", first, re.MULTILINE)) == len(deriving.FAMILIES) * plans


def test_the_exact_numbers_hold(environment: dict[str, str]):
    files = [f"tests/{name}.py" for name in EXACT]
    options = ["-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"not ({UNRELATED})"]
    outputs = run(["-m", "pytest", *options, *files], environment)
    first, second = (re.findall(r"(\d+) passed", output) for output in outputs)
    assert first == second
    assert len(first) == 1, f"expected one line that counts what passed:\n{outputs[0]}"
