"""Roles as forks of the launcher: what every role imports is imported once, and the copies are ready at once."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import IO, NoReturn

PRELOADED = ("syncwright.runtime.trainer", "torch._dynamo", "torch.onnx", "torch._functorch.aot_autograd")
"""What a role imports until its first step is done."""

_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def can_fork() -> bool:
    """Whether roles may be forks of this process: on Linux, without an accelerator (a driver that has begun survives no fork),
    and where nothing else runs in it or has taken its output."""
    alone = threading.active_count() == 1 and sys.stdout is sys.__stdout__
    return sys.platform == "linux" and alone and not any(Path(device).exists() for device in _ACCELERATORS)


def preload() -> None:
    """Imports what roles need. To be called once, before the first role, by a process that has started no thread."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


class Forked:
    """A role's process, as `subprocess.Popen` has it. Changes once, when it has ended."""

    def __init__(self, pid: int, stdout: IO[bytes] | None):
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status it has ended with, -n if signal n ended it; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork(
    name: str,
    script: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    direct: bool,
    others: Sequence[int],
) -> Forked:
    """`python script arguments...` in a copy of this process, which has preloaded.

    What an interpreter reads when it starts (PYTHONPATH, PYTHONHASHSEED) is this process's. `direct`: the role writes where
    this process does, else into `stdout` of what is returned. `others`: file descriptors that the role is not to keep.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = (None, None) if direct else os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        _begin(name, environment, write, [*others, *([] if read is None else [read])], blocked)
        _end(_run(script, arguments))
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    if write is not None:
        os.close(write)
    return Forked(pid, None if read is None else os.fdopen(read, "rb"))


def _begin(name: str, environment: Mapping[str, str], output: int | None, others: Sequence[int], mask: set) -> None:
    """What starting a program does beside running it."""
    os.setpgid(0, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for descriptor in others:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    Path("/proc/self/comm").write_text(name)
    _as_loaded_now(int(environment["OMP_NUM_THREADS"]))


def _as_loaded_now(threads: int) -> None:
    """torch and numpy as after an import: as many threads as OMP_NUM_THREADS says, random streams that no other role has."""
    import numpy as np
    import torch

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.seed()
    np.random.seed()


def _run(script: str, arguments: Sequence[str]) -> int:
    """Runs a file as `__main__`; the status that an interpreter would end with."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__, __spec__=None, __cached__=None)
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    code: CodeType | None = None
    try:
        code = compile(Path(script).read_bytes(), script, "exec")
        exec(code, main.__dict__)
    except SystemExit as ending:
        return _status(ending.code)
    except KeyboardInterrupt as interrupt:
        _report(interrupt, code)
        _flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as fault:
        _report(fault, code)
        return 1
    return 0


def _status(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


def _report(fault: BaseException, code: CodeType | None) -> None:
    """As an uncaught error: through `sys.excepthook`, from the script's own first line on."""
    trace: TracebackType | None = fault.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    sys.last_type, sys.last_value, sys.last_traceback = type(fault), fault, trace
    sys.excepthook(type(fault), fault.with_traceback(trace), trace)


def _end(status: int) -> NoReturn:
    """Threads are waited for, and what is to run at exit runs; the launcher's own frames below this one do not go on."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its forks: also runs what pools left to be done
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        status = status or 1
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os._exit(120)  # as an interpreter whose last output cannot be written
