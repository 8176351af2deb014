"""Parcels: tensors that roles of one host hand over in memory which they share, in place of frames.

The sender copies a tensor into a block of its own memory and says where it lies; the receiver reads it there, and says by
one byte in that memory that it is done with it. A value for several receivers is copied once. Through ZeroMQ the same bytes
are copied twice for each receiver, by the kernel (docs/design/0030).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from syncwright.runtime.bundles import SMALL_NBYTES
from syncwright.runtime.messages import Accepted, Address, Kind, Message, Offer, Place, Push, Rows, Value
from syncwright.runtime.wire import WireError

NAME = "syncwright-parcels"
LARGEST_NBYTES = 256 << 20
"""Of one parcel; what is larger, such as a table at the start, goes in frames and is kept by nobody."""
SPACE_NBYTES = 16 << 30
"""Of addresses: memory is taken as blocks are first written."""
MOST_BLOCKS, MOST_PEERS = 4096, 16
MARKS_NBYTES = MOST_BLOCKS * MOST_PEERS
PAGE = 4096


def is_available(url: str) -> bool:
    """Linux, at the other end of a Unix socket, and not switched off by SYNCWRIGHT_SHARED_MEMORY=0."""
    wanted = os.environ.get("SYNCWRIGHT_SHARED_MEMORY", "1") != "0"
    return wanted and sys.platform == "linux" and url.startswith("ipc://")


def is_worth(message: Message) -> bool:
    """Whether a message's tensor may go as a parcel: who takes it is done with it soon, and writes nothing into it.

    What trainer 0 gives a server to keep (a `Value` at the start) is not: see `Parcels.place`.
    """
    tensor = message.tensor
    fits = tensor is not None and SMALL_NBYTES < tensor.nbytes <= LARGEST_NBYTES
    return fits and isinstance(message.header, Push | Value | Rows) and tensor.device.type == "cpu"  # type: ignore[union-attr]


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a role's own memory. Changes with what is written there.

    source  the tensor that was written last, while it is there, and as often changed as then
    """

    number: int
    start: int
    nbytes: int
    source: weakref.ref[torch.Tensor] | None = None
    version: int = 0


@dataclass(slots=True)
class Parcels:
    """One role's memory, and that of others as it sees it. Changes with every parcel."""

    me: Address
    _memory: Memory | None = None
    _theirs: dict[Address, np.ndarray] = field(default_factory=dict)
    _columns: dict[Address, int] = field(default_factory=dict)
    _offered: set[Address] = field(default_factory=set)

    def offer(self, to: Address) -> list[Message]:
        """What to say to a peer of this host: where this role's memory is. Nothing where it has none, or has said so."""
        if to in self._offered or len(self._offered) == MOST_PEERS:
            return []
        if self._memory is None:
            try:
                self._memory = Memory()
            except OSError:  # no such memory here: frames do
                return []
        self._offered.add(to)
        return [Message(self._memory.offer)]

    def take(self, peer: Address, header: Offer | Accepted) -> list[Message]:
        """What to answer to a peer's offer, or to its word that it has ours. Raises `WireError` for what is no such memory."""
        if isinstance(header, Offer):
            self._theirs[peer] = opened(header)
            return [Message(Accepted()), *self.offer(peer)]
        if peer in self._offered and peer not in self._columns:
            self._columns[peer] = len(self._columns)
        return []

    def place(self, to: Address, message: Message) -> Place | None:
        """Writes a message's tensor where `to` can read it; None where it has to travel in frames."""
        column = self._columns.get(to)
        if column is None or self._memory is None or not is_worth(message):
            return None
        if isinstance(message.header, Value) and self.me.kind is Kind.TRAINER:
            return None
        assert message.tensor is not None, "looked at before"
        return self._memory.write(message.tensor, column)

    def find(self, peer: Address, place: Place, nbytes: int) -> np.ndarray:
        """The bytes at a place in a peer's memory. When nobody has them any more, the peer is told so."""
        memory = self._theirs.get(peer)
        if memory is None:
            raise WireError(f"a tensor in memory of {peer}, which has offered none")
        last = place.start + nbytes
        if not (MARKS_NBYTES <= place.start <= last <= len(memory) and 0 <= place.mark < MARKS_NBYTES):
            raise WireError(f"a tensor at {place.start} of {nbytes} bytes, in memory of {len(memory)} bytes")
        found = memory[place.start : last]
        weakref.finalize(found, _done_with, memory, place.mark, os.getpid()).atexit = False
        return found

    def forget(self, peers: Iterable[Address]) -> None:
        """Peers are lost: nothing is in their hands any more."""
        for peer in peers:
            column = self._columns.get(peer)
            if column is not None and self._memory is not None:
                self._memory.release(column)

    def close(self) -> None:
        """Offers no more. What others have stays there while they have it."""
        self._columns.clear()
        self._memory = None


