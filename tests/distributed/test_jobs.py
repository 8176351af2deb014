"""Whole jobs in real processes: equal to loopback and to DDP, and misuses that end in bounded time with a named error.

All jobs are started when the first test asks for one, a few at a time.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves as leaves

import syncwright
from syncwright.runtime.sharding import part_of
from tests.distributed import job
from tests.golden_files import check_golden

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SCRIPT = Path(job.__file__)
AT_ONCE = 4
MOST_SECONDS = 300.0
"""For a job on a machine that is busy with others; on a quiet one they take a few seconds each."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a job left: its status, what it wrote, its folder, and whatever lay in its temporary folder at the end."""

    status: int
    output: str
    folder: Path
    left_over: tuple[str, ...]

    def reports(self, case: str, trainers: int) -> list[dict]:
        """What each trainer has written in a case."""
        return [torch.load(self.folder / case / f"{rank}.pt", weights_only=False) for rank in range(trainers)]


@dataclass(frozen=True, slots=True)
class Setup:
    """How cases are started, joined by "+": by the launcher, by torchrun, or (neither) one process by hand with these
    variables."""

    case: str
    trainers: int
    servers: int = 0
    by: str = "launcher"


RIGHT = {
    "two trainers": Setup("ddp+alone+sharded", 2),
    "three trainers": Setup("gathered+kept+sharded_by_sockets+kept_by_sockets", 3),
    "mixed": Setup("mixed", 2, 1),
    "torchrun": Setup("mixed_once", 2, by="torchrun"),
    "alone, over servers": Setup("alone_at_servers", 2, 2),
    "sharded among four": Setup("sharded", 4),
    "early": Setup("early", 2, 1),
    "one compiles": Setup("one_compiles", 2, 1),
    "drifts": Setup("drifts", 2),
}
WRONG = {
    "trainer killed, all_reduce": Setup("trainer_killed_all_reduce", 2),
    "fewer servers than planned; then the server is killed": Setup("server_killed", 1, 1),
    "another model on trainer 1": Setup("another_model", 2),
    "the port is taken; then trainer 1 never starts": Setup("never_starts", 2, by="hand"),
    "trainer 1 is stopped": Setup("stopped", 2),
    "trainer 1 raises": Setup("raises", 2),
    "the server never comes to a step": Setup("server_never_steps", 1, 1),
    "trainer 1 leaves early": Setup("leaves_early", 2),
    "the trainer forgets to close": Setup("forgets_to_close", 1, 1),
    "the trainer raises outside of a with block": Setup("raises_outside", 1, 1),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Future[Ended]]]:
    """Every job by name, under way or ended."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        everyone = {**RIGHT, **WRONG}
        yield {name: pool.submit(start, each, tmp_path_factory.mktemp("job")) for name, each in everyone.items()}


def start(setup: Setup, folder: Path) -> Ended:
    with tempfile.TemporaryDirectory(prefix="t") as short:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": short}
        environment = {name: value for name, value in environment.items() if not name.startswith("SYNCWRIGHT_")}
        with tempfile.TemporaryFile("w+") as written:
            with by_hand() if setup.by == "hand" else nothing() as more:
                command = COMMANDS[setup.by](setup, folder)
                process = subprocess.Popen(
                    command, env={**environment, **more}, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT
                )
                status = ended(process, folder / setup.case, stop=setup.case == "mixed")
            written.seek(0)
            left_over = tuple(
                name for name in os.listdir(short) if not name.startswith("torchelastic")
            )  # torchrun's own
            return Ended(status, written.read(), folder, left_over)


def ended(process: subprocess.Popen, folder: Path, stop: bool) -> int:
    """Waits; sends Ctrl-C, if it is to be stopped so, when both trainers have written what they found."""
    deadline = time.monotonic() + MOST_SECONDS
    try:
        while stop and process.poll() is None and not all((folder / f"{k}.ready").exists() for k in range(2)):
            assert time.monotonic() < deadline, "the job did not come to its end"
            time.sleep(0.1)
        if stop:
            process.send_signal(signal.SIGINT)
        return process.wait(max(1.0, deadline - time.monotonic()))
    finally:
        for end in (process.terminate, process.kill):
            if process.poll() is None:
                end()
                time.sleep(1)


LAUNCH = """
import sys
from syncwright.runtime.forking import can_fork
from syncwright.runtime.launch import Patience, launch
script, case, folder, trainers, servers = sys.argv[1:]
patience = Patience(serve=20, end=25, terminate=2) if case != "stopped" else Patience(serve=20, end=3, terminate=2)
raise SystemExit(launch(script, [case, folder], int(trainers), int(servers), patience=patience, forks=can_fork()))
"""


def launched(setup: Setup, folder: Path) -> list[str]:
    numbers = [str(setup.trainers), str(setup.servers)]
    return [sys.executable, "-c", LAUNCH, str(SCRIPT), setup.case, str(folder), *numbers]


def torchrun(setup: Setup, folder: Path) -> list[str]:
    how = ["--standalone", f"--nproc-per-node={setup.trainers}"]
    return [sys.executable, "-m", "torch.distributed.run", *how, str(SCRIPT), setup.case, str(folder)]


COMMANDS: dict[str, Callable[[Setup, Path], list[str]]] = {
    "launcher": launched,
    "torchrun": torchrun,
    "hand": lambda setup, folder: [sys.executable, str(SCRIPT), setup.case, str(folder)],
}


class by_hand:
    """Torchrun's variables without torchrun, and a port that somebody listens at."""

    def __enter__(self) -> dict[str, str]:
        self._taken = socket.create_server(("127.0.0.1", 0))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        own = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        return own | {"MASTER_PORT": str(self._taken.getsockname()[1]), "FREE_PORT": str(port)}

    def __exit__(self, *_: object) -> None:
        self._taken.close()


