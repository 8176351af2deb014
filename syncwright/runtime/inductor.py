"""The only file that calls Inductor: a graph of tensor operations to one compiled function.

Inductor is imported where it is first called: it takes over a second of a core and 116 MiB, of every process that has it, and
servers and interpreted steps need none.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

_SETTINGS = {
    "fallback_random": True,
    "reorder_for_peak_memory": False,
}
"""Random operations draw as in eager, so masks are the same compiled and interpreted. The order of nodes is ours."""


POLL_SECONDS = 0.05
PATIENCE_SECONDS = 600.0
"""So long another process may take; then this one compiles for itself."""


def is_available() -> bool:
    """Whether programs can be compiled for the CPU here."""
    return obstacle() is None


def obstacle() -> str | None:
    """What stands in the way of compiling; None where nothing does."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "there is no C++ compiler"
    if torch.__version__ < "2.12":
        return f"torch {torch.__version__} compiles random operations such as dropout to NaN"
    return None


@cache
def probe() -> threading.Thread:
    """Begins to find out what vectors this machine has, which Inductor asks first and waits seconds for.

    It compiles and loads small programs in processes of their own, so a step can be captured meanwhile. To be joined
    before anything is compiled: two threads that ask at once have got different answers.
    """
    from torch._inductor import cpu_vec_isa

    asking = threading.Thread(target=cpu_vec_isa.pick_vec_isa, name="syncwright-probe", daemon=True)
    asking.start()
    return asking


def compile_graphs(graphs: Sequence[tuple[GraphModule, Sequence[torch.Tensor]]]) -> list[Callable]:
    """Compiles graphs for inputs of these shapes (fake tensors will do). Each function takes and gives flat lists.

    The processes of a host share the work: a graph that another process is at is left until last, and then comes from
    Inductor's cache on disk. A process that fails or dies lets go of its locks.
    """
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    probe().join()
    with torch.no_grad(), config.patch(_SETTINGS):
        if not config.fx_graph_cache or config.force_disable_caches:
            return [_compile(*graph) for graph in graphs]
        folder = Path(cache_dir()) / "syncwright"
        folder.mkdir(parents=True, exist_ok=True)
        locks = [FileLock(folder / f"{_key(*graph)}.lock") for graph in graphs]
        deadline = time.monotonic() + PATIENCE_SECONDS
        done: dict[int, Callable] = {}
        while len(done) < len(graphs):
            for index, (lock, graph) in enumerate(zip(locks, graphs, strict=True)):
                if index not in done and (_take(lock) or time.monotonic() > deadline):
                    done[index] = _compile(*graph)
                    lock.release()
            time.sleep(POLL_SECONDS if len(done) < len(graphs) else 0)
        return [done[index] for index in range(len(graphs))]


def _take(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _key(module: GraphModule, inputs: Sequence[torch.Tensor]) -> str:
    """Equal for graphs that do the same to inputs of the same shapes."""
    shapes = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in inputs]
    return hashlib.blake2b(f"{module.graph} {shapes}".encode(), digest_size=16).hexdigest()


def _compile(module: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Sequence[object]]:
    from torch._inductor.compile_fx import compile_fx

    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    with tracing(TracingContext(mode)):  # without it Inductor's caches stay unused
        return compile_fx(module, list(inputs))  # type: ignore[return-value]
