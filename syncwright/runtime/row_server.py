"""A server's rows of tables: which trainers have asked for which, and what they get at once. Changes with every request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from syncwright.items import read_rows
from syncwright.job import Channel, Job
from syncwright.runtime.messages import Message, PullRows, Push, Rows
from syncwright.runtime.places import AnyIds, Below, Places, places_of
from syncwright.runtime.rows import RowGradient, Settled, bits, where
from syncwright.runtime.served_table import Column
from syncwright.runtime.slots import Asked, Slot, as_tensor


class RowServer:
    """What one server does with rows of tables, for its `Server`.

    in_place  variables whose touched rows are written in place
    """

    def __init__(self, job: Job, rank: int, in_place: Collection[str]):
        self.job, self.in_place = job, frozenset(in_place)
        self._places = _places_here(job, rank)
        self._there: dict[tuple[int, str, int], torch.Tensor] = {}
        self._asked: dict[tuple[int, str, int], torch.Tensor] = {}
        self._settled: dict[str, Settled] = {}

    def refusal(self, name: str, ids: torch.Tensor | None) -> str | None:
        """Why rows cannot be asked for; None where they can."""
        if name not in self._places or ids is None:
            return f"this server keeps no table '{name[:80]}'"
        if ids.dtype is not torch.int64 or ids.dim() != 1:
            return "its ids are no list of 64-bit numbers"
        if not self._places[name].has(ids):
            return f"its ids are not all {self._places[name]}, which this server keeps of '{name[:80]}'"
        return None

    def ids(self, trainer: int, channel: Channel, push: Push) -> torch.Tensor:
        """The rows that a trainer's contribution is of: those that it has asked for in that step."""
        asked = self._asked.get((trainer, str(channel.variable.of), push.step))
        return torch.empty(0, dtype=torch.int64) if asked is None else asked[push.skip :]

    def take(self, trainer: int, channel: Channel, push: Push, rows: torch.Tensor) -> RowGradient:
        """A trainer's contribution; its step is done. What had no row when it was looked up is not trained."""
        ids, key = self.ids(trainer, channel, push), (trainer, str(channel.variable.of), push.step)
        self._asked.pop(key, None)
        there = self._there.pop(key, None)
        return (
            RowGradient(ids, rows) if there is None else RowGradient(ids[there[push.skip :]], rows[there[push.skip :]])
        )

    def ask(
        self, trainer: int, pull: PullRows, ids: torch.Tensor, slot: Slot, live: Sequence[int]
    ) -> tuple[Asked, Message | None]:
        """What a trainer waits for, and the rows that it gets at once: those that the step that runs will not change."""
        name = self.job.casts[pull.channel][0] if pull.channel in self.job.casts else pull.channel
        place = self._places[name]
        own = place.local(ids)
        if pull.step < 0:
            return Asked(pull, own), None
        self._asked[trainer, name, pull.step] = own
        at_once = pull.when == "step" and self.job.plan.accumulate == 1
        if not at_once or name not in self.in_place or isinstance(place, AnyIds):
            return Asked(pull, own), None
        _unsettle(slot, pull.step, own)
        if name not in self._settled:
            self._settled[name] = Settled(place.rows)
        settled = self._settled[name].ask(trainer, own, pull.step, slot.newest, live)
        if settled is None:
            return Asked(pull, own), None
        rows = self._rows_of(as_tensor(slot.values[slot.newest or 0]), own[where(settled)], pull)
        early = Message(Rows(pull.channel, pull.turn, bits(settled), last=False), rows)
        return Asked(pull, own, ~settled), early

    def reply(self, trainer: int, asked: Asked, table: torch.Tensor | Column) -> Message:
        """The rows that a trainer does not have yet."""
        pull, missing = asked.header, asked.missing
        if isinstance(table, Column):
            return Message(Rows(pull.channel, pull.turn), self._rows_by_id(trainer, asked, table))
        some = b"" if missing is None else bits(missing)
        rows = self._rows_of(table, asked.ids if missing is None else asked.ids[where(missing)], pull)
        return Message(Rows(pull.channel, pull.turn, some), rows)

    def _rows_by_id(self, trainer: int, asked: Asked, table: Column) -> torch.Tensor:
        """The rows of any ids; in a step that trains, some are made, and which there are is known to the push."""
        pull = asked.header
        slots = table.table.slots(asked.ids, training=pull.step >= 0)
        if pull.step >= 0:
            name = self.job.casts[pull.channel][0] if pull.channel in self.job.casts else pull.channel
            self._there[trainer, name, pull.step] = slots >= 0
        rows, cast = table.at(slots), self.job.casts.get(pull.channel)
        return rows if cast is None else rows.to(cast[1])

    def _rows_of(self, table: torch.Tensor, ids: torch.Tensor, pull: PullRows) -> torch.Tensor:
        rows, cast = read_rows(table, ids), self.job.casts.get(pull.channel)
        return rows if cast is None else rows.to(cast[1])


def _unsettle(slot: Slot, step: int, ids: torch.Tensor) -> None:
    """Rows that a trainer asks for late, for the step that runs, change after all: who has them gets them again."""
    for index, (to, other) in enumerate(slot.parked):
        if isinstance(other, Asked) and other.missing is not None and other.header.step > step:
            slot.parked[index] = to, replace(other, missing=other.missing | torch.isin(other.ids, ids))


def _places_here(job: Job, rank: int) -> dict[str, Places]:
    """The pieces of tables that a server keeps, each with the rows that it has."""
    held = {v.name: v for v in job.servers[rank].holds}
    any_ids = {name for name, variable in held.items() if variable.unbounded is not None}
    names = any_ids | job.by_rows & held.keys()
    length: Counter[str] = Counter()
    for variable in job.held.values():
        length[variable.whole or variable.name] += variable.shape[0] if variable.shape else 0
    below = {
        n: Below(part.part[0], part.shape[0]) for n, part in job.below.items() if part.part and part.whole in names
    }
    return {name: places_of(held[name], length[held[name].whole or name]) for name in names} | below
