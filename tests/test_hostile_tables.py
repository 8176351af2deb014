"""What no trainer should send of tables of any ids: refused before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright.runtime.limits import MOST_ROWS, limits_of
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.messages import Address, Kind, Message, Order, Part, Pull, PullRows, Push, Start, Value
from syncwright.runtime.packed import chunks, pack, unpack
from syncwright.runtime.server import Server
from syncwright.runtime.wire import PACKED_NBYTES, WireError, decode, encode
from syncwright.tables import shard_of
from tests.test_unbounded import MAKE, VOCABULARY, WIDTH, batches, build, parts, started

T0, T1, S1 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1), Address(Kind.SERVER, 1)
TABLE = "table.weight[0]"
HERE = VOCABULARY[shard_of(VOCABULARY, 1024) < 512]
THERE = VOCABULARY[shard_of(VOCABULARY, 1024) >= 512]


@pytest.fixture(scope="module")
def job() -> Loopback:
    """After one step; nothing of what the tests send changes it."""
    model = build()
    job = started(model, MAKE["Adagrad"](model))
    job.step(parts(batches()[0], 2))
    return job


def order(act: str, given: dict[str, torch.Tensor] | torch.Tensor, channel: str = TABLE) -> Message:
    packed = given if isinstance(given, torch.Tensor) else pack(given)
    return Message(Order(channel, act, 1, "step", 1), packed)  # type: ignore[arg-type]


def told(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"ids": HERE, "shows": HERE.double(), "clicks": HERE.double(), **changes}


def an_export(job: Loopback, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What server 0 would be given to restore."""
    table = job.servers[0].there[0]._tables._parts[TABLE].table
    assert table is not None
    return {**table.table.snapshot().to_dict(), **changes}


ROWS = torch.ones(1, WIDTH)
CASES: dict[str, tuple[Address, Callable[[Loopback], Message], str]] = {
    "rows of others": (T1, lambda job: Message(PullRows(TABLE, 1, "step", 1, 1), THERE[:1]), "virtual shards [0, 512)"),
    "ids that are no list": (
        T1,
        lambda job: Message(PullRows(TABLE, 1, "step", 1, 1), HERE[None]),
        "no list of 64-bit",
    ),
    "ids of 32 bits": (T1, lambda job: Message(PullRows(TABLE, 1, "step", 1, 1), HERE.int()), "no list of 64-bit"),
    "another table": (T1, lambda job: Message(PullRows("head.weight", 1, "step", 1, 1), HERE), "keeps no table"),
    "rows that were not asked for": (
        T1,
        lambda job: Message(Push("table.weight.grad[0]", 1, 1.0), ROWS),
        "than were asked",
    ),
    "the whole table": (T1, lambda job: Message(Pull(TABLE, 1)), "rows travel, by their ids"),
    "the whole table, set": (
        T0,
        lambda job: Message(Value(TABLE, 1), torch.ones(41, WIDTH)),
        "rows travel, by their ids",
    ),
    "state, set": (T0, lambda job: Message(Value("table.weight.sum[0]", 1), torch.ones(41, WIDTH)), "rows travel"),
    "the whole table, begun": (T0, lambda job: Message(Start(TABLE, 1)), "rows travel, by their ids"),
    "state, begun": (T0, lambda job: Message(Start("table.weight.sum[0]", 1, number=0.5)), "rows travel, by their ids"),
    "the whole table, begun by another": (T1, lambda job: Message(Start(TABLE, 1)), "trainer 0 says what"),
    "an answer": (T1, lambda job: Message(Part(TABLE, 1), pack({})), "servers take none"),
    "an order of a server": (S1, lambda job: order("shrink", {}), "servers send none"),
    "an order for another's part": (T1, lambda job: order("shrink", {}, "table.weight[1]"), "no table of any ids"),
    "an order for another variable": (T1, lambda job: order("shrink", {}, "head.weight"), "no table of any ids"),
    "bytes that say nothing": (
        T1,
        lambda job: order("observe", torch.full((64,), 255, dtype=torch.uint8)),
        "cannot be read",
    ),
    "no bytes": (T1, lambda job: order("observe", torch.empty(0, dtype=torch.uint8)), "cannot be read"),
    "not even bytes": (T1, lambda job: order("observe", torch.zeros(8)), "no table of any ids"),
    "tensors with shrink": (T1, lambda job: order("shrink", told()), "takes none of"),
    "shows alone": (T1, lambda job: order("observe", {"shows": HERE.double()}), "other than ids, shows and clicks"),
    "fewer shows than ids": (T1, lambda job: order("observe", told(shows=HERE.double()[1:])), "other than ids"),
    "set by trainer 1": (T1, lambda job: order("set", an_export(job)), "trainer 0 sets values"),
    "restored by trainer 1": (T1, lambda job: order("restore", an_export(job)), "trainer 0 sets values"),
    "restored from nothing": (T0, lambda job: order("restore", {}), "brings nothing to restore"),
    "restored from no export": (
        T0,
        lambda job: order("restore", {"clock": torch.zeros(4, dtype=torch.int64)}),
        "no export",
    ),
    "restored with others' ids": (
        *(T0, lambda job: order("restore", an_export(job, **{"rows.removed": THERE}))),
        "its ids are not all of virtual shards [0, 512) of 1024",
    ),
    "restored with fewer rows than ids": (
        *(T0, lambda job: order("restore", an_export(job, **{"rows.columns.sum": ROWS}))),
        "another number of rows than of ids",
    ),
    "set without what rows begin with": (
        T0,
        lambda job: order("set", an_export(job)),
        "not say what 'sum' begins with",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_and_changes_nothing(job: Loopback, name: str) -> None:
    sender, make, why = CASES[name]
    server, message = job.servers[0], make(job)
    before, refused = an_export(job), dict(server.refused)
    assert server.handle(sender, message) == []
    (said,) = {text for text, count in server.refused.items() if count != refused.get(text, 0)}
    assert why in said
    after = an_export(job)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[each], before[each]) for each in before)
    part = server.there[0]._tables._parts[TABLE]
    assert not part.asked
    assert not part.ready
    assert not part.coming


