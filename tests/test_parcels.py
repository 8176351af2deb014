"""Tensors in memory that roles share: nothing is overwritten that somebody reads, and nothing is read that was not offered."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest
import torch

from syncwright.runtime.messages import Address, Kind, Message, Offer, Place, Pull, Push, Rows, Value
from syncwright.runtime.parcels import MARKS_NBYTES, NAME, SPACE_NBYTES, Memory, Parcels, is_worth, opened
from syncwright.runtime.wire import WireError, decode, encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create")

S0, T0, T1 = Address(Kind.SERVER, 0), Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1)
COUNT = 20_000


def met(*trainers: Address) -> tuple[Parcels, dict[Address, Parcels]]:
    """A server and trainers that have accepted each other's memory."""
    server, others = Parcels(S0), {me: Parcels(me) for me in trainers}
    for me, trainer in others.items():
        (offer,) = trainer.offer(S0)
        waiting = [(server, me, offer.header)]
        while waiting:
            role, peer, header = waiting.pop()
            answers = role.take(peer, header)
            other, source = (trainer, S0) if role is server else (server, me)
            waiting += [(other, source, answer.header) for answer in answers]
    return server, others


def handed(sender: Parcels, to: Address, receiver: Parcels, tensor: torch.Tensor) -> torch.Tensor:
    message = Message(Value("w", 1), tensor)
    place = sender.place(to, message)
    assert place is not None
    frames = encode(message, place)
    assert len(frames) == 1
    found = decode(frames, find=lambda at, nbytes: receiver.find(sender.me, at, nbytes)).tensor
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_arrives(dtype: torch.dtype) -> None:
    server, trainers = met(T0)
    sent = torch.arange(COUNT).view(100, -1).to(dtype)
    assert torch.equal(handed(server, T0, trainers[T0], sent), sent)


def test_what_somebody_still_has_is_not_overwritten() -> None:
    server, trainers = met(T0, T1)
    first, second, third = (torch.full((COUNT,), float(number)) for number in range(3))
    zero, one = (handed(server, me, trainers[me], first) for me in (T0, T1))
    assert zero.data_ptr() != one.data_ptr(), "each maps the memory for itself"
    assert server._memory._blocks == 1, "one copy for both"
    del zero
    later = handed(server, T0, trainers[T0], second)
    assert server._memory._blocks == 2, "trainer 1 still reads the first"
    assert (one == 0).all()
    del one, first
    gc.collect()
    again = handed(server, T0, trainers[T0], third)
    assert server._memory._blocks == 2, "the first block is free"
    assert (later == 1).all()
    assert (again == 2).all()
    view = again.view(10, -1)[3]
    del again, third
    gc.collect()
    handed(server, T0, trainers[T0], torch.full((COUNT,), 9.0))
    handed(server, T0, trainers[T0], torch.full((COUNT,), 9.0))
    assert (view == 2).all(), "a view keeps it"


def test_who_has_a_tensor_twice_has_it_until_the_second_is_gone() -> None:
    """An asynchronous trainer pulls a value again that nothing has changed since."""
    server, trainers = met(T0)
    value = torch.zeros(COUNT)
    first, second = (handed(server, T0, trainers[T0], value) for _ in range(2))
    del first
    later = [handed(server, T0, trainers[T0], torch.ones(COUNT)) for _ in range(3)]
    assert (second == 0).all()
    assert all((each == 1).all() for each in later)


def test_a_tensor_that_has_changed_is_copied_anew() -> None:
    server, trainers = met(T0, T1)
    sent = torch.zeros(COUNT)
    before = handed(server, T0, trainers[T0], sent)
    sent.add_(1)
    assert (handed(server, T1, trainers[T1], sent) == 1).all()
    assert (before == 0).all()


def test_what_a_lost_trainer_had_is_free() -> None:
    server, trainers = met(T0, T1)
    lost = handed(server, T1, trainers[T1], torch.zeros(COUNT))
    server.forget([T1])
    handed(server, T0, trainers[T0], torch.ones(COUNT))
    assert server._memory._blocks == 1
    assert lost.numel()


