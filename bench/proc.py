"""What Linux says of a process: its peak memory, who descends from it, the bytes on its loopback."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil


def peak_mb(pid: int | str) -> float:
    """Peak resident memory of a process since it began to run its program, in MiB. "self": the caller's.

    Raises ProcessLookupError when it is gone.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid} is gone") from None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")  # a zombie has no memory


def loopback_bytes(pid: int) -> int:
    """Bytes sent so far over `lo` where a process lives, headers included. Each byte counts once."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise LookupError(f"process {pid} sees no interface `lo`")


def descendants(pids: Iterable[int]) -> list[psutil.Process]:
    """All that descend from these processes and are alive. Each knows its start, so that a new one is not taken for it."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            for process in psutil.Process(pid).children(recursive=True):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return list(found.values())
