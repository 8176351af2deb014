"""The launcher: environment, prefixes, and an end in bounded time whatever a role does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from syncwright.errors import ClusterError
from syncwright.runtime.launch import Patience, launch

pytestmark = pytest.mark.processes

QUICK = Patience(serve=0.3, end=0.3, terminate=0.3)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "role.py"


def test_each_role_knows_its_place(
    script: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import os, sys\n"
        "e = os.environ\n"
        "names = 'SYNCWRIGHT_TRAINERS', 'SYNCWRIGHT_SERVERS', 'RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS'\n"
        "print(e['SYNCWRIGHT_ROLE'], e['SYNCWRIGHT_RANK'], *(e.get(name) for name in names), sys.argv[1:])\n"
    )
    inherited = {**environment, "RANK": "7", "WORLD_SIZE": "8"}
    assert launch(str(script), ["a b", "-c"], 2, 1, environment=inherited) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "[server 0] server 0 2 1 None None 1 ['a b', '-c']",
        "[trainer 0] trainer 0 2 1 0 2 1 ['a b', '-c']",
        "[trainer 1] trainer 1 2 1 1 2 1 ['a b', '-c']",
    ]


def test_one_trainer_alone_writes_unprefixed(
    script: Path, environment: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    script.write_text("print('hello')")
    assert launch(str(script), [], 1, 0, environment=environment) == 0
    assert capfd.readouterr().out == "hello\n"


def test_the_first_failure_ends_all_and_is_the_status(
    script: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import os, signal, sys, time\n"
        "if os.environ['SYNCWRIGHT_ROLE'] == 'server': sys.exit(3)\n"
        "if os.environ['SYNCWRIGHT_RANK'] == '1': signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)\n"
    )
    begun = time.monotonic()
    assert launch(str(script), [], 2, 1, environment=environment, patience=QUICK) == 3
    assert time.monotonic() - begun < 5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("syncwright: server 0 (pid ")
    assert said[0].endswith(") ended with status 3; ending the other roles")


def test_a_server_that_does_not_end_after_the_trainers_is_ended(
    script: Path, environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(
        "import os, time\nif os.environ['SYNCWRIGHT_ROLE'] == 'server': time.sleep(60)\n",
    )
    assert launch(str(script), [], 1, 1, environment=environment, patience=QUICK) == 1
    assert "did not end within 0.3 s after the last trainer" in capsys.readouterr().err


def test_counts_that_cannot_be_meant() -> None:
    with pytest.raises(ClusterError, match="0 trainers"):
        launch("x.py", [], 0, 1)


def test_ctrl_c_ends_all_and_leaves_nothing(script: Path, environment: dict[str, str]) -> None:
    script.write_text(
        "import os, time\n"
        "print(os.getpid(), os.environ['SYNCWRIGHT_STORE'], os.environ['SYNCWRIGHT_SOCKETS'])\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    call = f"from syncwright.runtime.launch import launch; raise SystemExit(launch({str(script)!r}, [], 2, 1))"
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        launcher = subprocess.Popen(
            [sys.executable, "-c", call],
            env={**environment, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert launcher.stdout is not None
        roles = [launcher.stdout.readline().split("] ")[1].split() for _ in range(3)]
        assert Path(roles[0][2]).parent == Path(folder)
        launcher.send_signal(signal.SIGINT)
        rest, _ = launcher.communicate(timeout=10)
        assert launcher.returncode == 128 + signal.SIGINT
        assert rest.count("interrupted") == 3
        assert os.listdir(folder) == []
    for pid, _, _ in roles:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    host, port = roles[0][1].split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=1)
