"""A trainer's rows of tables: which it has asked for, and which have come. Changes with every message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from syncwright import kernels
from syncwright.items import write_rows
from syncwright.job import Job, Table
from syncwright.runtime.messages import Message, PullRows, Rows
from syncwright.runtime.rows import from_bits, where
from syncwright.tables.mixing import shard_of

Send = Callable[[int, Message], None]
NEVER = -1
"""The step of rows whose gradient nobody pushes."""


@dataclass(slots=True, eq=False)
class Request:
    """Rows of one table that have been asked for. Changes as they come.

    count   how many ids there are; behind them are others than ids
    parts   of each piece of the table its name, and the places of its ids among all; None: all of them
    waiting  pieces of which rows are still to come
    """

    ids: torch.Tensor
    count: int
    parts: list[tuple[str, torch.Tensor | None]]
    turn: int
    waiting: set[str] = field(init=False)
    _whole: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.waiting = {name for name, _ in self.parts}

    @property
    def rows(self) -> torch.Tensor | None:
        """All rows, with zeros behind them; None while some are not there."""
        return None if self.waiting else self._whole

    def take(self, header: Rows, rows: torch.Tensor) -> None:
        """Puts rows in their places."""
        if self._whole is None:
            self._whole = rows.new_zeros((len(self.ids), *rows.shape[1:]))
        places = dict(self.parts)[header.channel]
        if header.last:
            self.waiting.discard(header.channel)
        if header.some:
            mask = from_bits(header.some, self.count if places is None else len(places))
            places = where(mask) if places is None else places[where(mask)]
        if places is None:
            self._whole[: self.count] = rows
        else:
            write_rows(self._whole, places, rows)


class RowClient:
    """What one trainer does with rows of tables, for its `Client`."""

    def __init__(self, job: Job, send: Send):
        self.job, self._send = job, send
        self._turn = 0
        self._requests: dict[tuple[str, int], Request] = {}
        self._by_turn: dict[int, Request] = {}

    def begin(self, step: int) -> None:
        """What was asked for in earlier steps is done."""
        for key in [key for key in self._requests if key[1] < step]:
            self._by_turn.pop(self._requests.pop(key).turn, None)

    def pull(self, channel: str, ids: torch.Tensor, pull: Callable[[str], PullRows]) -> torch.Tensor | None:
        """The rows of `ids`, asked for the first time; `pull` makes the header for a piece, as of which it is asked."""
        table = self.job.tables[channel]
        header = pull(channel)
        key = (table.of, header.step)
        request = self._requests.get(key)
        if request is None or request.ids is not ids:
            request = self._keep(key, self._ask(table, ids, pull))
        return request.rows

    def of_piece(self, name: str, ids: torch.Tensor, pull: Callable[[str], PullRows]) -> torch.Tensor | None:
        """The rows of `ids` of one piece, or of its state; asked for the first time that these very ids are given."""
        request = self._requests.get((name, NEVER))
        if request is None or request.ids is not ids:
            request = self._keep((name, NEVER), self._send_for(ids, len(ids), [(name, None)], pull))
        return request.rows

    def parts(self, channel: str, step: int, rows: torch.Tensor, skip: int) -> list[tuple[str, torch.Tensor, int]]:
        """The rows of a gradient for each piece of the table, and how many at the front of what was asked are left out."""
        table = self.job.tables[channel]
        request = self._requests.get((table.of, step))
        if request is None:
            return [(name, rows[:0], 0) for name, _ in table.pieces]
        pieces = [name for name, _ in table.pieces]
        found = []
        for name, (_, places) in zip(pieces, request.parts, strict=True):
            if places is None:
                found.append((name, rows[skip : request.count], skip))
            else:
                left = int((places < skip).sum())
                found.append((name, rows.index_select(0, places[left:]), left))
        return found

    def take(self, header: Rows, rows: torch.Tensor) -> None:
        """Rows that have come; those of an earlier step are late and dropped."""
        request = self._by_turn.get(header.turn)
        if request is not None:
            request.take(header, rows)

    def _keep(self, key: tuple[str, int], request: Request) -> Request:
        """In place of an earlier one, of which nobody wants the rows any more."""
        before = self._requests.get(key)
        if before is not None:
            del self._by_turn[before.turn]
        self._requests[key] = request
        return request

    def _ask(self, table: Table, ids: torch.Tensor, pull: Callable[[str], PullRows]) -> Request:
        count = kernels.distinct(ids)
        return self._send_for(ids, count, _parts(table, ids[:count]), pull)

    def _send_for(
        self,
        ids: torch.Tensor,
        count: int,
        parts: list[tuple[str, torch.Tensor | None]],
        pull: Callable[[str], PullRows],
    ) -> Request:
        known = ids[:count]
        self._turn += 1
        request = Request(ids, count, parts, self._turn)
        self._by_turn[request.turn] = request
        for name, places in request.parts:
            header = pull(name)
            header = PullRows(name, header.version, header.when, request.turn, header.step)
            self._send(
                self.job.owners[name], Message(header, known if places is None else known.index_select(0, places))
            )
        return request


def _parts(table: Table, ids: torch.Tensor) -> list[tuple[str, torch.Tensor | None]]:
    """By piece of the table, where its ids stand."""
    if len(table.pieces) == 1:
        return [(table.pieces[0][0], None)]
    stops, shards = torch.tensor([selection.stop for _, selection in table.pieces]), table.pieces[0][1].shards
    piece = torch.bucketize(shard_of(ids, shards) if shards else ids, stops, right=True)
    return [(name, (piece == index).nonzero().view(-1)) for index, (name, _) in enumerate(table.pieces)]
