"""Jobs as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

CLI = [sys.executable, "-c", "from syncwright.cli import app; app()"]


def launched(
    script: str, arguments: Sequence[str], trainers: int, servers: int, environment: Mapping[str, str] | None = None
) -> int:
    """The status of `syncwright run`; what the job writes goes where this process writes."""
    counts = ["--trainers", str(trainers), "--servers", str(servers)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run([*CLI, "run", *counts, script, *arguments], env=environment, check=False).returncode
