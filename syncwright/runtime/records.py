"""What deferred() has recorded of a job's variables: who makes them at the start, and what of them stays on servers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch

from syncwright.capture.state import Binding
from syncwright.deferred.record import Record, digest
from syncwright.deferred.replay import Replay
from syncwright.deferred.tensor import Deferred, put_away, record_of
from syncwright.errors import DeferredError, Disagreement, PlanError, RequestError
from syncwright.job import Job
from syncwright.near import did_you_mean
from syncwright.plan import Hashed, Plan
from syncwright.plan.sync import served_by
from syncwright.program import Variable
from syncwright.runtime.executor import Blocked
from syncwright.runtime.large_pages import memory_for
from syncwright.runtime.messages import Start


class Records:
    """By variable, what it was recorded as when the job began. Never changes."""

    def __init__(self, values: Mapping[str, object] = MappingProxyType({})) -> None:
        self._records = {name: record_of(value) for name, value in values.items() if isinstance(value, Deferred)}

    def start(self, variable: Variable, start: Start, memory: torch.Tensor | None = None) -> torch.Tensor:
        """What a variable, or a piece of one, begins with, in memory of its own or `memory`. Raises `Disagreement` where its
        record is not trainer 0's."""
        whole = variable.whole or variable.name
        memory = memory_for(variable.shape, variable.dtype) if memory is None else memory
        if not start.record:
            return memory.fill_(start.number)
        record = self._records.get(whole)
        if record is None or digest(record) != start.record:
            raise Disagreement(
                f"'{whole}' is deferred, and recorded as {_short(record)} here, as {start.record[:12]} by trainer 0. Expected "
                "every role to build the same model from the same random state. Seed in the same way on all roles before the "
                "model is built (torch.manual_seed(7), not the rank), and draw nothing before that on some of them alone."
            )
        first = variable.part[0] if variable.part is not None else 0
        row = variable.numel // max(1, variable.shape[0]) if variable.shape else 1
        return Replay(record).fill(memory, first * row)

    def start_of(self, variable: Variable, whole: object, value: torch.Tensor) -> tuple[str, float] | None:
        """What a server makes its part of a variable from: the digest of the whole's record, as it was when the job began, or a
        number; None where the part, `value`, has to travel."""
        if isinstance(whole, Deferred):
            own = self._records.get(variable.whole or variable.name)
            found = None if own is None else digest(own)
            return (found, 0.0) if found is not None and found == digest(record_of(whole)) else None
        if value.dim() and value.numel() > 1 and value.is_floating_point() and not any(value.stride()):
            return "", float(value[(0,) * value.dim()])
        return None


NO_RECORDS = Records()

SERVED = (
    "'{name}' is deferred, and servers keep its values since training has begun; here are none. Expected to be asked for them "
    "while the job runs: trainer.sync(deferred=True) writes them whole into your objects, trainer.rows('{name}') gives them "
    "piece by piece."
)

ENDED = (
    "'{name}' is deferred, and servers kept its values, which have ended with their job; here are none. Expected to be asked "
    "for them before close(): trainer.sync(deferred=True), or trainer.rows('{name}')."
)
log = logging.getLogger("syncwright")


def check_made(binding: Binding, plan: Plan) -> None:
    """Raises `PlanError` where servers are to keep by virtual shards what is deferred, or has state that is: of a record they
    make rows in order."""
    values = binding.values()
    deferred = {name for name, value in values.items() if isinstance(value, Deferred)}
    for sharing in plan.sharings:
        served = served_by(sharing.sync)
        if served is None or not isinstance(served.partition, Hashed):
            continue
        own = {n for n in deferred if sharing.variable in (n, binding.variables[n].of)}
        if own:
            raise PlanError(
                f"variable {sharing.variable!r}: found {', '.join(map(repr, sorted(own)))} deferred, but rows that are kept by "
                "virtual shards, expected rows in order: so servers make them from what deferred() has recorded. Give it "
                "another partition, make it (and its optimizer) outside of deferred(), or call "
                "syncwright.deferred.build(model, optimizer) first."
            )


def apart(binding: Binding, job: Job) -> set[str]:
    """What servers keep, or have pieces of, of deferred parameters and their state: it stays there unless it is asked for."""
    deferred = {name for name, slots in binding.modules.items() if isinstance(slots[0].get(), Deferred)}
    found = set()
    for name, variable in job.addressed.items():
        whole = variable.whole or variable.name
        known = binding.variables.get(whole)
        if whole in deferred or (known is not None and known.of in deferred):
            found.add(name)
    return found