class nothing:
    def __enter__(self) -> dict[str, str]:
        return {}

    def __exit__(self, *_: object) -> None:
        pass


# --- right jobs ----------------------------------------------------------------------------------------


def expected(
    trainers: int, servers: int, plan: syncwright.Rules = job.MIXED
) -> tuple[list[torch.Tensor], dict[str, object], torch.Tensor]:
    """The losses, the state and the evaluation of the same training in loopback."""
    model, optimizer = job.build()
    plain = job.after_plain_steps(2)
    model.load_state_dict(plain["model"])  # type: ignore[arg-type]
    optimizer.load_state_dict(plain["optimizer"])  # type: ignore[arg-type]
    loopback = syncwright.loopback(job.step, model, optimizer, plan=plan, trainers=trainers, servers=servers)
    torch.manual_seed(3)
    losses = []
    for batch in job.batches(job.data(job.EXAMPLES, 0), job.BATCH, shuffle=True):
        losses.append(loopback.step([own_part(batch, trainers, rank) for rank in range(trainers)]))
    state = loopback.state_dict()
    with torch.no_grad():
        parts = [
            part_of(tuple(b), trainers, k) for b in job.batches(job.data(job.HELD_OUT, 2), 4) for k in range(trainers)
        ]
        return losses, state, torch.cat([model(x) for x, _ in parts])  # type: ignore[misc]


def own_part(batch: object, trainers: int, rank: int) -> tuple:
    """A trainer's part in memory of its own, as in a process: how MKL adds up depends on where a matrix begins."""
    return tuple(part.clone() for part in part_of(tuple(batch), trainers, rank))  # type: ignore[arg-type,union-attr]


def check_report(found: Mapping[str, object], trainers: int, servers: int, plan: syncwright.Rules = job.MIXED) -> None:
    losses, state, outputs = expected(trainers, servers, plan)
    assert job.same(found["losses"], losses)
    assert job.same(found["state"], state)
    assert torch.equal(found["outputs"], outputs)  # type: ignore[arg-type]
    assert found["restored"] is True


