"""Gathers under way at once corrupted the heap in one form of Gloo's (DESIGN, section 6): ours must not."""

from pathlib import Path

import pytest

from tests.distributed.launching import launched

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("shared", ["1", "0"])
def test_many_gathers_under_way_come_out_right_in_twenty_rounds(shared: str, monkeypatch: pytest.MonkeyPatch):
    """In memory that trainers share, and over sockets."""
    monkeypatch.setenv("SYNCWRIGHT_SHARED_MEMORY", shared)
    assert launched(str(Path(__file__).parent / "gathering.py"), [], 2, 0) == 0
