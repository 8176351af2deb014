"""From ids to bits that look random: which shard keeps an id, where a map looks for it, what its row begins with."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from syncwright.errors import TableError

GAMMA = 0x9E3779B97F4A7C15 - 2**64
"""2**64 over the golden ratio, as int64: what splitmix64 adds before each of its numbers."""

_BLOCK = 2**20
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def mix64(ids: Tensor) -> Tensor:
    """The last part of splitmix64 on the bits of int64 or int32 ids; the result's bits as int64, of the same shape.

        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z ^ (z >> 31)

    with unsigned arithmetic modulo 2**64; an int32 id is widened first, so it is mixed as the same int64 id. It maps the
    2**64 ids to the 2**64 numbers one to one. 0 becomes 0, 1 becomes 0x5692161D100B05E5, and 0x9E3779B97F4A7C15 becomes
    0xE220A8397B1DCDAF, which is splitmix64's first number from seed 0 (Steele, Lea and Flood, 2014; Vigna's constants).
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TableError(f"ids are {ids.dtype}; expected torch.int64 or torch.int32. Convert them: ids.long().")
    z = ids.to(torch.int64, copy=True)
    z.bitwise_xor_(_shifted(z, 30)).mul_(_FIRST)
    z.bitwise_xor_(_shifted(z, 27)).mul_(_SECOND)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left: int64's own shift repeats the sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def shard_of(ids: Tensor, shards: int) -> Tensor:
    """The virtual shard of each id, from 0 to shards - 1: mix64(id), read as an unsigned number, modulo `shards`."""
    if not 1 <= shards <= 2**31:
        raise TableError(f"found {shards} shards; expected a number from 1 to 2**31.")
    mixed = mix64(ids)
    half = _shifted(mixed, 1)
    return (half % shards * 2 + (mixed & 1)) % shards


def ids_in(count: int, shards: int, start: int, stop: int) -> Tensor:
    """Those of the ids 0 to count - 1 whose virtual shard is in [start, stop), ascending."""
    found = []
    for begin in range(0, count, _BLOCK):
        ids = torch.arange(begin, min(begin + _BLOCK, count))
        shard = shard_of(ids, shards)
        found.append(ids[(start <= shard) & (shard < stop)])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


@cache
def count_in(count: int, shards: int, start: int, stop: int) -> int:
    """How many those are."""
    return len(ids_in(count, shards, start, stop))


def fractions(bits: Tensor) -> Tensor:
    """Mixed bits as float64 numbers from 0 up to, without, 1: their upper 53 bits."""
    return _shifted(bits, 11).to(torch.float64).mul_(2.0**-53)
