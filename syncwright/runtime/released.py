"""The user's own tensors of what trainers keep in parts: let go while they train, as a part is all that a trainer is to hold."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import torch

from syncwright.capture.state import Binding
from syncwright.deferred.record import Away
from syncwright.deferred.tensor import Deferred, become, made, put_away
from syncwright.errors import DeferredError

log = logging.getLogger("syncwright")

CUT = (
    "'{name}' is cut among the trainers, each of which keeps its own part since training has begun; here are no values. Expected "
    "to be asked for them: trainer.sync() writes them whole into your objects, where they stay until the next step, and "
    "trainer.evaluate(fn, loader) runs a function with them."
)

ENDED = (
    "'{name}' is deferred, and was cut among the trainers, whose job has ended; here are no values. Expected to be asked for "
    "them before close(): trainer.sync(deferred=True)."
)


class Released:
    """Changes: knows which of the user's tensors hold values, and which have been let go.

    names     of what trainers keep nothing of but parts
    deferred  those of them that the user has built under deferred(), and their state: whole they are made only when asked for
    """

    def __init__(self, binding: Binding, names: Collection[str]):
        self._binding, self.names = binding, frozenset(names)
        parameters = {name for name in self.names if isinstance(binding.held(name), Deferred)}
        known = binding.variables
        self.deferred = {name for name in self.names if name in parameters or known[name].of in parameters}
        self._is_whole = True

    def put_back(self) -> None:
        """The user's tensors hold values again: they have been written to."""
        self._is_whole = True

    def release(self) -> None:
        """Lets go of values that the user's tensors hold."""
        if not self._is_whole:
            return
        self._is_whole = False
        for name, tensor in self._held():
            why = CUT.format(name=name)
            if isinstance(tensor, Deferred):
                put_away(tensor, why)
            else:
                look, dtype, numel = torch.empty_like(tensor, device="meta"), tensor.dtype, tensor.numel()
                become(tensor, made(look, lambda w=why, d=dtype, n=numel: Away(w, d, n), above=0))

    def check_whole(self) -> None:
        """Raises `DeferredError` where a state would leave out what is deferred."""
        if self.deferred:
            raise DeferredError(
                f"state_dict: {self._named()} (deferred) are cut among the trainers. Expected to be told to put them together "
                "here. Give state_dict(deferred=True), on trainers that have the memory."
            )

    def leave_behind(self) -> None:
        """The job ends, and with it the parts of what is deferred."""
        if self.deferred:
            log.warning(
                "%s (deferred) are cut among the trainers, and end with the job. Expected them to be asked for before close(): "
                "trainer.sync(deferred=True).",
                self._named(),
            )
        for name, tensor in self._held():
            if name in self.deferred and isinstance(tensor, Deferred):
                put_away(tensor, ENDED.format(name=name))

    def _named(self) -> str:
        return ", ".join(sorted(name for name in self.deferred if self._binding.variables[name].of is None))

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(self.names):
            tensor = self._binding.held(name)
            if tensor is not None:
                yield name, tensor