def leave_to_servers(binding: Binding, job: Job, why: str) -> None:
    """The user's deferred tensors that servers keep forget how they began: what servers have is what counts."""
    values = binding.values()
    for whole in {variable.whole or name for name, variable in job.addressed.items()}:
        value = values.get(whole)
        if isinstance(value, Deferred):
            put_away(value, why.format(name=whole))


def leave_behind(binding: Binding, job: Job, asked_for: bool) -> None:
    """The job ends, and with it what servers keep of deferred parameters: said where nobody has asked for it."""
    names = apart(binding, job)
    leave_to_servers(binding, job, ENDED)
    if not asked_for:
        log.warning(
            "%s (of deferred parameters) stay with the servers, which end with the job. Expected them to be asked for before "
            "close(): trainer.sync(deferred=True), or trainer.rows(name).",
            _wholes(job, names),
        )


def check_whole(binding: Binding, job: Job) -> None:
    """Raises `DeferredError` where a state would leave out what servers keep of deferred parameters."""
    left = apart(binding, job)
    if left:
        held = job.addressed
        nbytes = sum(held[name].nbytes for name in left)
        raise DeferredError(
            f"state_dict: {_wholes(job, left)} (of deferred parameters) are kept by servers and take {nbytes / 1e6:,.0f} MB. "
            "Expected to be told to bring them here. Give state_dict(deferred=True), on trainers that have the memory, or take "
            "them piece by piece: for first, rows in trainer.rows(name)."
        )


class Source(Protocol):
    """Who brings what servers keep: a trainer's replica."""

    def rows(self, name: str, first: int, last: int) -> Generator[Blocked, None, torch.Tensor]: ...

    def served(self, without: Collection[str]) -> Generator[Blocked, None, Mapping[str, object]]: ...


def rows_on_servers(
    job: Job,
    name: str,
    at_a_time: int,
    source: Source,
    drive: Callable[[Sequence[Generator[Blocked, None, object]]], list],
) -> Iterator[tuple[int, torch.Tensor]]:
    """What servers keep of a variable, so many rows at a time, each with the number of the first; what is not pulled by
    rows comes a piece at a time. Raises `RequestError` where servers keep no such variable, or not its rows in order."""
    held, by_rows = job.addressed, job.by_rows
    joined = {part.name: flat for flat, parts in job.joined.items() for part in parts}
    pieces = [v for v in held.values() if name == (v.whole or v.name) or joined.get(name) == v.name]
    if not pieces:
        known = sorted(job.served)
        raise RequestError(
            f"rows: servers keep no '{name}'; expected one of {', '.join(known) or 'none'}. "
            f"{did_you_mean(name, known, 'Correct the name.')}"
        )
    _check_order(job, name, pieces)
    for piece in sorted(pieces, key=lambda v: v.part or (0, 0)):
        first, last = piece.part or (0, piece.shape[0] if piece.shape else 1)
        if piece.name not in by_rows:
            (found,) = drive([source.served(held.keys() - {piece.name})])
            yield first, found[name]
            continue
        for start in range(first, last, at_a_time):
            stop = min(last, start + at_a_time)
            (rows,) = drive([source.rows(piece.name, start, stop)])
            yield start, rows


def _check_order(job: Job, name: str, pieces: Sequence[Variable]) -> None:
    """Raises `RequestError` for rows that have no numbers, or are not in order."""
    if any(piece.name in job.by_id for piece in pieces):
        raise RequestError(
            f"rows: '{name}' has rows by 64-bit ids, which have no order; expected rows with numbers. Take them, and state per "
            "row, by trainer.export(table)."
        )
    if any(piece.selection is not None and piece.selection.along == "shards" for piece in pieces):
        raise RequestError(
            f"rows: servers keep '{name}' by virtual shards, where its rows are not in order; expected another partition. Take "
            "it whole: trainer.state_dict()."
        )


def _wholes(job: Job, names: Collection[str]) -> str:
    held = job.addressed
    return ", ".join(sorted({held[name].whole or name for name in names}))


def _short(record: Record | None) -> str:
    return "nothing" if record is None else str(digest(record))[:12]
