"""One trainer's side of the meetings of trainers that train alone."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch

from syncwright.job import Exchange
from syncwright.passes.insert import FIRST, TOTAL, WEIGHT
from syncwright.passes.note_lookups import noted_name
from syncwright.program import Role, Variable
from syncwright.runtime.client import Client, When
from syncwright.runtime.executor import Blocked, Executor
from syncwright.runtime.lane import Lane
from syncwright.runtime.merging import no_examples
from syncwright.runtime.pieces import UNTIL_ALL_LEFT, begun, give, joined


class Outer:
    """What all trainers had after their last meeting, and the outer optimizer's state where trainers keep it. Changes with
    every step.

    Before `begin` it holds nothing. The outer step is interpreted: it moves every byte once, every so many steps. Servers
    number meetings, not steps; when all values are set anew, that counts as one.

    Of a table of which some rows travel, it notes which the trainer has looked up since the last meeting.
    """

    def __init__(self, exchange: Exchange, lane: Lane):
        self.clock = exchange.clock
        self.client = Client(exchange.job, lane)
        self._exchange, self._lane, self._interface = exchange, lane, exchange.interface
        self._program = exchange.job.trainer["step"]
        self._executors = {phase: Executor(program) for phase, program in exchange.job.trainer.items()}
        self._values: dict[str, torch.Tensor] = {}
        self._steps, self._weight = 0, 0.0
        self._number, self._fresh = 0, 0
        self._restored: dict[str, torch.Tensor] = {}
        self._touched: torch.Tensor | None = None
        self._noted = noted_name(next(iter(self._interface.latest.values())))

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
        """What was there after this trainer's last meeting, by variable."""
        return {name: self._values[name] for name in self._interface.latest.values()} if self.has_begun else {}

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """The same, and the outer optimizer's state: what is equal on all trainers."""
        return dict(self._values) if self._exchange.waits else {}

    def begin(self, values: Mapping[str, object]) -> None:
        """Starts from a trainer's `values`, which all trainers have alike. Servers get trainer 0's."""
        for name, node in self._program.placeholders.items():
            variable = self._program.variables[name]
            if variable.role in (Role.PARAM, Role.BUFFER):
                self._values[name] = _copied(values[name])
            elif variable.role is Role.STATE:
                self._values[name] = self._begun(variable, node.meta["val"].device)
        for name in self._interface.latest.values():
            self._values.setdefault(name, _copied(values[name]))
        if self._interface.ids is not None:
            (base,) = self._values.values()
            self._touched = torch.zeros(len(base), dtype=torch.bool, device=base.device)
        if self._exchange.is_served and self._lane.me.rank == 0:
            begun_with = {name: values[name] for name in self._interface.latest.values()}
            give(self.client, {**begun_with, **self._restored}, self._number)  # the user's optimizer has such names too

    def _begun(self, variable: Variable, device: torch.device) -> torch.Tensor:
        known = self._restored.get(variable.name)
        return begun(variable, device) if known is None else known.to(device, copy=True)

    def forget(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """As before `begin`; which then begins with this state of the outer optimizer, or with that of a new one."""
        self._values, self._steps, self._weight = {}, 0, 0.0
        own = self._exchange.job.served if self._exchange.is_served else self._states()
        self._restored = {name: value for name, value in (state or {}).items() if name in own}
        self._number += 1
        self.client.restart(self._number)

    def _states(self) -> dict[str, Variable]:
        """The outer optimizer's state, here or in pieces on servers."""
        job = self._exchange.job
        known = job.held if self._exchange.is_served else self._program.variables
        return {name: variable for name, variable in known.items() if variable.role is Role.STATE}

    def state(self) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """The outer optimizer's state after the last meeting, whole."""
        if not self.has_begun:
            return dict(self._restored)
        if self._exchange.is_served:
            return (yield from self._fetched("now", self._states(), self._number))
        return {name: self._values[name] for name in self._states()}

    def add(self, weight: float, results: Mapping[str, object]) -> None:
        """A step taken alone, on so many examples / the nominal number, and what it has written."""
        self._steps += 1
        self._weight += weight
        if self._touched is not None and self._noted in results:
            self._touched[results[self._noted].long()] = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def meet(self, values: Mapping[str, object], step: int) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """The outer step on a trainer's latest `values`, after `step` steps; returns those with which it goes on.

        A trainer counts with its examples since the last meeting. One that had none has changed nothing, and sends nothing,
        with weight 0. Raises `BatchError` where nobody had any. Where nobody waits for the others, nobody is weighed.
        """
        weighed = self._exchange.waits and self._exchange.job.plan.trainers > 1
        weight = self._weight / self.clock.every if weighed else 1.0
        self._lane.step = step
        self.client.begin(self._number, weight, self._exchange.hypers)
        ids = None if self._touched is None else self._touched.nonzero().view(-1)
        self._steps, self._weight = 0, 0.0
        if ids is not None and not len(ids):
            return {}
        given = self._given(values, ids) | {WEIGHT: weight, FIRST: int(self._lane.me.rank == 0)}
        results = yield from self._executors["step" if weight > 0 else "idle"].run(given, self.client)
        if results.pop(TOTAL, 1) == 0:
            raise no_examples(step)
        self._number += 1
        if self._touched is not None:
            self._touched.zero_()
        return self._taken(results, values, ids)

    def _given(self, values: Mapping[str, object], ids: torch.Tensor | None) -> dict[str, object]:
        """What the program reads."""
        latest = {put: values[name] for put, name in self._interface.latest.items()}
        base = {put: self._values[name] for put, name in self._interface.base.items()}
        if ids is None:
            return {**self._values, **self._exchange.hypers, **latest, **base}
        rows = {put: value[ids] for put, value in {**latest, **base}.items()}  # type: ignore[index]
        return {**self._exchange.hypers, **rows, str(self._interface.ids): ids}

    def _taken(
        self, results: Mapping[str, object], values: Mapping[str, object], ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Keeps what the program has written; the values that this trainer goes on with, for it alone."""
        found: dict[str, torch.Tensor] = {}
        for put, name in self._interface.keeps.items():
            if put in results:
                self._keep(name, results[put], ids)
        state = {name: value for name, value in results.items() if name in self._values}
        self._values |= state  # type: ignore[arg-type]
        for put, name in self._interface.goes_on.items():
            value = results.get(put)
            if ids is not None:
                found[name] = values[name].index_copy(0, ids, value)  # type: ignore[attr-defined]
            else:
                found[name] = (self._values[name] if value is None else value).clone()  # type: ignore[union-attr]
        return found

    def _keep(self, name: str, value: object, ids: torch.Tensor | None) -> None:
        assert isinstance(value, torch.Tensor), "parameters and buffers are tensors"
        if ids is None:
            self._values[name] = value
        else:
            self._values[name].index_copy_(0, ids, value)

    def served(self) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """What servers have now, where nobody waits for the others; what all have else is `shared`."""
        if self._exchange.waits or not self.has_begun:
            return {}
        self._fresh = self.client.fresh()
        return (yield from self._fetched("now", self._exchange.job.held, self._fresh))

    def leave(self) -> None:
        """Takes part in no further meeting."""
        if not self._exchange.is_served:
            return
        if not self._exchange.waits:
            self._fresh = self.client.fresh()
            for name in self._exchange.job.held:
                self.client.fetch(name, self._fresh, "end")
        self.client.leave(self._number)

    def last(self) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        """What servers have when all trainers have left, where nobody waits for the others before."""
        if self._exchange.waits or not self.has_begun:
            return {}
        return (yield from self._fetched("end", self._exchange.job.held, self._fresh))

    def _fetched(
        self, when: When, variables: Mapping[str, Variable], number: int
    ) -> Generator[Blocked, None, dict[str, torch.Tensor]]:
        found = []
        for name, variable in variables.items():
            while (value := self.client.collect(name, number, when)) is None:
                yield Blocked("state" if when == "now" else UNTIL_ALL_LEFT, name)
            found.append((variable, value))
        return joined(self._exchange.job, found)


def _copied(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor), "parameters and buffers are tensors"
    return value.detach().clone()
