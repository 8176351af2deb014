"""A trainer's tables of any ids, which servers keep: given, read whole, and what all trainers have done with them together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace

import torch

from syncwright.capture.state import Binding
from syncwright.capture.tables import out_of
from syncwright.errors import TableError
from syncwright.runtime.client import Client
from syncwright.runtime.executor import Blocked
from syncwright.runtime.messages import Act
from syncwright.runtime.places import AnyIds
from syncwright.runtime.table_client import keeps
from syncwright.runtime.table_server import BEGIN, COUNT, ERROR
from syncwright.tables import Saved
from syncwright.tables.saved import joined

Given = dict[str, torch.Tensor]
Brings = Callable[[AnyIds], Mapping[str, torch.Tensor]]


def give(client: Client, binding: Binding, name: str, version: int) -> None:
    """Sends servers their parts of a table of the user's."""
    saved, begin = out_of(binding, name)
    more = {BEGIN + key: number for key, number in begin.items()}
    for piece, places in client.tables.pieces[name].items():
        client.order(piece, "set", version, {**saved.where(keeps(places)).to_dict(), **more})


def order(
    client: Client, name: str, act: Act, step: int, brings: Brings, number: int = -1
) -> Generator[Blocked, None, list[Given]]:
    """Has all servers do something with a table, as of so many steps; what each answers.

    Raises `TableError` where they cannot.
    """
    pieces = client.tables.pieces[name]
    turns = {piece: client.order(piece, act, step, brings(places), number) for piece, places in pieces.items()}
    return (yield from answers(client, turns, act))


def read(client: Client, turns: Mapping[str, int], most: int, waits: str) -> Generator[Blocked, None, Saved | int]:
    """All rows of a table that have been asked for, or how many there are where those are more than `most`."""
    found = yield from answers(client, turns, waits)
    counts = [int(each[COUNT]) if COUNT in each else len(each["rows.ids"]) for each in found]
    if sum(counts) > most:
        return sum(counts)
    return joined([Saved.from_dict(each) for each in found])


def ask_to_read(client: Client, name: str, step: int, most: int, at_end: bool = False) -> dict[str, int]:
    """Asks for all rows of a table; by piece, the turn of the answer."""
    return {piece: client.order(piece, "read", step, {}, most, at_end=at_end) for piece in client.tables.pieces[name]}


def answers(client: Client, turns: Mapping[str, int], waits: str) -> Generator[Blocked, None, list[Given]]:
    """What servers answer, by piece. `waits`: what is waited for, in words."""
    found = []
    for piece, turn in turns.items():
        while (answer := client.tables.answer(turn)) is None:
            yield Blocked(waits, piece)
        found.append(answer)
    for answer in found:
        if ERROR in answer:
            raise TableError(bytes(answer[ERROR].tolist()).decode())
    return found


def part_of_saved(saved: Saved) -> Brings:
    """What a server keeps of what was saved."""
    return lambda places: saved.where(keeps(places)).to_dict()


def nothing(places: AnyIds) -> Given:
    """For what needs no tensors."""
    return {}


def told(ids: torch.Tensor, shows: torch.Tensor, clicks: torch.Tensor) -> Brings:
    """What a server is told of the ids that it keeps."""
    ids, shows, clicks = ids.reshape(-1).long(), shows.reshape(-1).double(), clicks.reshape(-1).double()

    def brings(places: AnyIds) -> Given:
        mine = keeps(places)(ids)
        return {"ids": ids[mine], "shows": shows[mine], "clicks": clicks[mine]}

    return brings


def exported(found: list[Given]) -> Saved:
    """One export of all servers'. Marks are the same: what changes them all servers do between the same steps."""
    parts = [Saved.from_dict(each) for each in found]
    return replace(joined(parts), now=max(part.now for part in parts))