def test_a_trainer_that_tells_without_end_is_stopped(job: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncwright.runtime.table_server.MOST_TOLD_NBYTES", 100)
    server, part = job.servers[0], job.servers[0].there[0]._tables._parts[TABLE]
    endless = Message(Order(TABLE, "observe", 1, "step", 1, last=False), torch.zeros(60, dtype=torch.uint8))
    server.handle(T1, endless)
    assert len(part.coming[T1]) == 1
    server.handle(T1, endless)
    assert not part.coming
    assert server.refused["it tells more than 100 bytes"] == 1


def test_the_wire_lets_in_what_a_role_may_be_sent(job: Loopback) -> None:
    assert job.job is not None
    server, trainer = (limits_of(job.job, each) for each in (Address(Kind.SERVER, 0), T1))
    server.check(T1, Order(TABLE, "observe", 1, "step", 1))
    trainer.check(Address(Kind.SERVER, 0), Part(TABLE, 1))
    for limits, sender, header in (
        (server, T1, Order(TABLE, "set", 1, "step", 1)),
        (server, T1, Order("table.weight[1]", "shrink", 1, "step", 1)),
        (server, T1, Order("head.weight", "shrink", 1, "step", 1)),
        (server, S1, Order(TABLE, "shrink", 1, "step", 1)),
        (trainer, T0, Order(TABLE, "shrink", 1, "step", 1)),
        (trainer, S1, Part(TABLE, 1)),
        (server, T1, Part(TABLE, 1)),
    ):
        with pytest.raises(WireError, match="does not send to this role"):
            limits.check(sender, header)
    assert server.forms[TABLE] == ((range(MOST_ROWS + 1), WIDTH), torch.float32)
    for tensor in (torch.zeros(4), torch.zeros(PACKED_NBYTES + 1, dtype=torch.uint8)):
        frames = [bytes(frame) for frame in encode(order("observe", tensor))]
        with pytest.raises(WireError, match=r"Order of 'table.weight\[0\]': a tensor"):
            decode(frames, server.forms)
    many = torch.arange(100)  # more than the module has room for
    frames = [bytes(frame) for frame in encode(Message(PullRows(TABLE, 1, "step", 1, 1), many))]
    assert decode(frames, server.forms).tensor is not None


NAMED = st.dictionaries(
    st.text(max_size=5),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype).random_(0, 100),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.int64, torch.float32, torch.bfloat16, torch.uint8, torch.float64]),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(NAMED, st.data())
def test_packed_tensors_come_back_and_what_is_changed_is_none_or_others(given_: dict, data: st.DataObject) -> None:
    packed = pack(given_)
    found = unpack(torch.cat([part for part, _ in chunks(packed)]))
    assert found.keys() == given_.keys()
    for name, tensor in given_.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype is tensor.dtype
    cut = packed[: data.draw(st.integers(0, len(packed) - 1))]
    with pytest.raises(WireError):
        unpack(cut)
    broken = packed.clone()
    broken[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):  # some changes leave tensors, of other values
        assert isinstance(unpack(broken), dict)


def test_large_exports_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("syncwright.runtime.packed.PACKED_NBYTES", 100)
    model = build()
    job = started(model, MAKE["Adagrad"](model))
    job.step(parts(batches()[0], 2))
    whole = job.export(model.table)
    job.restore(model.table, whole)
    job.sync()
    assert model.table.count() == len(whole.rows.ids) > 0


def test_an_order_before_the_start_values_waits_for_them(job: Loopback) -> None:
    """Trainer 1 may have captured its step, and ask, before trainer 0 says what the table begins with."""
    server = Server(job.job, 0)
    asked = Message(Order(TABLE, "export", 0, "step", 7), pack({}))
    assert server.handle(T1, asked) == []
    begun = {**an_export(job), "begin.sum": torch.tensor(0.0), "numbers.step": torch.tensor(1.0)}
    assert server.handle(T0, Message(Order(TABLE, "set", 0, "step", 1), pack(begun))) == []
    answers = server.handle(T0, asked)
    assert not server.refused
    assert {to for to, _ in answers} == {T0, T1}
    assert all(message.header.turn == 7 for _, message in answers)
