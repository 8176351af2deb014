"""Elements from records: ranges of them, in memory for a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.utils import _pytree as pytree

from syncwright.deferred.record import (
    ALIGNED,
    CHUNK,
    Applied,
    Away,
    Drawn,
    Filled,
    Given,
    Record,
    Taken,
    Written,
    chunks,
)
from syncwright.errors import DeferredError


class Replay:
    """Makes elements of one record. Changes: keeps the chunks drawn last, so that ranges in order draw each once."""

    def __init__(self, record: Record):
        self.record = record
        self._bounds: dict[int, list[tuple[int, int]]] = {}
        self._last: dict[int, tuple[int, torch.Tensor]] = {}

    def values(self, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop), flat, in memory of their own. Raises `DeferredError` for those that are elsewhere."""
        with torch.no_grad():
            return self._values(self.record, start, stop, {}).clone()

    def parts(self) -> Iterator[torch.Tensor]:
        """All elements, a chunk at a time."""
        for start, stop in _ranges(0, self.record.numel):
            yield self.values(start, stop)

    def fill(self, out: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Writes elements from `start` on into a contiguous tensor, a chunk at a time."""
        flat = out.view(-1)
        with torch.no_grad():
            for first, last in _ranges(start, start + flat.numel()):
                flat[first - start : last - start] = self._values(self.record, first, last, {})
        return out

    def _values(self, record: Record, start: int, stop: int, known: dict) -> torch.Tensor:
        key = id(record), start, stop
        if key not in known:
            known[key] = self._made(record, start, stop, known)
        return known[key]

    def _made(self, record: Record, start: int, stop: int, known: dict) -> torch.Tensor:
        match record:
            case Filled():
                return torch.full((stop - start,), record.number, dtype=record.dtype)
            case Drawn():
                return self._drawn(record, start, stop)
            case Applied():
                return self._applied(record, start, stop, known)
            case Written():
                return self._written(record, start, stop, known)
            case Taken():
                return self._values(record.base, record.start + start, record.start + stop, known)
            case Given():
                return record.values[start:stop]
            case Away():
                raise DeferredError(record.why)

    def _drawn(self, record: Drawn, start: int, stop: int) -> torch.Tensor:
        bounds = self._bounds.setdefault(id(record), list(chunks(record.numel)))
        first = min(start // CHUNK, len(bounds) - 1)
        parts = []
        for index in range(first, len(bounds)):
            begin, end = bounds[index]
            if begin >= stop:
                break
            parts.append(self._chunk(record, index, end - begin)[max(start - begin, 0) : stop - begin])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunk(self, record: Drawn, index: int, numel: int) -> torch.Tensor:
        kept = self._last.get(id(record))
        if kept is None or kept[0] != index:
            generator = torch.Generator()
            generator.set_state(record.states[index])
            values = record.draw(torch.empty(numel, dtype=record.dtype), *record.args, generator=generator)
            self._last[id(record)] = kept = index, values
        return kept[1]

    def _applied(self, record: Applied, start: int, stop: int, known: dict) -> torch.Tensor:
        """On whole groups: what a kernel does with the elements behind the last one may differ by a rounding."""
        begin, end = start - start % ALIGNED, min(record.numel, -(-stop // ALIGNED) * ALIGNED)
        make = partial(self._argument, start=begin, stop=end, known=known)
        args, kwargs = pytree.tree_map(make, (record.args, record.kwargs))
        if record.func._schema.is_mutable:
            args = (args[0].clone(), *args[1:])
        return record.func(*args, **kwargs)[start - begin : stop - begin]

    def _argument(self, leaf: object, start: int, stop: int, known: dict) -> object:
        return self._values(leaf, start, stop, known) if isinstance(leaf, Record) else leaf

    def _written(self, record: Written, start: int, stop: int, known: dict) -> torch.Tensor:
        first, last = max(start, record.start), min(stop, record.start + record.part.numel)
        if first >= last:
            return self._values(record.base, start, stop, known)
        part = self._values(record.part, first - record.start, last - record.start, known)
        if (first, last) == (start, stop):
            return part
        whole = self._values(record.base, start, stop, known).clone()
        whole[first - start : last - start] = part
        return whole


def _ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut where chunks begin."""
    while start < stop:
        end = min(stop, start - start % CHUNK + CHUNK)
        yield start, end
        start = end
