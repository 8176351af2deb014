"""Wrong messages to a real server; a million of them: `python -m tests.fuzz.frames`."""

from __future__ import annotations

import pytest

from tests.fuzz.frames import run

pytestmark = pytest.mark.processes


def test_a_server_survives_twenty_thousand_wrong_messages():
    assert run(20_000, seed=7).faults() == []