def test_without_room_it_travels_in_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncwright.runtime.parcels.SPACE_NBYTES", MARKS_NBYTES + 2 * 81_920)
    server, trainers = met(T0)
    sent = [torch.full((COUNT,), float(number)) for number in range(3)]
    kept = [handed(server, T0, trainers[T0], each) for each in sent[:2]]
    assert server.place(T0, Message(Value("w", 1), sent[2])) is None
    kept.clear()
    assert server.place(T0, Message(Value("w", 1), sent[2])) is not None


def test_what_does_not_go_so() -> None:
    large = torch.zeros(COUNT)
    assert is_worth(Message(Push("w", 1, 1.0), large))
    assert is_worth(Message(Rows("w", 1), large))
    assert not is_worth(Message(Push("w", 1, 1.0), torch.zeros(8)))
    assert not is_worth(Message(Pull("w", 1)))
    server, trainers = met(T0)
    assert trainers[T0].place(S0, Message(Push("w", 1, 1.0), large)) is not None
    assert trainers[T0].place(S0, Message(Value("w", 0), large)) is None, "a server keeps what it starts with"
    assert server.place(T1, Message(Value("w", 1), large)) is None, "trainer 1 has said nothing"


@pytest.mark.parametrize(
    "place",
    [Place(0, 0), Place(MARKS_NBYTES, MARKS_NBYTES), Place(SPACE_NBYTES - 4, 0), Place(-8, 0), Place(MARKS_NBYTES, -1)],
)
def test_a_place_outside_of_the_memory(place: Place) -> None:
    server, _ = met(T0)
    with pytest.raises(WireError, match="a tensor at"):
        server.find(T0, place, 8)


def test_memory_that_nobody_offered() -> None:
    with pytest.raises(WireError, match="which has offered none"):
        Parcels(S0).find(T0, Place(MARKS_NBYTES, 0), 8)
    message = Message(Push("w", 1, 1.0), torch.zeros(8))
    with pytest.raises(WireError, match="in another place than its frames"):
        decode(encode(message, Place(MARKS_NBYTES, 0)))


def test_offers_of_what_is_no_memory_of_a_role(tmp_path) -> None:
    memory = Memory()
    opened(memory.offer)
    change = lambda **what: Offer(**{**offer_fields(memory.offer), **what})  # noqa: E731
    for wrong in (change(inode=1), change(nbytes=PAGES), change(descriptor=10_000), change(pid=2**22 + 1)):
        with pytest.raises(WireError):
            opened(wrong)
    with (tmp_path / "file").open("wb") as file:
        found = os.fstat(file.fileno())
        with pytest.raises(WireError, match="no memory of a role"):
            opened(Offer(os.getpid(), file.fileno(), found.st_ino, 0))
    unsealed = os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, PAGES)
    with pytest.raises(WireError, match="another than the one"):
        opened(Offer(os.getpid(), unsealed, os.fstat(unsealed).st_ino, PAGES))
    os.close(unsealed)


PAGES = MARKS_NBYTES + 4096


def offer_fields(offer: Offer) -> dict[str, int]:
    return {name: getattr(offer, name) for name in offer.__struct_fields__}


def test_sizes_that_vary_share_blocks() -> None:
    memory = Memory()
    source = np.random.default_rng(0)
    for _ in range(300):
        memory.write(torch.zeros(int(source.integers(20_000, 40_000))), 0)
        memory.release(0)
    assert memory._blocks <= 10


def test_a_forked_reader_frees_nothing() -> None:
    server, trainers = met(T0)
    held = [handed(server, T0, trainers[T0], torch.zeros(COUNT))]
    child = os.fork()
    if child == 0:
        held.clear()
        os._exit(0)
    os.waitpid(child, 0)
    assert server._memory._marks.any(), "the parent still reads it"
    held.clear()
    assert not server._memory._marks.any()
