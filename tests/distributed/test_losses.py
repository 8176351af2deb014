"""A trainer that is lost, and one that pauses: how the others go on is what the mode says. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.launching import CLI
from tests.scripts.early import STEPS as STEPS_OF_EACH
from tests.scripts.paused import PAUSED_AT, STEPS

pytestmark = pytest.mark.processes

SCRIPT = Path(__file__).parent.parent / "scripts" / "paused.py"
LONGEST = 240.0


@contextmanager
def job(
    folder: Path, *arguments: str, environment: dict[str, str], script: Path = SCRIPT
) -> Iterator[subprocess.Popen[str]]:
    how = ["run", "--trainers", "2", "--servers", "1", str(script), str(folder), *arguments]
    environment = {**environment, "PYTHONPATH": str(SCRIPT.parent.parent.parent)}
    process = subprocess.Popen(
        [*CLI, *how], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        wake(folder)
        process.terminate()
        process.communicate(timeout=LONGEST)


def wake(folder: Path) -> None:
    """Lets trainer 1 go on, where it has paused."""
    pid = folder / "1.pid"
    if pid.exists() and Path(f"/proc/{pid.read_text()}").exists():
        os.kill(int(pid.read_text()), signal.SIGCONT)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():
        assert time.monotonic() < deadline, "the job is late"
        time.sleep(0.05)


def steps(folder: Path, rank: int) -> int:
    path = folder / f"{rank}.steps"
    return int(path.read_text() or 0) if path.exists() else 0


def is_paused(folder: Path) -> bool:
    pid = folder / "1.pid"
    if steps(folder, 1) != PAUSED_AT or not pid.exists():
        return False
    return Path(f"/proc/{pid.read_text()}/stat").read_text().rpartition(") ")[2].startswith("T")


def added(steps: int) -> float:
    """What a trainer has added under geo, of two, exchanging after every second step and at its end. Each step moves by -1;
    of what is not yet added half is."""
    total, left = 0.0, 0.0
    for number in range(1, steps + 1):
        left -= 1
        if number % 2 == 0 or number == steps:
            total, left = total + left / 2, left / 2
    return total


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sync", -float(STEPS)),
        ("async", -float(STEPS + PAUSED_AT)),
        ("local_steps", -float(STEPS)),
        ("geo", added(STEPS) + added(PAUSED_AT - 1)),
    ],
)
def test_the_others_go_on_without_a_trainer_that_is_killed(tmp_path: Path, environment, mode: str, expected: float):
    """Remaining gradients all 1 give 1.0, not half of it; asynchronous, every push of the lost one counts once. A mean of
    what trainers that train alone have come to is that of those who are left."""
    with job(tmp_path, mode, "SIGKILL", environment=environment) as process:
        output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, output
    assert "was ended by SIGKILL; the others go on without it" in output
    assert "server 0 goes on without trainer 1, which is lost" in output
    assert float((tmp_path / "0.value").read_text()) == expected


@pytest.mark.parametrize(("mode", "further"), [("3", 3), ("0", 0), ("async", STEPS - PAUSED_AT)])
def test_a_trainer_that_pauses_holds_others_back_as_the_mode_says(tmp_path: Path, environment, mode: str, further: int):
    """staleness=3 stops at three steps more; asynchronous goes on; when it wakes, all are done."""
    with job(tmp_path, mode, "SIGSTOP", environment=environment) as process:
        until(lambda: is_paused(tmp_path) and steps(tmp_path, 0) >= PAUSED_AT + further)
        time.sleep(1.0)
        assert steps(tmp_path, 0) == PAUSED_AT + further
        wake(tmp_path)
        output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, output
    assert [float((tmp_path / f"{rank}.value").read_text()) for rank in range(2)] == [-2.0 * STEPS] * 2


def test_in_step_the_others_wait_and_name_who_is_late(tmp_path: Path, environment):
    with job(tmp_path, "sync", "SIGSTOP", environment=environment) as process:
        until(lambda: is_paused(tmp_path))
        assert process.stdout is not None
        said = next(line for line in process.stdout if "DeadlineExceeded: " in line)
        assert steps(tmp_path, 0) == PAUSED_AT
    assert "trainer 1" in said
    assert "has been silent for" in said


@pytest.mark.parametrize(
    ("mode", "expected"), [("async", -float(sum(STEPS_OF_EACH))), ("geo", sum(map(added, STEPS_OF_EACH)))]
)
def test_who_has_left_waits_for_the_last_value_as_long_as_others_train(
    tmp_path: Path, environment, mode: str, expected: float
):
    """Longer than any deadline: all end with what all have pushed."""
    with job(tmp_path, mode, environment=environment, script=SCRIPT.parent / "early.py") as process:
        output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, output
    assert [float((tmp_path / f"{rank}.value").read_text()) for rank in range(2)] == [expected] * 2
