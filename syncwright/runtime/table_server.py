"""A server's tables of any ids, and what trainers have them do beside steps. Changes with every order.

    set       (trainer 0) the table holds what is given, from a version on: at the start, or loaded
    read      gives all rows, once what is asked for as of is there; changes nothing
    export    gives all rows, or those that changed, and notes that it has
    restore   (what trainer 0 gives) all rows, or those that changed, on top of what is there
    observe   shows and clicks of ids
    shrink    removes rows, and gives their ids

From `export` on, it is done once, when all live trainers have asked for it: so it stands between the same two steps for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from syncwright.errors import TableError
from syncwright.job import Job
from syncwright.program import Role, Variable
from syncwright.runtime.messages import Address, Kind, Message, Order, Part
from syncwright.runtime.packed import chunks, pack, unpack
from syncwright.runtime.places import AnyIds, places_of
from syncwright.runtime.served_table import Column, ServedTable
from syncwright.runtime.wire import WireError
from syncwright.tables import Saved, Table
from syncwright.tables.store import Column as State
from syncwright.tables.table import ROWS

FIRST = Address(Kind.TRAINER, 0)
MOST_TOLD_NBYTES = 1 << 28
"""The most bytes that a trainer other than the first may tell in one order."""
BEGIN, NUMBER, ERROR, COUNT, IDS = "begin.", "numbers.", "error", "count", "ids"
"""Names of what is packed beside an export: what state of a new row begins with; state without rows; why it cannot be done;
how many rows there are, where those are too many; ids."""

Given = dict[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class _Part:
    """One table, or piece of one, as it is kept here. Changes with every order.

    state    of each column of state its variable, by what an optimizer calls it: "sum" of "items.weight.sum[0]"
    numbers  of each state that all rows have together its variable, likewise
    asked    who has asked for what all trainers do together, and what they gave
    """

    variable: Variable
    places: AnyIds
    state: dict[str, Variable]
    numbers: dict[str, Variable]
    in_step: bool
    table: ServedTable | None = None
    coming: dict[Address, list[torch.Tensor]] = field(default_factory=dict)
    ready: dict[Address, Given] = field(default_factory=dict)
    asked: dict[int, tuple[Order, Given]] = field(default_factory=dict)


class TableServer:
    """What one server does with tables of any ids, for its `Server`."""

    def __init__(self, job: Job, rank: int):
        self._parts = _parts_here(job, rank)
        self.columns = {v.name: name for name, part in self._parts.items() for v in _columns(part).values()}

    def refusal(self, sender: Address, order: Order, tensor: torch.Tensor | None) -> str | None:
        """Why an order cannot be carried out; None where it can. Holds what has come of it, until all has."""
        part = self._parts.get(order.channel)
        if part is None or tensor is None or tensor.dtype is not torch.uint8 or tensor.dim() != 1:
            return f"this server keeps no table of any ids '{order.channel[:80]}'"
        if sender != FIRST and order.act == "set":
            return "trainer 0 sets values"
        if sender.rank in part.asked:
            return "it comes before the answer to another order"
        coming = part.coming.setdefault(sender, [])
        coming.append(tensor)
        if sender != FIRST and sum(map(len, coming)) > MOST_TOLD_NBYTES:
            del part.coming[sender]
            return f"it tells more than {MOST_TOLD_NBYTES} bytes"
        if not order.last:
            return None
        del part.coming[sender]
        try:
            part.ready[sender] = _checked(part, order, unpack(torch.cat(coming)), sender)
        except WireError as error:
            return str(error)
        return None

    def set(self, sender: Address, order: Order) -> tuple[dict[str, Column], Given]:
        """The columns, by the names of variables, and state without rows, of a table that is set anew."""
        part = self._parts[order.channel]
        given = part.ready.pop(sender)
        state = {key: State(v.shape[1:], float(given[BEGIN + key]), v.dtype) for key, v in part.state.items()}
        assert part.variable.unbounded is not None, "tables here are of any ids"
        table = Table(part.variable.unbounded, state, dtype=part.variable.dtype)
        saved = Saved.from_dict(_without(given, BEGIN))
        table.restore(saved)
        part.table = ServedTable(table, part.in_step)
        return {v.name: Column(part.table, key) for key, v in _columns(part).items()}, self._numbers(part, saved)

    def read(self, order: Order, numbers: Given) -> list[Message]:
        """All rows of a table, or how many there are."""
        part = self._parts[order.channel]
        assert part.table is not None, "looked at before"
        table = part.table.table
        if 0 <= order.number < len(table):
            return answer(order, {COUNT: torch.tensor(len(table))})
        return answer(order, replace(table.snapshot(), numbers=self._named(part, numbers)).to_dict())

    def ask(self, sender: Address, order: Order) -> None:
        """Notes that a trainer has asked for what all do together."""
        part = self._parts[order.channel]
        part.asked[sender.rank] = order, part.ready.pop(sender)

    def due(self, name: str, version: int | None, live: Sequence[int]) -> bool:
        """Whether all live trainers have asked for something, the table has been set and the steps before it are done."""
        part = self._parts.get(name)
        if part is None or part.table is None or not part.asked or any(k not in part.asked for k in live):
            return False
        order = next(iter(part.asked.values()))[0]
        return order.when == "now" or (version is not None and version >= order.version)

    def done(self, name: str, numbers: Given) -> tuple[list[tuple[Address, Message]], Given]:
        """Does it: the answers, and state without rows that is set anew."""
        part = self._parts[name]
        asked, part.asked = part.asked, {}
        set_anew: Given = {}
        try:
            found, set_anew = self._do(part, [asked[k] for k in sorted(asked)], numbers)
        except TableError as error:
            found = {ERROR: torch.frombuffer(bytearray(str(error).encode()), dtype=torch.uint8)}
        sent = [
            (Address(Kind.TRAINER, k), message) for k, (order, _) in asked.items() for message in answer(order, found)
        ]
        return sent, set_anew

    def lose(self, trainer: int) -> None:
        """Forgets what a trainer has asked for that is lost."""
        for part in self._parts.values():
            part.asked.pop(trainer, None)
            part.coming.pop(Address(Kind.TRAINER, trainer), None)

    def numbers(self, name: str) -> list[str]:
        """The state that all rows of a table have together."""
        return [variable.name for variable in self._parts[name].numbers.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def _do(self, part: _Part, asked: Sequence[tuple[Order, Given]], numbers: Given) -> tuple[Given, Given]:
        assert part.table is not None, "looked at before"
        table, orders = part.table.table, {(order.act, order.number) for order, _ in asked}
        if len(orders) > 1:
            found = " and ".join(sorted(f"{act} ({number})" for act, number in orders))
            raise TableError(
                f"table '{part.variable.name}': trainers asked for different things between two steps: {found}. Expected all to "
                "call the same methods in the same order, with the same marks. Call them outside of `if rank == 0`."
            )
        ((act, number),) = orders
        match act:
            case "export":
                saved = table.export(None if number < 0 else number)
                return replace(saved, numbers=self._named(part, numbers)).to_dict(), {}
            case "restore":
                saved = next(Saved.from_dict(given) for _, given in asked if given)
                table.restore(saved)
                return {}, self._numbers(part, saved)
            case "observe":
                for _, given in asked:
                    table.observe(given[IDS], given["shows"], given["clicks"])
                return {}, {}
            case "shrink":
                return {IDS: table.shrink().ids}, {}
        raise AssertionError(f"{act} is no order of all trainers")

    def _named(self, part: _Part, numbers: Given) -> Given:
        return {key: numbers[variable.name] for key, variable in part.numbers.items()}

    def _numbers(self, part: _Part, saved: Saved) -> Given:
        return {v.name: saved.numbers[key].to(v.dtype) for key, v in part.numbers.items() if key in saved.numbers}


def answer(order: Order, found: Mapping[str, torch.Tensor]) -> list[Message]:
    """What a server answers with, in messages of a bounded size."""
    return [Message(Part(order.channel, order.turn, last), chunk) for chunk, last in chunks(pack(found))]


def _parts_here(job: Job, rank: int) -> dict[str, _Part]:
    """The pieces of tables of any ids that a server keeps."""
    holds = job.servers[rank].holds
    found = {}
    for variable in [v for v in holds if v.unbounded is not None]:
        prefix = f"{variable.whole or variable.name}."
        mine = [v for v in holds if v.role is Role.STATE and v.of == variable.name]
        state = {(v.whole or v.name).removeprefix(prefix): v for v in mine}
        places = places_of(variable, 0)
        assert isinstance(places, AnyIds), "any ids"
        found[variable.name] = _Part(
            *(variable, places),
            {key: v for key, v in state.items() if v.shape},
            {key: v for key, v in state.items() if not v.shape},
            variable.name not in job.arriving,
        )
    return found


def _columns(part: _Part) -> dict[str, Variable]:
    """The variables whose values are columns of the table."""
    return {ROWS: part.variable, **part.state}


def _without(given: Given, prefix: str) -> Given:
    return {name: tensor for name, tensor in given.items() if not name.startswith(prefix)}


def _checked(part: _Part, order: Order, given: Given, sender: Address) -> Given:
    """What an order brings; `WireError` where it is not what the order takes."""
    match order.act:
        case "set":
            if missing := [key for key in part.state if given.get(BEGIN + key, torch.empty(0)).shape != ()]:
                raise WireError(f"it does not say what '{missing[0]}' begins with")
            _check_saved(part, _without(given, BEGIN))
        case "restore" if given and sender != FIRST:
            raise WireError("trainer 0 sets values")
        case "restore" if given:
            _check_saved(part, given)
        case "restore" if sender == FIRST:
            raise WireError("it brings nothing to restore")
        case "observe":
            forms = {name: (tensor.dtype, tensor.dim()) for name, tensor in given.items()}
            expected = {IDS: (torch.int64, 1), "shows": (torch.float64, 1), "clicks": (torch.float64, 1)}
            if forms != expected or len({len(tensor) for tensor in given.values()}) > 1:
                raise WireError("it brings other than ids, shows and clicks")
        case _ if given:
            raise WireError(f"it brings tensors, which {order.act} takes none of")
    return given


def _check_saved(part: _Part, given: Given) -> None:
    try:
        saved = Saved.from_dict(given)
    except (KeyError, ValueError, RuntimeError) as error:
        raise WireError(f"what it brings is no export: {error}") from error
    for each in [held for held in (saved.rows, saved.candidates) if held is not None]:
        for ids in (each.ids, each.removed):
            if ids.dtype is not torch.int64 or ids.dim() != 1 or not part.places.has(ids):
                raise WireError(f"its ids are not all {part.places}, which this server keeps")
        for name, column in each.columns.items():
            if column.shape[:1] != each.ids.shape:
                raise WireError(f"its column '{name[:80]}' has another number of rows than of ids")
