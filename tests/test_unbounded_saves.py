"""What is saved of tables of any ids does not depend on who kept them; shows, clicks and shrinking on servers."""

from __future__ import annotations

from copy import deepcopy
from itertools import product

import pytest
import torch

from syncwright.errors import TableError
from syncwright.nn import CountFilter, Saved, ScoreDecay, ShowClick
from syncwright.optim import RowWiseAdagrad
from syncwright.runtime.loopback import Loopback
from tests.test_unbounded import VOCABULARY, Items, batches, build, check_same, parts, started, state, step

SHOWS = torch.tensor([10.0] * 5 + [1.0] * 5)
CLICKS = torch.tensor([2.0] * 3 + [0.0] * 7)


def make(model: Items) -> torch.optim.Optimizer:
    return RowWiseAdagrad(model.parameters(), lr=0.1)


def job_of(servers: int, trainers: int = 2, **options) -> tuple[Items, torch.optim.Optimizer, Loopback]:
    model = build(**options)
    optimizer = make(model)
    return model, optimizer, started(model, optimizer, trainers, servers)


def train(job: Loopback, given: list[tuple]) -> None:
    for batch in given:
        job.step(parts(batch, job.trainers))


@pytest.mark.parametrize("admission", [{}, {"admission": CountFilter(2)}], ids=["always", "counted"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_a_state_dict_goes_on_with_any_number_of_servers(before: int, after: int, admission: dict) -> None:
    one = build(**admission)
    its = make(one)
    for batch in batches():
        step(one, its, *batch)
    _, _, first = job_of(before, **admission)
    train(first, batches()[:2])
    saved = first.state_dict()
    model, optimizer, second = job_of(after, trainers=3, **admission)
    train(second, batches(seed=9, count=1))  # forgotten
    second.load_state_dict(deepcopy(saved))
    train(second, batches()[2:])
    second.sync()
    check_same(model, optimizer, one, its)


@pytest.mark.parametrize(("before", "after"), list(product([1, 2], [2, 3])))
def test_full_and_changed_exports_restore_anywhere(before: int, after: int) -> None:
    """With other numbers of servers, and on one device: the same rows, state and counts."""
    model, _, job = job_of(before, admission=CountFilter(2))
    train(job, batches()[:2])
    whole = job.export(model.table)
    train(job, batches()[2:])
    changed = job.export(model.table, since=whole.mark)
    job.sync()

    other, its, second = job_of(after, trainers=1, admission=CountFilter(2))
    train(second, batches(seed=9, count=1))
    for saved in (whole, changed):
        second.restore(other.table, Saved.from_dict({name: t.clone() for name, t in saved.to_dict().items()}))
    second.sync()
    other.head.load_state_dict(model.head.state_dict())
    check_same(other, its, model, job.optimizer)

    alone = build(admission=CountFilter(2))
    theirs = make(alone)
    for saved in (whole, changed):
        alone.table.restore(saved, theirs)
    assert state(alone, theirs).keys() == state(model, job.optimizer).keys()
    alone.head.load_state_dict(model.head.state_dict())
    check_same(alone, theirs, model, job.optimizer)


def test_an_export_is_that_of_one_device() -> None:
    one = build()
    its = make(one)
    model, _, job = job_of(2)
    for batch in batches():
        step(one, its, *batch)
        train(job, [batch])
    mine, theirs = job.export(model.table), one.table.export(optimizer=its)
    assert (mine.since, mine.mark, mine.now) == (theirs.since, theirs.mark, theirs.now)
    places = [saved.rows.ids.argsort() for saved in (mine, theirs)]
    assert torch.equal(mine.rows.ids[places[0]], theirs.rows.ids[places[1]])
    assert mine.rows.columns.keys() == theirs.rows.columns.keys()
    for name, column in mine.rows.columns.items():
        assert torch.allclose(column[places[0]].double(), theirs.rows.columns[name][places[1]].double(), atol=1e-6), (
            name
        )
    assert mine.numbers.keys() == theirs.numbers.keys()


def test_numbers_of_the_optimizer_are_saved_too() -> None:
    """SparseAdam counts its steps, in a whole number."""

    def sparse(model: Items) -> tuple:
        head = torch.optim.SGD(model.head.parameters(), lr=0.1)
        return torch.optim.SparseAdam(model.table.parameters(), lr=0.1), head

    def both(model, optimizers, ids, y):
        return step(model, _Both(optimizers), ids, y)

    model = build()
    job = started(model, sparse(model), step=both)
    train(job, batches())
    saved = job.export(model.table)
    assert saved.numbers["step"].equal(torch.tensor(5))
    other = build()
    second = started(other, sparse(other), trainers=1, servers=1, step=both)
    train(second, batches(count=1))
    second.restore(other.table, saved)
    train(second, batches(seed=3, count=1))
    second.sync()
    assert second.optimizer[0].state[other.table.weight]["step"] == 6


class _Both:
    def __init__(self, optimizers: tuple) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for each in self.optimizers:
            each.zero_grad()

    def step(self) -> None:
        for each in self.optimizers:
            each.step()


def test_exports_that_do_not_follow_one_another_are_refused_by_all() -> None:
    model, _, job = job_of(2)
    train(job, batches()[:1])
    first = job.export(model.table)
    train(job, batches()[1:2])
    job.export(model.table, since=first.mark)
    train(job, batches()[2:3])
    third = job.export(model.table, since=first.mark + 1)
    other, _, second = job_of(3)
    train(second, batches()[:1])
    with pytest.raises(TableError, match="found what changed since mark 2, and a table at mark 0"):
        second.restore(other.table, third)
    with pytest.raises(TableError, match="found since=7; expected the mark of the last whole export"):
        job.export(model.table, since=7)
    train(second, batches()[1:2])


def test_of_tables_that_servers_do_not_keep_nothing_is_exported() -> None:
    model, _, job = job_of(1)
    with pytest.raises(TableError, match="found HashEmbedding, which servers do not keep; expected one of: none"):
        job.export(model.table)
    train(job, batches()[:1])
    with pytest.raises(TableError, match=r"which servers do not keep; expected one of: table.weight"):
        job.export(build().table)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"eviction": ScoreDecay(threshold=2.7)}, 5),
        ({"admission": ShowClick(threshold=0.05), "eviction": ScoreDecay(threshold=0.07, decay=0.9)}, 1),
    ],
    ids=["decay", "admission by score"],
)
def test_shows_clicks_and_shrinking_are_those_of_one_device(options: dict, times: int) -> None:
    """Ids with one show score 0.09, 0.081, 0.0729 and 0.0656: admitted in the second step, removed behind the fourth."""
    one, many = build(**options), build(**options)
    its, theirs = make(one), make(many)
    job = started(many, theirs, trainers=2, servers=2)
    gone = []
    for number, batch in enumerate(batches()):
        step(one, its, *batch)
        train(job, [batch])
        if number < times:
            told = (VOCABULARY, SHOWS, CLICKS)
            one.table.observe(*told)
            job.observe(many.table, [tuple(part[:4] for part in told), tuple(part[4:] for part in told)])
        gone.append(job.shrink(many.table))
        assert gone[-1].tolist() == sorted(one.table.shrink(its).tolist())
    assert sum(map(len, gone)) > 0
    job.sync()
    check_same(many, theirs, one, its)


def test_shows_of_a_table_that_counts_none_are_refused() -> None:
    model, _, job = job_of(2)
    train(job, batches()[:1])
    with pytest.raises(TableError, match="which use no shows and clicks"):
        job.observe(model.table, [(VOCABULARY, SHOWS, CLICKS)] * 2)


def test_trainers_that_ask_for_different_things_are_told() -> None:
    job = job_of(1)[2]
    train(job, batches()[:1])
    replicas = job.replicas
    runs = [replicas[0].order("table.weight", "shrink"), replicas[1].order("table.weight", "export")]
    with pytest.raises(
        TableError, match=r"trainers asked for different things between two steps: export \(-1\) and shrink"
    ):
        job.drive(runs)


def test_who_has_left_is_not_waited_for() -> None:
    """Trainer 1 leaves; trainer 0 shrinks alone."""
    job = job_of(2)[2]
    train(job, batches()[:1])
    job.replicas[1].client.leave(job.replicas[1].step_count)
    (found,) = job.drive([job.replicas[0].order("table.weight", "shrink")])
    assert [each["ids"].tolist() for each in found] == [[], []]
