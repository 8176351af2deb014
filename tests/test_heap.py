"""Freed memory stays with the process: the next step does not pay for its pages again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

TURNS, NBYTES, PAGE = 20, 40 << 20, 4096

SCRIPT = f"""
import resource
from syncwright.runtime.heap import keep_freed_memory
import torch

print(keep_freed_memory())
def touched():
    torch.ones({NBYTES} // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TURNS}):  # the heap may grow by a block or two at first, as its holes happen to lie
    before = touched()
for _ in range({TURNS}):
    last = touched()
print(last - before)
"""


def run(**variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**environment(), **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def environment() -> dict[str, str]:
    theirs = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "SYNCWRIGHT_KEEP_MEMORY", "LD_PRELOAD")
    return {name: value for name, value in os.environ.items() if name not in theirs}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_touched_once() -> None:
    kept, faults = run()
    assert kept == "True"
    assert int(faults) < NBYTES // PAGE, "less than one block's pages, in 20 turns"
    assert run(SYNCWRIGHT_KEEP_MEMORY="0")[0] == "False"


def test_the_users_own_setting_stays() -> None:
    assert run(MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
