"""What `syncwright run` does: starts the roles of a job on this host and ends them together."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from torch.distributed import PrefixStore, TCPStore

from syncwright.errors import ClusterError
from syncwright.runtime.announce import Announced, announce
from syncwright.runtime.forking import Forked, fork, preload
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import FAILED, LOST, SURVIVES

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.05
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Patience:
    """How many seconds roles have to end by themselves.

    serve      servers, once all trainers have ended well
    end        everyone, once a role has failed or a signal came; then SIGTERM is sent
    terminate  everyone, after that SIGTERM; then SIGKILL is sent
    """

    serve: float = 60.0
    end: float = 10.0
    terminate: float = 5.0


@dataclass(slots=True)
class Child:
    """Changes: a role's process and the thread that passes its output on."""

    me: Address
    process: subprocess.Popen[bytes] | Forked
    pump: threading.Thread | None = None
    reported: bool = False

    def __str__(self) -> str:
        return f"{self.me} (pid {self.process.pid})"


@dataclass(slots=True)
class Ending:
    """Changes: how far the end of a job has come.

    status    what `launch` will return
    served    when the last trainer ended well; None before
    begun     when the job began to be ended for a failure or a signal; None before
    signals   those that arrived here; the first `forwarded` of them were passed on
    sent      all that were sent to children
    """

    status: int = 0
    served: float | None = None
    begun: float | None = None
    signals: list[int] = field(default_factory=list)
    forwarded: int = 0
    sent: set[int] = field(default_factory=set)


def launch(
    script: str,
    arguments: Sequence[str],
    trainers: int,
    servers: int,
    *,
    environment: Mapping[str, str] | None = None,
    patience: Patience | None = None,
    forks: bool = False,
) -> int:
    """Runs `python script arguments...` once per role until all have ended; the job's exit status.

    0 if all ended with 0, or were lost from a job that goes on without (trainers that servers alone join); else the
    status of the first that did not (128 + n if signal n ended it, or if signal n ended the launcher). When one fails,
    the others learn it from the store, and are ended after `patience`. Signals go to this call's own children only, by
    pid; a second Ctrl-C kills at once.

    Output: every line of a role is prefixed with its name, `[server 0] `. Trainer 0 writes to the terminal
    itself where standard output is one (so progress bars work), and a job of one process always does.

    forks: roles are copies of this process, in which what they import is imported once (see `forking`). Only for a process that
    has started no threads.

    Must be called from the main thread, which is where signals arrive.
    """
    if trainers < 1 or servers < 0:
        raise ClusterError(f"{trainers} trainers and {servers} servers; expected at least 1 trainer and 0 servers")
    patience = patience or Patience()
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="syncwright-")
    ending = Ending()
    children: list[Child] = []
    with _handling(ending.signals):
        try:
            if forks:
                preload()
            base = dict(os.environ if environment is None else environment)
            for me in _roles(trainers, servers):
                own = _environment(base, me, trainers, servers, port, folder)
                direct = me == Address(Kind.TRAINER, 0) and (trainers + servers == 1 or sys.stdout.isatty())
                if forks:
                    children.append(_fork(me, script, arguments, own, direct, listener.fileno(), children))
                else:
                    children.append(_start(me, [sys.executable, script, *arguments], own, direct))
            store = TCPStore(
                *(LOOPBACK, port), is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )  # has threads: behind the last fork; until then who calls waits at the listener
            announce(folder, Announced(os.getpid(), f"{LOOPBACK}:{port}", script))
            for child in children:
                _pump_output(child)
            _supervise(children, PrefixStore("syncwright/0", store), ending, patience)
        finally:
            _kill(children)
            shutil.rmtree(folder, ignore_errors=True)
    return ending.status


def _roles(trainers: int, servers: int) -> list[Address]:
    return [Address(Kind.SERVER, rank) for rank in range(servers)] + [
        Address(Kind.TRAINER, rank) for rank in range(trainers)
    ]


