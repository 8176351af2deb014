"""What the whole run says at its end."""

from __future__ import annotations

COVER = "test_equivalence.py::test_equals_one_device"


def pytest_terminal_summary(terminalreporter) -> None:
    """How many cases were compared with one device."""
    outcomes = {
        outcome: sum(COVER in getattr(report, "nodeid", "") for report in terminalreporter.stats.get(outcome, ()))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(outcomes.values()):
        counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"pairwise cover against one device: {counts}; `make matrix` runs every case")
