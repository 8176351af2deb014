"""Which jobs run on this host: the launcher of each leaves a note in its private folder, which goes when it ends."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec

NOTE = "job.json"


class Announced(msgspec.Struct, frozen=True):
    """A job: its launcher's process, the address of its store, and the script."""

    pid: int
    store: str
    script: str


def announce(folder: str, job: Announced) -> None:
    """Leaves the note of `job` in its launcher's folder."""
    Path(folder, NOTE).write_bytes(msgspec.json.encode(job))


def announced() -> list[Announced]:
    """This user's jobs on this host whose launchers live; what a launcher that was killed left behind is passed over."""
    found = []
    for note in sorted(Path(tempfile.gettempdir()).glob(f"syncwright-*/{NOTE}")):
        try:
            if note.stat().st_uid == os.getuid() == note.parent.stat().st_uid:
                found.append(msgspec.json.decode(note.read_bytes(), type=Announced))
        except (OSError, msgspec.DecodeError):
            continue  # its launcher ends, or is only just writing it
    return [job for job in found if _lives(job.pid)]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
