"""A map from any 64-bit ids to slots 0, 1, 2, ..."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from syncwright.errors import TableError, TableFull
from syncwright.tables.lazily import zeros
from syncwright.tables.mixing import mix64

EMPTY, GRAVE, FIRST = 0, 1, 2
"""What a bucket says: nobody has been here; an id was removed from here; id number `bucket - FIRST` is here."""

NEXT, FREE, GRAVES = 0, 1, 2
"""Items of `sizes`: the first slot that was never used; how many slots are free below it; how many buckets are graves."""

_MOST = 2**31 - 1 - FIRST
_SMALLEST = 16


class IdIndex:
    """Open addressing with triangular steps; each call works on all its ids at once. Changes with use.

    buckets  int32, a power of two of them; where id x is looked for: at mix64(x), then 1, 2, 3, ... further
    keys     int64, the id in each slot
    free     int32, a stack of slots whose ids were removed
    sizes    int64, three numbers (NEXT, FREE, GRAVES)

    All zeros is an empty map. At most 2/3 of the buckets are in use: 6 to 12 bytes for an id, and 8 to 10 for its key.

        find([7, 9])            [-1, -1]
        insert([7, -9, 7])      [0, 1, 0]       unknown ids get slots in the order in which they first occur
        remove([7]); insert(5)  [0]             of free slots the one freed last comes first
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None):
        """Empty and growing; or over `tensors` of a fixed size, as `fixed` makes them, which it writes to."""
        self.grows = tensors is None
        tensors = _tensors(_SMALLEST, _SMALLEST, 0) if tensors is None else tensors
        self._buckets, self._keys = tensors["buckets"].numpy(), tensors["keys"].numpy()
        self._free, self._sizes = tensors["free"].numpy(), tensors["sizes"].numpy()

    @staticmethod
    def fixed(capacity: int) -> dict[str, Tensor]:
        """The tensors of an empty map that holds `capacity` ids and does not grow."""
        if not 0 < capacity <= _MOST:
            raise TableError(f"found capacity={capacity}; expected a number of ids from 1 to {_MOST}.")
        return _tensors(_power_of_two(2 * capacity), capacity, capacity)

    def tensors(self) -> dict[str, Tensor]:
        """The map's memory, not copied."""
        held = {"buckets": self._buckets, "keys": self._keys, "free": self._free, "sizes": self._sizes}
        return {name: torch.from_numpy(array) for name, array in held.items()}

    def __len__(self) -> int:
        return int(self._sizes[NEXT] - self._sizes[FREE])

    @property
    def end(self) -> int:
        """All slots in use are below it."""
        return int(self._sizes[NEXT])

    @property
    def nbytes(self) -> int:
        return self._buckets.nbytes + self._keys.nbytes + self._free.nbytes

    def find(self, ids: Tensor) -> Tensor:
        """The slot of each id, -1 where it is unknown; int64, of the shape of `ids`."""
        slots, _ = self._locate(_array(ids))
        return torch.from_numpy(slots).view(ids.shape)

    def insert(self, ids: Tensor) -> Tensor:
        """The slot of each id; unknown ones are added.

        Raises `TableFull`, and adds none, where a map of a fixed size has too few slots left.
        """
        wanted = _array(ids)
        slots, _ = self._locate(wanted)
        unknown = np.flatnonzero(slots < 0)
        if len(unknown):
            new, first, which = np.unique(wanted[unknown], return_index=True, return_inverse=True)
            order = np.argsort(first)
            made = np.empty(len(new), np.int64)
            made[order] = self._take(len(new))
            self._keys[made] = new
            self._place(new, made)
            slots[unknown] = made[which]
        return torch.from_numpy(slots).view(ids.shape)

    def new(self, ids: Tensor) -> Tensor:
        """Those of `ids` that are unknown, each once, in the order in which they first occur. Adds none."""
        wanted = _array(ids)
        slots, _ = self._locate(wanted)
        unknown = wanted[slots < 0]
        _, first = np.unique(unknown, return_index=True)
        return torch.from_numpy(unknown[np.sort(first)])

    def remove(self, ids: Tensor) -> Tensor:
        """Forgets ids (unknown ones, and repeated ones, are no fault); the slots that this frees, in the ids' order."""
        slots, at = self._locate(_array(ids))
        known = np.flatnonzero(slots >= 0)
        _, first = np.unique(slots[known], return_index=True)
        known = known[np.sort(first)]
        freed = slots[known]
        self._buckets[at[known]] = GRAVE
        self._sizes[GRAVES] += len(freed)
        self._push(freed)
        return torch.from_numpy(freed)

    def clear(self) -> None:
        """Forgets all ids."""
        self._buckets.fill(EMPTY)
        self._sizes.fill(0)

    def check_room(self, count: int) -> None:
        """Raises `TableFull` unless an empty map of this size holds `count` ids."""
        if not self.grows and count > len(self._keys):
            raise TableFull(self._full(0, count))

    def slots(self) -> Tensor:
        """All slots in use, ascending."""
        used = np.ones(self.end, bool)
        used[self._free[: self._sizes[FREE]]] = False
        return torch.from_numpy(np.flatnonzero(used))

    def ids(self) -> Tensor:
        """All ids, in the order of `slots()`."""
        return torch.from_numpy(self._keys[self.slots().numpy()])

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each id its slot, or -1, and the bucket that says so."""
        found = self._home(ids)
        codes = self._buckets[found]
        here = self._matches(codes, ids)
        slots = np.where(here, codes - FIRST, -1).astype(np.int64)
        on, step = np.flatnonzero((codes != EMPTY) & ~here), 0
        while len(on):
            step += 1
            at = (found[on] + step) & (len(self._buckets) - 1)
            codes = self._buckets[at]
            here = self._matches(codes, ids[on])
            found[on], slots[on] = at, np.where(here, codes - FIRST, -1)
            on = on[(codes != EMPTY) & ~here]
        return slots, found

    def _matches(self, codes: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Where a bucket says that its id is the one that is looked for."""
        return (codes >= FIRST) & (self._keys[np.maximum(codes, FIRST) - FIRST] == ids)

    def _place(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Lets the buckets say where `ids`, different and unknown ones, are; there is room."""
        at, codes, step = self._home(ids), (slots + FIRST).astype(np.int32), 0
        while len(codes):
            before = self._buckets[at]
            open_ = before < FIRST
            self._buckets[at[open_]] = codes[open_]
            won = open_ & (self._buckets[at] == codes)
            self._sizes[GRAVES] -= np.count_nonzero(before[won] == GRAVE)
            step += 1
            at, codes = (at[~won] + step) & (len(self._buckets) - 1), codes[~won]

    def _home(self, ids: np.ndarray) -> np.ndarray:
        return mix64(torch.from_numpy(ids)).numpy() & (len(self._buckets) - 1)

    def _take(self, count: int) -> np.ndarray:
        """Slots for `count` new ids, and room for them in the buckets."""
        reused = min(count, int(self._sizes[FREE]))
        self._reserve(count, count - reused)
        free, end = int(self._sizes[FREE]), self.end
        self._sizes[FREE] -= reused
        self._sizes[NEXT] += count - reused
        return np.concatenate([self._free[free - reused : free][::-1], np.arange(end, end + count - reused)])

    def _reserve(self, count: int, fresh: int) -> None:
        """Makes room for `count` more ids, of which `fresh` get slots that were never used."""
        end = self.end + fresh
        if end > (_MOST if self.grows else len(self._keys)):
            raise TableFull(self._full(len(self), count))
        if end > len(self._keys):
            self._keys = _longer(self._keys, max(end, len(self._keys) * 5 // 4))
        if (len(self) + count + self._sizes[GRAVES]) * 3 > len(self._buckets) * 2:
            self._rebuild(len(self) + count)

    def _full(self, held: int, count: int) -> str:
        return (
            f"the table holds {held} ids, and {count} more do not fit: its capacity is {len(self._keys)}. Expected room for "
            "every id. Give it a larger capacity, let shrink() remove rows that are no longer used (eviction=), or admit "
            "fewer ids (admission=CountFilter(n), Probability(p) or ShowClick(threshold))."
        )

    def _rebuild(self, count: int) -> None:
        """Buckets without graves, with room for `count` ids and some more. Those of a fixed size stay where they are."""
        ids, slots = self.ids().numpy(), self.slots().numpy()
        if self.grows:
            self._buckets = zeros((_power_of_two(count * 8 // 5),), torch.int32).numpy()
        else:
            self._buckets.fill(EMPTY)
        self._sizes[GRAVES] = 0
        self._place(ids, slots)

    def _push(self, slots: np.ndarray) -> None:
        free = int(self._sizes[FREE])
        if free + len(slots) > len(self._free):
            self._free = _longer(self._free, max(free + len(slots), free * 5 // 4))
        self._free[free : free + len(slots)] = slots
        self._sizes[FREE] += len(slots)


def _tensors(buckets: int, keys: int, free: int) -> dict[str, Tensor]:
    return {
        "buckets": zeros((buckets,), torch.int32),
        "keys": zeros((keys,), torch.int64),
        "free": zeros((free,), torch.int32),
        "sizes": zeros((3,), torch.int64),
    }


def _array(ids: Tensor) -> np.ndarray:
    """On the host, flat, as int64."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TableError(f"ids are {ids.dtype}; expected torch.int64 or torch.int32. Convert them: ids.long().")
    return ids.detach().to("cpu", torch.int64).reshape(-1).numpy()


def _longer(array: np.ndarray, length: int) -> np.ndarray:
    longer = np.zeros(length, array.dtype)
    longer[: len(array)] = array
    return longer


def _power_of_two(least: int) -> int:
    return max(_SMALLEST, 1 << (least - 1).bit_length())
