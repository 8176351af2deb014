"""The processes of one contestant started, each in its environment and, on request, in a network of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.contestants import Contestant, Seat
from bench.crew import Child, Crew, Unavailable, end, wait
from bench.wire import Channel

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Work:
    """What a contestant is started for.

    workloads      the module whose WORKLOADS holds it
    workload       its name there
    isolated       give the contestant a network of its own
    bytes_counted  count there what a step sends
    megabits       that the network carries a second; None: as many as the machine can
    curve          steps of a start of their own of which every loss is recorded
    """

    workloads: str
    workload: str
    isolated: bool = False
    bytes_counted: bool = False
    megabits: float | None = None
    curve: int = 0


def spawn(
    label: str, module: str, arguments: list[str], folder: Path, variables: dict[str, str], python: str = sys.executable
) -> Child:
    """Start `python -m module --socket N arguments...`; its output goes to a log in `folder`.

    A session of its own: Ctrl-C reaches the driver alone, which then ends everybody in order.
    """
    here, there = socket.socketpair()
    log = folder / f"{label.replace(' ', '-')}-{time.monotonic_ns()}.log"
    with there, log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", module, "--socket", str(there.fileno()), *arguments],
            cwd=ROOT,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(there.fileno(),),
            start_new_session=True,
        )
    return Child(label, process, Channel(here), log)


def environment(variables: dict[str, str]) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    local = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **one_thread, **local, **variables}


def python_of(contestant: Contestant) -> str:
    """The interpreter of the peer's environment, or ours. Raises Unavailable when it is not there, or cannot do it."""
    if contestant.unavailable is not None:
        raise Unavailable(contestant.unavailable)
    if contestant.environment is None:
        return sys.executable
    folder = ROOT / f".venv-peer-{contestant.environment}"
    if not (folder / "ready").exists():
        raise Unavailable("not installed: make bench-peers")
    return str(folder / "bin" / "python")


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of 127.0.0.1 that nobody listens at now, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = tuple(probe.getsockname()[1] for probe in probes)
    for probe in probes:
        probe.close()
    return ports


def start(contestant: Contestant, work: Work, cache: Path, folder: Path) -> Crew:
    """All processes of a contestant; they import what they need and wait to be asked to begin."""
    python = python_of(contestant)
    roles = ["rank"] * contestant.processes + list(contestant.helpers)
    store = str(folder / f"store-{contestant.name}-{time.monotonic_ns()}")
    ports = free_ports(len(roles) + 1)
    crew = Crew()
    try:
        crew.network = new_network(contestant, folder, work.megabits) if work.isolated else None
        for place, role in enumerate(roles):
            rank = roles[:place].count(role)
            seat = Seat(rank, contestant.processes, store, role, contestant.helpers, ports)
            child = start_process(contestant, work, seat, crew.network, cache, folder, python)
            (crew.ranks if role == "rank" else crew.helpers).append(child)
    except BaseException:
        end(crew)
        raise
    return crew


def new_network(contestant: Contestant, folder: Path, megabits: float | None = None) -> Child | None:
    """The process that holds a network for a contestant; None where this user may not make one.

    Raises Unavailable where it would have to be a narrow one: without it there is nothing to measure.
    """
    arguments = [] if megabits is None else ["--megabits", str(megabits)]
    child = spawn(f"{contestant.name} network", "bench.namespace", arguments, folder, {})
    try:
        wait([child], "made", 60.0)
    except Unavailable:
        end(Crew(network=child))
        if megabits is not None:
            raise
        return None
    return child


def start_process(
    contestant: Contestant, work: Work, seat: Seat, network: Child | None, cache: Path, folder: Path, python: str
) -> Child:
    given = {
        "module": contestant.module,
        "options": dict(contestant.options),
        "imports": contestant.imports,
        "workloads": work.workloads,
        "workload": work.workload,
        "seat": asdict(seat),
        "network": network.process.pid if network else None,
    }
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if seat.role == "rank":
        rank, count = str(seat.rank), str(seat.processes)
        variables |= {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(seat.ports[-1])}
    label = f"{contestant.name} {seat.role} {seat.rank}"
    return spawn(label, "bench.worker", ["--given", json.dumps(given)], folder, variables, python)