def _environment(
    base: Mapping[str, str], me: Address, trainers: int, servers: int, port: int, folder: str
) -> dict[str, str]:
    """`base` and who `me` is; for trainers also what torchrun sets, for scripts that read that."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in base.items() if name not in torchrun}
    own |= {
        "SYNCWRIGHT_ROLE": me.kind.value,
        "SYNCWRIGHT_RANK": str(me.rank),
        "SYNCWRIGHT_TRAINERS": str(trainers),
        "SYNCWRIGHT_SERVERS": str(servers),
        "SYNCWRIGHT_STORE": f"{LOOPBACK}:{port}",
        "SYNCWRIGHT_SOCKETS": folder,
        "PYTHONUNBUFFERED": "1",
    }
    own.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // trainers)))
    own.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    if me.kind is Kind.TRAINER:
        rank, size = str(me.rank), str(trainers)
        own |= dict(zip(torchrun, (rank, size, rank, size, LOOPBACK, str(port)), strict=True))
        own |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    return own


def _start(me: Address, command: list[str], environment: dict[str, str], direct: bool) -> Child:
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if direct else subprocess.PIPE,
        stderr=None if direct else subprocess.STDOUT,
        process_group=0,  # a terminal's Ctrl-C comes here only, and is passed on once
    )
    return Child(me, process)


def _fork(
    me: Address,
    script: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    direct: bool,
    listener: int,
    earlier: Sequence[Child],
) -> Child:
    others = [child.process.stdout.fileno() for child in earlier if child.process.stdout is not None]
    return Child(me, fork(str(me), script, arguments, environment, direct, [listener, *others]))


def _pump_output(child: Child) -> None:
    if child.process.stdout is not None:
        child.pump = threading.Thread(target=_pump, args=(child.me, child.process.stdout), daemon=True)
        child.pump.start()


def _pump(me: Address, lines: IO[bytes]) -> None:
    reader = True
    for line in lines:  # read on when nobody reads what is written here: the role must not block on its output
        try:
            if reader:
                sys.stdout.write(f"[{me}] {line.decode(errors='replace').rstrip()}\n")
                sys.stdout.flush()
        except BrokenPipeError:
            reader = False


def _supervise(children: list[Child], store: PrefixStore, ending: Ending, patience: Patience) -> None:
    while any(child.process.poll() is None for child in children):
        _report_failures(children, store, ending)
        _report_idle_servers(children, ending, patience)
        _pass_signals_on(children, ending)
        _press(children, ending, patience)
        time.sleep(POLL_SECONDS)
    _report_failures(children, store, ending)
    for child in children:
        if child.pump is not None:
            child.pump.join(timeout=2.0)  # a grandchild may hold the pipe for longer


def _report_failures(children: list[Child], store: PrefixStore, ending: Ending) -> None:
    for child in children:
        status = child.process.poll()
        if not status or child.reported:
            continue
        child.reported = True
        if _goes_on(child, children, store, status):
            continue
        how = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        if ending.begun is None:
            ending.status = status if status > 0 else 128 - status
            ending.begun = time.monotonic()
            store.set(FAILED, f"{child} {how}")
            _say(f"{child} {how}; ending the other roles")
        elif -status not in ending.sent:
            _say(f"{child} {how}")


def _goes_on(child: Child, children: list[Child], store: PrefixStore, status: int) -> bool:
    """Tells the others to go on without a trainer that a signal has ended, where the job says that it can."""
    killed = child.me.kind is Kind.TRAINER and status < 0
    left = [c for c in children if c.me.kind is Kind.TRAINER and c.process.poll() in (None, 0)]
    if not killed or not left or not store.check([SURVIVES]):
        return False
    lost = [c.me.rank for c in children if c.me.kind is Kind.TRAINER and c.reported]
    store.set(LOST, " ".join(map(str, lost)))
    _say(f"{child} was ended by {signal.Signals(-status).name}; the others go on without it")
    return True


def _report_idle_servers(children: list[Child], ending: Ending, patience: Patience) -> None:
    """Servers end by themselves when the trainers have; if not, they are ended, and that is an error."""
    trainers = [child for child in children if child.me.kind is Kind.TRAINER]
    if ending.served is None and all(child.process.poll() == 0 or child.reported for child in trainers):
        ending.served = time.monotonic()
    if ending.begun is not None or ending.served is None:
        return
    if time.monotonic() - ending.served > patience.serve:
        alive = ", ".join(str(child) for child in children if child.process.poll() is None)
        ending.status = 1
        ending.begun = time.monotonic() - patience.end
        _say(f"{alive} did not end within {patience.serve:g} s after the last trainer")


def _pass_signals_on(children: list[Child], ending: Ending) -> None:
    for number in ending.signals[ending.forwarded :]:
        ending.forwarded += 1
        again = ending.forwarded > 1
        ending.status = ending.status or 128 + number
        ending.begun = time.monotonic() if ending.begun is None else ending.begun
        _say(f"{'killing' if again else 'ending'} all roles ({signal.Signals(number).name})")
        _signal(children, signal.SIGKILL if again else number, ending)


def _press(children: list[Child], ending: Ending, patience: Patience) -> None:
    """Ends what has been asked to end and has not: first by SIGTERM, then by SIGKILL."""
    if ending.begun is None:
        return
    passed = time.monotonic() - ending.begun
    if passed > patience.end + patience.terminate:
        _signal(children, signal.SIGKILL, ending)
    elif passed > patience.end and signal.SIGTERM not in ending.sent:
        _signal(children, signal.SIGTERM, ending)


def _signal(children: Sequence[Child], number: int, ending: Ending) -> None:
    ending.sent.add(number)
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(number)


def _kill(children: Sequence[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
            child.process.wait()


@contextmanager
def _handling(arrived: list[int]) -> Iterator[None]:
    """While inside, signals that would end this process are noted in `arrived` instead."""

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _loopback_interface() -> str:
    """`lo` or `lo0`."""
    return next((name for _, name in socket.if_nameindex() if name in {"lo", "lo0"}), "lo")


def _say(text: str) -> None:
    sys.stderr.write(f"syncwright: {text}\n")
    sys.stderr.flush()
