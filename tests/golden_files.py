"""Golden files: text that a test produces, kept beside the tests and compared to the letter."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, text: str) -> None:
    """Compares with golden/`name`.txt; with UPDATE_GOLDEN=1 in the environment, writes it."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    if text != expected:
        lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), "expected", "found", n=0, lineterm="")
        raise AssertionError(f"{path.name} differs; set UPDATE_GOLDEN=1 and look at git diff\n" + "\n".join(lines))
