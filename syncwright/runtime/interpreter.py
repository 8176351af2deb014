"""How a server runs its programs: node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from syncwright.errors import JobError
from syncwright.program import Program
from syncwright.runtime.executor import NO_PORT, Executor

Compute = Callable[[Program, Mapping[str, object]], Mapping[str, object]]


class Interpreter:
    """Runs a server's programs as they are; each is made ready once. Changes with every new program."""

    def __init__(self) -> None:
        self._ready: dict[Program, Executor] = {}

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