@pytest.mark.parametrize(("name", "servers"), [("mixed", 1), ("torchrun", 2)])
def test_a_mixed_plan_in_processes_is_loopback(jobs, name: str, servers: int):
    done = jobs[name].result()
    reports = done.reports(RIGHT[name].case, 2)
    for report in reports:
        check_report(report, 2, servers)
    seen = [i for report in reports for i in report["seen"]]
    assert sorted(seen) == list(range(job.EXAMPLES))
    assert [len(report["seen"]) for report in reports] == [19, 18]
    if name == "torchrun":
        assert done.status == 0, done.output
        assert done.left_over == ()


@pytest.mark.parametrize(
    ("name", "case", "trainers"),
    [
        ("two trainers", "sharded", 2),
        ("sharded among four", "sharded", 4),
        ("three trainers", "sharded_by_sockets", 3),
    ],
)
def test_own_parts_in_processes_are_as_in_loopback(jobs, name: str, case: str, trainers: int):
    """In memory that is shared, to the bit. Gloo adds up in an order of its own."""
    done = jobs[name].result()
    assert done.status == 0, done.output
    losses, state, outputs = expected(trainers, 0, job.SHARDED)
    for found in done.reports(case, trainers):
        if case == "sharded":
            check_report(found, trainers, 0, job.SHARDED)
            continue
        torch.testing.assert_close(found["losses"], losses)
        torch.testing.assert_close(found["outputs"], outputs)
        for one, other in zip(leaves(found["state"]), leaves(state), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", ["kept", "kept_by_sockets"])
def test_what_one_trainer_keeps_in_processes_is_as_in_loopback(jobs, case: str):
    done = jobs["three trainers"].result()
    assert done.status == 0, done.output
    model, optimizer = job.matrices()
    loopback = syncwright.loopback(job.step, model, optimizer, plan=job.KEPT, trainers=3)
    given = [[own_part(b, 3, k) for k in range(3)] for b in job.batches(job.data(job.EXAMPLES, 0), job.BATCH)]
    losses = [loopback.step(each) for each in given]
    state = loopback.state_dict()
    loopback.sync()
    with torch.no_grad():
        outputs = model(job.data(job.HELD_OUT, 2).tensors[0])
    for found in done.reports(case, 3):
        torch.testing.assert_close(found["losses"], losses)
        torch.testing.assert_close(found["outputs"], outputs)
        for one, other in zip(leaves(found["state"]), leaves(state), strict=True):
            torch.testing.assert_close(one, other)


def test_gathered_rows_in_processes_are_as_in_loopback(jobs):
    """Parts of several sizes, and one trainer without examples; every replica ends with the same bits."""
    done = jobs["three trainers"].result()
    assert done.status == 0, done.output
    model, optimizer = job.tables()
    loopback = syncwright.loopback(job.products, model, optimizer, plan=job.GATHERED, trainers=3)
    losses = [loopback.step(each) for each in zip(*map(job.lookups, range(3)), strict=True)]
    expected = loopback.state_dict()
    for found in done.reports("gathered", 3):
        assert job.same(found["losses"], losses)
        assert job.same(found["state"], expected)


@pytest.mark.parametrize(
    ("name", "case", "plan"),
    [("two trainers", "alone", job.ALONE), ("alone, over servers", "alone_at_servers", job.AT_SERVERS)],
    ids=["all_reduce", "servers"],
)
def test_trainers_that_train_alone_end_alike(jobs, name: str, case: str, plan: syncwright.Rules):
    done = jobs[name].result()
    assert done.status == 0, done.output
    reports = done.reports(case, 2)
    model, optimizer = job.build()
    loopback = syncwright.loopback(job.step, model, optimizer, plan=plan, trainers=2, servers=2)
    for batch in job.batches(job.data(job.EXAMPLES, 0), job.BATCH):
        loopback.step([own_part(batch, 2, rank) for rank in range(2)])
    between = loopback.state_dict()["model"]
    loopback.leave()
    end = loopback.state_dict()["model"]
    assert not job.same(between, end)
    for report in reports:
        assert job.same(report["between"], between)
        assert job.same(report["end"], end)


def test_alone_servers_are_embedded(tmp_path: Path):
    job.mixed_once(tmp_path)
    check_report(torch.load(tmp_path / "0.pt", weights_only=False), 1, 1)


def test_what_a_job_saved_goes_on_under_another_plan_and_in_plain_pytorch(jobs):
    """One step from the same saved state: all-reduce in loopback, and plain PyTorch on the joined batch."""
    saved = jobs["mixed"].result().reports("mixed", 2)[0]["state"]
    batch, after = job.data(4, 5).tensors, []
    for by_syncwright in (False, True):
        model, optimizer = job.build()
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # a step writes to what it was given
        if by_syncwright:
            loopback = syncwright.loopback(job.step, model, optimizer, trainers=2)
            loopback.step([part_of(batch, 2, rank) for rank in range(2)])  # type: ignore[misc]
            after.append(loopback.state_dict()["model"])
        else:
            job.step(model, optimizer, *batch)
            after.append(model.state_dict())
    torch.testing.assert_close(after[0], after[1], rtol=1e-5, atol=1e-6)


def test_all_reduce_is_ddp_bit_for_bit(jobs):
    done = jobs["two trainers"].result()
    assert done.status == 0, done.output
    for rank in range(2):
        for name in ("mlp", "gpt"):
            assert f"[trainer {rank}] {name} after 5 steps is equal to DDP: True" in done.output


def test_without_collectives_a_trainer_may_leave_early(jobs):
    done = jobs["early"].result()
    assert done.status == 0, done.output
    assert "trainer 0: 5 steps, better: True" in done.output
    assert "trainer 1: 2 steps, better: True" in done.output


def test_who_says_that_it_compiles_is_waited_for_beyond_the_deadline(jobs):
    done = jobs["one compiles"].result()
    assert done.status == 0, done.output


def test_replicas_that_drift_apart_end_the_job_where_they_are_checked(jobs):
    done = jobs["drifts"].result()
    assert done.status != 0, done.output
    assert (
        "Disagreement: '2.bias' is not the same on all trainers after step 2: trainer 1 has other bits" in done.output
    )
    assert "after step 3" not in done.output


def test_ctrl_c_ends_everything_and_frees_the_ports(jobs):
    done = jobs["mixed"].result()
    assert done.status == 128 + signal.SIGINT, done.output
    assert done.left_over == ()
    ready = re.findall(r"\[trainer \d\] ready (\d+) ([\d.]+):(\d+) (\S+)", done.output)
    assert len(ready) == 2
    for pid, host, port, sockets in ready:
        assert not Path(sockets).exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)), timeout=1)


# --- misuses -------------------------------------------------------------------------------------------


def test_misuses_are_told(jobs):
    said = []
    for name in WRONG:
        done = jobs[name].result()
        assert done.status != 0, done.output
        assert done.left_over == (), f"{name}: {done.left_over}"
        said.append(f"== {name}\n" + "\n".join(told(done.output)) + "\n")
    check_golden("errors/jobs", "\n".join(said))


ERROR = re.compile(r"^(?:\[(\w+ \d+)\] )?(?:\[rank\d\]: )?(?:syncwright\.errors\.|caught )(\w+): (.*)$", re.MULTILINE)


def told(output: str) -> list[str]:
    """The errors that ended roles or that they caught, without what differs from run to run."""
    lines = dict.fromkeys(
        f"{role or 'trainer 0'}, {kind}: {_steady(text)}" for role, kind, text in ERROR.findall(output)
    )
    return sorted(lines)


def _steady(message: str) -> str:
    message = re.sub(r"\(pid \d+( on [^)]*)?\)", "(pid N on HOST)", message)
    message = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", message)
    message = re.sub(r"silent for \d+ s", "silent for N s", message)
    return re.sub(r"\b[0-9a-f]{12,16}\b", "<digest>", message)