class Memory:
    """A role's own memory: a mark for each block and receiver, then the blocks. Changes with what is written.

    Raises OSError where the system has no memory to share.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, SPACE_NBYTES)
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._bytes = np.frombuffer(mmap.mmap(self._file, SPACE_NBYTES), np.uint8)
        self._marks = self._bytes[:MARKS_NBYTES].reshape(MOST_BLOCKS, MOST_PEERS)
        self._sizes: dict[int, deque[Block]] = {}
        self._written: dict[int, Block] = {}
        self._blocks, self._end = 0, MARKS_NBYTES

    @property
    def offer(self) -> Offer:
        return Offer(os.getpid(), self._file, os.fstat(self._file).st_ino, SPACE_NBYTES)

    def write(self, tensor: torch.Tensor, column: int) -> Place | None:
        """Where the tensor lies now, for one more receiver; None where there is no room.

        Who still has it gets it in another block: a mark tells of one reader, and not of one that has it twice.
        """
        block = self._written.get(id(tensor))
        known = block is not None and block.source is not None and block.source() is tensor
        if block is None or not known or block.version != tensor._version or self._marks[block.number, column]:
            block = self._free(_rounded(tensor.nbytes))
            if block is None:
                return None
            self._fill(block, tensor)
        self._marks[block.number, column] = 1
        return Place(block.start, block.number * MOST_PEERS + column)

    def release(self, column: int) -> None:
        """A receiver is gone."""
        self._marks[:, column] = 0

    def _fill(self, block: Block, tensor: torch.Tensor) -> None:
        there = torch.from_numpy(self._bytes[block.start : block.start + tensor.nbytes])
        there.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        key, written = id(tensor), self._written
        block.source = weakref.ref(tensor, lambda _: written.pop(key, None))
        block.version = tensor._version
        written[key] = block

    def _free(self, nbytes: int) -> Block | None:
        """The block of this size that was written longest ago, if everybody is done with it; else a new one."""
        blocks = self._sizes.setdefault(nbytes, deque())
        if blocks and not self._marks[blocks[0].number].any():
            blocks.rotate(-1)
            block = blocks[-1]
            if block.source is not None and (source := block.source()) is not None:
                self._written.pop(id(source), None)
            return block
        if self._blocks == MOST_BLOCKS or self._end + nbytes > SPACE_NBYTES:
            return None
        blocks.append(Block(self._blocks, self._end, nbytes))
        self._blocks += 1
        self._end += nbytes
        return blocks[-1]


def opened(offer: Offer) -> np.ndarray:
    """A peer's memory. Raises `WireError` where it is none that it cannot take back while it is read."""
    path = f"/proc/{offer.pid}/fd/{offer.descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            raise WireError(f"{path} is no memory of a role")
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise WireError(f"memory at {path} cannot be opened: {error}") from error
    try:
        found = os.fstat(file)
        sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not sealed or (found.st_ino, found.st_size) != (offer.inode, offer.nbytes) or offer.nbytes < MARKS_NBYTES:
            raise WireError(f"memory at {path} is another than the one that is offered")
        return np.frombuffer(mmap.mmap(file, offer.nbytes), np.uint8)
    except OSError as error:
        raise WireError(f"memory at {path} cannot be mapped: {error}") from error
    finally:
        os.close(file)


def _done_with(memory: np.ndarray, mark: int, reader: int) -> None:
    """Says that a parcel is free, unless this is a process that its reader has forked, such as a loader of data."""
    if os.getpid() == reader:
        memory[mark] = 0


def _rounded(nbytes: int) -> int:
    """To whole pages, in steps of at most an eighth: sizes that vary from step to step share blocks."""
    step = max(PAGE, 1 << max(0, nbytes.bit_length() - 4))
    return -(-nbytes // step) * step
