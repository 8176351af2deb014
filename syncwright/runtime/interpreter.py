"""How a server runs its programs: node by node, or by what Inductor makes of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from syncwright.errors import JobError
from syncwright.program import Program
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import NO_PORT, Executor


class Compute(Protocol):
    """Runs programs that communicate with nobody."""

    def prepare(self, program: Program, own: Collection[str]) -> Collection[str]:
        """A program of fixed shapes will be run often. Returns what of `own` it overwrites: values that nobody else has."""
        ...

    def __call__(self, program: Program, values: Mapping[str, object]) -> Mapping[str, object]: ...


class Interpreter:
    """Runs a server's programs as they are; each is made ready once. Changes with every new program."""

    def __init__(self) -> None:
        self._ready: dict[Program, Executor | CompiledExecutor] = {}

    def prepare(self, program: Program, own: Collection[str]) -> Collection[str]:
        """See `Compute`: nothing is overwritten here."""
        return ()

    @torch.no_grad()
    def __call__(self, program: Program, values: Mapping[str, object]) -> Mapping[str, object]:
        if program not in self._ready:
            self._ready[program] = Executor(program)
        try:
            blocked = next(self._ready[program].run(values, NO_PORT))
        except StopIteration as stop:
            return stop.value
        raise JobError(
            f"a server's program waits at {blocked.node} for '{blocked.channel}'; only trainers' programs do."
        )


class Compiler(Interpreter):
    """Like `Interpreter`; programs of fixed shapes are compiled, before the server takes its first message."""

    def prepare(self, program: Program, own: Collection[str]) -> Collection[str]:
        """See `Compute`."""
        executor = CompiledExecutor(program, own)
        self._ready[program] = executor
        return executor.overwritten
