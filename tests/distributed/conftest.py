"""What the tests that start processes share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def environment() -> dict[str, str]:
    """For roles: this environment, in which the package is found, with one thread each."""
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
