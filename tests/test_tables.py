"""Tables of rows by id: exact numbers of SEMANTICS section 6, what is saved, and what does not depend on order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from syncwright.errors import TableError, TableFull
from syncwright.tables import (
    Always,
    Column,
    Constant,
    CountFilter,
    Forever,
    IdIndex,
    Normal,
    Probability,
    Saved,
    ScoreDecay,
    Settings,
    ShowClick,
    Table,
    TimeToLive,
    Uniform,
    shard_of,
)
from syncwright.tables.admission import score
from syncwright.tables.initial import rows
from syncwright.tables.settings import from_text
from syncwright.tables.store import Store
from syncwright.tables.table import row_columns

IDS = torch.tensor([7, -3, 2**63 - 1, -(2**63), 0, 12345678901234])
UNIFORM = Uniform(-0.5, 0.25)


def seen(table: Table, *ids: int) -> Tensor:
    """A step of training looks ids up."""
    table.advance()
    return table.pull(torch.tensor(ids, dtype=torch.int64), create=True)


def has(table: Table, *ids: int) -> list[bool]:
    return (table.slots(torch.tensor(ids), create=False) >= 0).tolist()


@pytest.mark.parametrize("initial", [UNIFORM, Normal(1, 3), Constant(0.5)], ids=lambda i: type(i).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_initial_rows_are_of_seed_id_and_column_alone(initial, dtype):
    every = rows(initial, 3, IDS, 33, dtype)
    assert every.dtype == dtype
    assert torch.equal(rows(initial, 3, IDS.flip(0), 33, dtype).flip(0), every)
    assert torch.equal(torch.cat([rows(initial, 3, i, 33, dtype) for i in IDS.split(1)]), every)
    assert torch.equal(rows(initial, 3, IDS, 5, dtype), every[:, :5])
    assert torch.equal(rows(initial, 3, IDS, 33, torch.float64).to(dtype), every)
    if not isinstance(initial, Constant):
        assert not torch.equal(rows(initial, 4, IDS, 33, dtype), every)
        assert len(every.double().unique()) > 33


def test_initial_rows_are_distributed_as_they_say():
    many = torch.arange(-20_000, 20_000)
    uniform, normal = (rows(kind, 0, many, 5, torch.float64) for kind in (UNIFORM, Normal(1, 3)))
    assert uniform.min() >= -0.5
    assert uniform.max() < 0.25
    assert abs(uniform.mean() + 0.125) < 0.002
    assert abs(uniform.std() - 0.75 / 12**0.5) < 0.002
    assert abs(normal.mean() - 1) < 0.03
    assert abs(normal.std() - 3) < 0.03
    assert abs(((normal - 1).abs() < 3).double().mean() - 0.6827) < 0.005
    columns = torch.corrcoef(torch.cat([uniform[1:], uniform[:-1]], 1).T)
    assert (columns - torch.eye(10)).abs().max() < 0.03


def test_a_uniform_number_uses_the_whole_mantissa():
    """Of 53 bits, the last is set in half of the numbers."""
    bits = (rows(Uniform(0, 1), 0, torch.arange(10_000), 4, torch.float64) * 2**53).long() & 1
    assert abs(bits.double().mean() - 0.5) < 0.02


def test_a_row_is_splitmix64_seeded_by_the_id():
    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gamma, found = 0x9E3779B97F4A7C15, rows(Uniform(0, 1), 9, IDS, 3, torch.float64)
    for row, i in zip(found.tolist(), IDS.tolist(), strict=True):
        start = mixed(i % 2**64 ^ mixed((9 + gamma) % 2**64))
        assert row == [(mixed((start + (c + 1) * gamma) % 2**64) >> 11) / 2**53 for c in range(3)]


def test_count_filter_of_three():
    """The first two pushes of an id are not trained and read zeros, the third admits."""
    table = Table(Settings(2, initial=Constant(1.0), admission=CountFilter(3)))
    for _ in range(2):
        assert seen(table, 8).tolist() == [[0, 0]]
        slots = table.slots(torch.tensor([8]), create=False)
        table.scatter("rows", slots, torch.full((1, 2), 5.0))
        assert len(table) == 0
    assert seen(table, 8, 9).tolist() == [[1, 1], [0, 0]]
    table.scatter("rows", table.slots(torch.tensor([8]), create=False), torch.full((1, 2), 5.0))
    assert table.pull(torch.tensor([8]), create=False).tolist() == [[5, 5]]


def test_a_step_sees_an_id_once():
    """However often, and for however many trainers, it looks it up."""
    table = Table(Settings(1, initial=Constant(1.0), admission=CountFilter(2)))
    table.advance()
    for _ in range(3):
        assert not table.pull(torch.tensor([4, 4]), create=True).any()
    table.advance()
    assert table.pull(torch.tensor([4, 4]), create=True).tolist() == [[1], [1]]


def test_evaluation_changes_nothing():
    table = Table(Settings(1, initial=Constant(1.0), admission=CountFilter(2), eviction=TimeToLive(1)))
    for _ in range(5):
        assert not table.pull(torch.tensor([4]), create=False).any()
    seen(table, 4)
    assert not table.pull(torch.tensor([4]), create=False).any()
    assert seen(table, 4).tolist() == [[1]]
    table.advance()
    table.advance()
    table.pull(torch.tensor([4]), create=False)
    assert table.shrink().ids.tolist() == [4]


def test_probability_depends_on_seed_id_and_how_often_it_was_seen():
    def admitted(seed: int, order: list[Tensor]) -> list[list[bool]]:
        table = Table(Settings(1, seed, admission=Probability(0.3)))
        found = []
        for ids in order:
            table.advance()
            table.pull(ids, create=True)
            found.append(has(table, *range(2_000)))
        return found

    every = torch.arange(2_000)
    first = admitted(1, [every, every])
    assert admitted(1, [every.flip(0), every[:7], every[7:]])[::2] == first
    assert admitted(1, [every[every % 2 == 0], every[every % 2 == 1]])[-1] == first[0]
    assert admitted(2, [every])[0] != first[0]
    assert [abs(sum(f) / 2_000 - share) < 0.04 for f, share in zip(first, (0.3, 0.51), strict=True)] == [True, True]


def test_the_score_of_ten_shows_and_two_clicks():
    """Decayed by 0.98: 9.8 and 1.96; (9.8 - 1.96) * 0.1 + 1.96 * 1 = 2.744."""
    for threshold, stays in ((2.7439, True), (2.7441, False)):
        table = Table(Settings(1, eviction=ScoreDecay(threshold, decay=0.98, show_weight=0.1, click_weight=1)))
        seen(table, 3)
        ones = torch.ones(10)
        table.observe(torch.full((10,), 3), ones, torch.arange(10) < 2)
        assert (table.shrink().ids.tolist() == []) is stays
    shows, clicks = torch.tensor([10.0, 2.0]).double() * 0.98
    assert score(shows, clicks, 0.1, 1).item() == pytest.approx(2.744, abs=1e-15)


def test_show_click_admits_by_score():
    """Shows and clicks of an id that waits are kept, and go with it into the table."""
    table = Table(Settings(1, initial=Constant(1.0), admission=ShowClick(1.0), eviction=ScoreDecay(0.5, decay=0.5)))
    ids = torch.tensor([3, 5])
    assert not seen(table, 3, 5).any()
    table.observe(ids, torch.tensor([4.0, 4.0]), torch.tensor([1.0, 0.0]))
    assert seen(table, 3, 5).tolist() == [[1], [0]]
    assert table.gather("clicks", table.slots(ids[:1], create=False)).tolist() == [1.0]
    assert table.shrink().ids.tolist() == []
    assert table.shrink().ids.tolist() == [3]
    with pytest.raises(TableError, match=r"which use no shows and clicks\. Expected ShowClick"):
        Table(Settings(1)).observe(ids, ids, ids)


def test_time_to_live():
    table = Table(Settings(1, eviction=TimeToLive(2)), {"sum": Column((1,), 0.5)})
    seen(table, 1, 2)
    table.scatter("sum", table.slots(torch.tensor([1]), create=False), torch.tensor([[9.0]]))
    for _ in range(2):
        seen(table, 2)
        assert table.shrink().ids.tolist() == []
    seen(table, 2)
    removed = table.shrink()
    assert removed.ids.tolist() == [1]
    slots = table.slots(torch.tensor([6]), create=True)
    assert slots.tolist() == removed.slots.tolist()
    assert table.gather("sum", slots).tolist() == [[0.5]]


def test_ids_that_wait_go_too():
    table = Table(Settings(1, initial=Constant(1.0), admission=CountFilter(2), eviction=TimeToLive(2)))
    seen(table, 1)
    for other in (2, 3, 4):
        seen(table, other)
    table.shrink()
    assert not seen(table, 1).any()
    assert seen(table, 1).all()


def test_columns_are_written_and_read_by_slot():
    table = Table(
        Settings(2, initial=Constant(0.0)), {"moment": Column((2,), 0.25), "count": Column((), 3, torch.int64)}
    )
    slots = table.slots(torch.tensor([[5, 6], [7, 5]]), create=True)
    assert table.gather("moment", slots).shape == (2, 2, 2)
    assert table.gather("count", torch.tensor([0, -1])).tolist() == [3, 0]
    table.scatter("count", torch.tensor([-1, 1]), torch.tensor([8, 9]))
    assert table.gather("count", torch.tensor([0, 1, 2])).tolist() == [3, 9, 3]
    with pytest.raises(
        TableError, match="found no column 'momentum'; expected one of rows, seen, changed, moment, count"
    ):
        table.gather("momentum", slots)
    with pytest.raises(TableError, match="column 'seen': found one of the table's own"):
        Table(Settings(2), {"seen": Column()})


def test_padding_has_no_row():
    table = Table(Settings(1, initial=Constant(1.0), padding_id=-1))
    assert seen(table, -1, 4, -1).tolist() == [[0], [1], [0]]
    assert len(table) == 1


ROUNDS = st.lists(
    st.tuples(
        st.lists(st.integers(-6, 6), max_size=8), st.booleans(), st.sampled_from(["", "shrink", "full", "delta"])
    ),
    max_size=14,
)
KINDS = [
    Settings(2, 1, UNIFORM, Always(), Forever()),
    Settings(2, 1, UNIFORM, CountFilter(2), TimeToLive(2)),
    Settings(2, 1, UNIFORM, ShowClick(0.2), ScoreDecay(0.3, decay=0.75)),
    Settings(2, 1, UNIFORM, Always(), ScoreDecay(0.3, decay=0.75)),
]
COLUMNS = {"sum": Column((1,), 0.5)}


def content(table: Table) -> dict[str, dict[int, list]]:
    """What a table holds for each id; not in which slots."""
    found = {}
    for name, store in (("rows", table.rows), ("waiting", table.candidates)):
        if store is not None:
            ids, slots = store.index.ids().tolist(), store.index.slots()
            held = [store.columns[n][slots].tolist() for n in store.kinds if n != "changed"]
            found[name] = dict(zip(ids, zip(*held, strict=True), strict=True))
    return {**found, "clock": {n: [int(v)] for n, v in enumerate(table.clock)}}


def trained(table: Table, ids: list[int], observe: bool) -> None:
    at = torch.tensor(ids, dtype=torch.int64)
    seen(table, *ids)
    slots = table.slots(at.unique(), create=False)
    for name in ("rows", "sum"):
        table.scatter(name, slots, table.gather(name, slots) * 1.5 + 0.125)
    if observe and "shows" in (table.candidates or table.rows).columns:
        table.observe(at, torch.ones(len(at)), at % 2 == 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{type(k.admission).__name__}-{type(k.eviction).__name__}")
@settings(deadline=None, max_examples=60)
@given(ROUNDS)
def test_what_was_exported_is_restored(kind, rounds):
    """A whole export and all later ones of what changed, one on top of the other, give the table; it goes on alike."""
    table, copy = Table(kind, COLUMNS), Table(kind, COLUMNS)
    copy.restore(last := table.export())
    for ids, observe, action in rounds:
        trained(table, ids, observe)
        if action == "shrink":
            table.shrink()
        elif action:
            last = table.export(last.mark if action == "delta" else None)
            copy.restore(Saved.from_dict(last.to_dict()))
            assert content(copy) == content(table)
    copy.restore(table.export(last.mark))
    for each in (table, copy):
        trained(each, [1, 2, 3], True)
        each.shrink()
    assert content(copy) == content(table)


def test_what_changed_is_only_that():
    table = Table(Settings(1, eviction=TimeToLive(1)))
    seen(table, *range(100))
    mark = table.export().mark
    seen(table, 5, 200)
    seen(table, 200)
    assert sorted(table.export(mark).rows.ids.tolist()) == [5, 200]
    removed = table.shrink().ids
    changed = table.export(mark)
    assert changed.rows.removed.tolist() == removed.tolist() == sorted({*range(100)} - {5})
    assert sorted(changed.rows.ids.tolist()) == [5, 200]


def test_exports_that_do_not_follow_on_one_another_are_refused():
    table, other = Table(Settings(1)), Table(Settings(1))
    seen(table, 1)
    with pytest.raises(TableError, match=r"^found since=0; expected the mark of the last whole export"):
        table.export(0)
    first = table.export()
    second, third = table.export(first.mark), table.export(first.mark + 1)
    with pytest.raises(TableError, match=r"^found what changed since mark 1, and a table at mark 0\."):
        other.restore(second)
    other.restore(first)
    with pytest.raises(TableError, match=r"^found what changed since mark 2, and a table at mark 1\."):
        other.restore(third)
    table.export()
    with pytest.raises(TableError, match=r"Take a whole export"):
        table.export(first.mark)
    with pytest.raises(TableError, match=r"^column 'rows': found \(1, 1\) in what was saved, expected \(1, 3\)"):
        Table(Settings(3)).restore(first)
    with pytest.raises(TableError, match=r"^column 'sum': found none in what was saved, expected \(1, 1\)"):
        Table(Settings(1), COLUMNS).restore(first)
    with pytest.raises(TableError, match=r"^found no ids that wait for admission in what was saved"):
        Table(Settings(1, admission=CountFilter(2))).restore(first)


def test_a_table_that_is_split_by_shards_is_the_table():
    """An export does not depend on how many servers there were."""
    whole = Table(KINDS[1], COLUMNS)
    for ids in ([1, 2, 3, 4, 5, 6, 7], [2, 4, 6, 7, 8], [9, 8]):
        trained(whole, ids, False)
    saved, parts = whole.export(), [Table(KINDS[1], COLUMNS) for _ in range(3)]
    for n, part in enumerate(parts):
        part.restore(saved.where(lambda ids, n=n: shard_of(ids, 16) % 3 == n))
    found = [content(part) for part in parts]
    assert [len(part) > 0 for part in parts] == [True] * 3
    for name in ("rows", "waiting"):
        joined = {i: row for each in found for i, row in each[name].items()}
        assert joined == content(whole)[name]
        assert sum(len(each[name]) for each in found) == len(joined)


def test_a_whole_export_that_does_not_fit_leaves_the_table_as_it_was():
    table = Table(Settings(1, initial=Constant(1.0)))
    seen(table, *range(9))
    kinds = row_columns(table.settings, torch.float32)
    held = {n: torch.zeros(4, *k.shape, dtype=k.dtype) for n, k in kinds.items()}
    small = Table.over(
        table.settings, Store(kinds, IdIndex(IdIndex.fixed(4)), held), None, torch.zeros(3, dtype=torch.int64)
    )
    seen(small, 1, 2)
    with pytest.raises(TableFull, match="capacity is 4"):
        small.restore(table.export())
    assert has(small, 1, 2, 3) == [True, True, False]


@pytest.mark.parametrize("settings", [*KINDS, Settings(4, -1, Normal(), Probability(0.5), padding_id=-(2**63))])
def test_settings_as_text(settings):
    assert from_text(settings.to_text()) == settings


def test_settings_that_mean_nothing_are_refused():
    for make, message in (
        (lambda: Uniform(1, 0), "found low=1 above high=0"),
        (lambda: CountFilter(0), r"CountFilter\.n: found 0, expected a whole number of at least 1"),
        (lambda: Probability(0), r"Probability\.p: found 0"),
        (lambda: Settings(2, admission=TimeToLive(3)), r"Settings\.admission: found TimeToLive"),
        (lambda: IdIndex.fixed(0), "found capacity=0; expected"),
    ):
        with pytest.raises(TableError, match=message):
            make()
