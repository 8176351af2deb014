"""One trainer's side of the meetings of trainers that train alone."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch

from syncwright.job import Exchange
from syncwright.passes.insert import FIRST, TOTAL, WEIGHT
from syncwright.program import Role, Variable
from syncwright.runtime.client import Client
from syncwright.runtime.executor import Blocked, Executor
from syncwright.runtime.merging import no_examples


class Outer:
    """What all trainers had after their last meeting, and the outer optimizer's state. Changes with every step.

    Before `begin` it holds nothing. The outer step is interpreted: it moves every byte once, every so many steps.
    """

    def __init__(self, exchange: Exchange, client: Client):
        self.clock = exchange.clock
        self._exchange, self._client = exchange, client
        self._program = exchange.job.trainer["step"]
        self._executors = {phase: Executor(program) for phase, program in exchange.job.trainer.items()}
        self._values: dict[str, torch.Tensor] = {}
        self._steps, self._weight = 0, 0.0

    @property
    def has_begun(self) -> bool:
        return bool(self._values)

    @property
    def is_due(self) -> bool:
        """Whether the trainers meet now."""
        return self.clock.is_due(self._steps)

    @property
    def is_open(self) -> bool:
        """Whether this trainer has taken steps since the last meeting."""
        return self._steps > 0

    @property
    def shared(self) -> dict[str, torch.Tensor]:
        """What all had after the last meeting, by variable."""
        return {name: self._values[name] for name in self._exchange.latest.values()} if self.has_begun else {}

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """The same, and the outer optimizer's state: equal on all trainers."""
        return dict(self._values)

    def begin(self, values: Mapping[str, object]) -> None:
        """Starts from a trainer's `values`, which all trainers have alike."""
        for name, node in self._program.placeholders.items():
            variable = self._program.variables[name]
            if variable.role in (Role.PARAM, Role.BUFFER):
                self._values[name] = _copied(values[name])
            elif variable.role is Role.STATE:
                self._values[name] = begun(variable, node.meta["val"].device)
        for name in self._exchange.latest.values():
            self._values.setdefault(name, _copied(values[name]))

    def forget(self) -> None:
        """As before `begin`."""
        self._values, self._steps, self._weight = {}, 0, 0.0

    def add(self, weight: float) -> None:
        """A step taken alone, on so many examples / the nominal number."""
        self._steps += 1
        self._weight += weight

    @torch.no_grad()
    def meet(self, values: Mapping[str, object], step: int) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """The outer step on a trainer's latest `values`, after `step` steps; returns those with which all go on.

        A trainer counts with its examples since the last meeting. One that had none has changed nothing, and sends nothing,
        with weight 0. Raises `BatchError` where nobody had any.
        """
        weight = self._weight / self.clock.every
        self._client.begin(step, weight, {})
        given: dict[str, object] = {**self._values, **self._exchange.hypers}
        given |= {put: values[name] for put, name in self._exchange.latest.items()}
        given |= {WEIGHT: weight, FIRST: int(self._client.transport.me.rank == 0)}
        results = yield from self._executors["step" if weight > 0 else "idle"].run(given, self._client)
        if results.pop(TOTAL, 1) == 0:
            raise no_examples(step)
        self._values |= results  # type: ignore[arg-type]
        self._steps, self._weight = 0, 0.0
        return self.shared


def begun(variable: Variable, device: torch.device | None = None) -> torch.Tensor:
    """State that the user's objects do not hold, as it begins."""
    assert variable.initial is not None, f"'{variable.name}' is the user's"
    return torch.full(variable.shape, variable.initial, dtype=variable.dtype, device=device)


def _copied(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor), "parameters and buffers are tensors"
    return value.detach().clone()
