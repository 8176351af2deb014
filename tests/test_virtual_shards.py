"""Where rows live: by mix64 of the id, whatever the number of servers; tables with a known vocabulary, too."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.capture import initial
from syncwright.errors import BatchError, PlanError, RequestError
from syncwright.nn import HashEmbedding
from syncwright.plan import Even, Hashed
from syncwright.runtime.messages import Address, Message, PullRows, Start, Value
from syncwright.runtime.replay import Replay
from syncwright.runtime.server import Outgoing, Server
from syncwright.selection import Selection
from syncwright.tables import mix64, shard_of
from syncwright.tables.mixing import count_in, ids_in
from tests.test_rows import MAKE, ROWS, STEPS, Bags, batches, check_equal, on_one_device, parts, step, values

MODULUS = 2**64


def unmixed(mixed: int) -> int:
    """The id whose mix64 is this: each of its three parts has an inverse."""
    z = mixed ^ (mixed >> 31) ^ (mixed >> 62)
    z = z * pow(0x94D049BB133111EB, -1, MODULUS) % MODULUS
    z = z ^ (z >> 27) ^ (z >> 54)
    z = z * pow(0xBF58476D1CE4E5B9, -1, MODULUS) % MODULUS
    z = z ^ (z >> 30) ^ (z >> 60)
    return z - MODULUS if z >= MODULUS // 2 else z


def test_each_row_is_pulled_once_from_its_shard_and_outputs_are_in_order() -> None:
    """Lookups of what mixes to [3,7,3] and [8,0,5], 3 shards: pulls [0,3], [7], [5,8] once each."""
    one, other = (torch.tensor([unmixed(n) for n in mixed]) for mixed in ([3, 7, 3], [8, 0, 5]))
    assert mix64(one).tolist() == [3, 7, 3]
    model = HashEmbedding(2, capacity=9)

    def lookup(model, optimizer, one, other):
        optimizer.zero_grad()
        first, second = model(one), model(other)
        loss = (first + second).sum()
        loss.backward()
        optimizer.step()
        return loss, first, second

    rules = Rules(ParameterServer(partition=Hashed(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    job = syncwright.loopback(lookup, model, optimizer, plan=rules, trainers=1, servers=3)
    replay = Replay(job, [[(one, other)]])
    asked = {to.rank: message.tensor for _, to, message in job.network.queue if isinstance(message.header, PullRows)}
    assert {rank: sorted(mix64(ids).tolist()) for rank, ids in asked.items()} == {0: [0, 3], 1: [7], 2: [5, 8]}
    replay.drain()
    _, first, second = replay.returned[0][0]
    job.sync()
    table = model.eval()
    assert torch.equal(first, F.embedding(table.slots(one), table.weight))
    assert torch.equal(second, F.embedding(table.slots(other), table.weight))


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam"])
def test_a_known_vocabulary_by_shards_trains_as_on_one_device(optimizer: str, servers: int) -> None:
    """Also where every row moves in each step (Adam)."""
    model = Bags(padding=3)
    expected = on_one_device(deepcopy(model), MAKE[optimizer], batches())
    rules = Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(16))),))
    job = syncwright.loopback(step, model, MAKE[optimizer](model), plan=rules, trainers=2, servers=servers)
    mine = parts(batches(), 2)
    Replay(job, mine, lambda rank, number: mine[rank][number + 1] if number + 1 < STEPS else None).drain()
    assert not any(server.refused for server in job.servers)
    job.sync()
    check_equal(values(model, job.optimizer), expected)


def test_servers_keep_the_rows_of_their_shards() -> None:
    model = Bags()
    before = model.table.weight.detach().clone()
    rules = Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(16))),))
    job = syncwright.loopback(step, model, MAKE["SGD"](model), plan=rules, trainers=1, servers=2)
    assert job.evaluate(lambda model, ids: model(ids), [(ids,) for ids, _ in batches(count=1)]).shape == (6, 1)
    job.step([batches(count=1)[0]])
    shard = shard_of(torch.arange(ROWS), 16)
    for rank, server in enumerate(job.servers):
        mine = (shard // 8) == rank
        kept = server.held(f"table.weight[{rank}]")
        untouched = ~torch.isin(torch.arange(ROWS)[mine], batches(count=1)[0][0])
        assert torch.equal(kept[untouched], before[mine][untouched])
    found = job.evaluate(lambda model, ids: model(ids), [(ids,) for ids, _ in batches(seed=5)])
    with pytest.raises(BatchError, match=r"reads all of 'table.weight', which servers keep by virtual shards"):
        job.evaluate(lambda model, ids: model(ids) * model.table.weight.norm(), [(batches()[0][0],)])
    job.sync()
    assert torch.allclose(found, torch.cat([model(ids) for ids, _ in batches(seed=5)]))


def test_a_job_by_shards_goes_on_by_rows() -> None:
    """What is saved of a table with a known vocabulary says nothing of where its rows were."""
    model, other = Bags(), Bags()
    expected = on_one_device(deepcopy(model), MAKE["Adagrad"], batches())
    first, second = (
        syncwright.loopback(step, each, MAKE["Adagrad"](each), plan=rules, trainers=2, servers=servers)
        for each, servers, rules in (
            (model, 2, Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(16))),))),
            (other, 3, Rules(ParameterServer(partition=Even(3)))),
        )
    )
    given = list(zip(*parts(batches(), 2), strict=True))
    for each in given[:2]:
        first.step(list(each))
    second.step(list(given[4]))
    second.load_state_dict(deepcopy(first.state_dict()))
    for each in given[2:]:
        second.step(list(each))
    second.sync()
    check_equal(values(other, second.optimizer), expected)


def test_variables_that_are_not_looked_up_have_no_shards() -> None:
    model = Bags()
    job = syncwright.loopback(
        step, model, MAKE["SGD"](model), plan=Rules(ParameterServer(partition=Hashed())), servers=2
    )
    with pytest.raises(
        PlanError, match=r"'head.weight': found virtual shards for a variable that lookups are not all that"
    ):
        job.step([batches(count=1)[0]])
    rules = Rules(ParameterServer(partition=Hashed()), uncuttable="keep_whole")
    job = syncwright.loopback(step, model, MAKE["SGD"](model), plan=rules, servers=2)
    job.step([batches(count=1)[0]])
    assert job.job.plan.sharing("head.weight").sizes == (1,)
    assert job.job.plan.sharing("table.weight").sizes == (512, 512)
    assert "head.weight is kept whole: rows of it do not travel" in job.job.plan.notes


SHARDS = Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(16))),))


def test_a_deferred_table_is_not_kept_by_shards() -> None:
    """Servers would make the first rows of the record, not those of their shards."""
    with syncwright.deferred(above=ROWS):
        model = Bags()
    optimizer = MAKE["Adagrad"](model)
    job = syncwright.loopback(step, model, optimizer, plan=SHARDS, trainers=1, servers=2)
    for _ in range(2):
        with pytest.raises(
            PlanError, match=r"'table.weight': found 'table.weight', 'table.weight.sum' deferred, .* shards"
        ):
            job.step([batches(count=1)[0]])
    syncwright.deferred.build(model, optimizer)
    expected = on_one_device(deepcopy(model), MAKE["Adagrad"], batches())
    for each in batches():
        job.step([each])
    job.sync()
    check_equal(values(model, optimizer), expected)


def test_deferred_state_is_not_kept_by_shards() -> None:
    model = Bags()
    optimizer = MAKE["RowWiseAdagrad"](model)
    with syncwright.deferred(above=1):
        optimizer.state[model.table.weight]["sum"] = torch.full((ROWS, 1), 0.5)
    job = syncwright.loopback(step, model, optimizer, plan=SHARDS, trainers=1, servers=2)
    with pytest.raises(
        PlanError, match=r"'table.weight': found 'table.weight.sum' deferred, but rows .* virtual shards"
    ):
        job.step([batches(count=1)[0]])


def test_state_that_is_one_number_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "LARGE", ROWS)
    model = Bags()
    expected = on_one_device(deepcopy(model), MAKE["Adam"], batches(count=1))
    taken: list[Message] = []
    take = Server.handle

    def noted(server: Server, sender: Address, message: Message) -> list[Outgoing]:
        taken.append(message)
        return take(server, sender, message)

    monkeypatch.setattr(Server, "handle", noted)
    job = syncwright.loopback(step, model, MAKE["Adam"](model), plan=SHARDS, trainers=1, servers=2)
    job.step([batches(count=1)[0]])
    begun = {m.header.channel for m in taken if isinstance(m.header, Start)}
    given = {m.header.channel for m in taken if isinstance(m.header, Value)}
    assert begun == {f"table.weight.{key}[{rank}]" for key in ("exp_avg", "exp_avg_sq") for rank in range(2)}
    assert {"table.weight[0]", "table.weight[1]"} <= given
    assert not begun & given
    assert not any(server.refused for server in job.servers)
    job.sync()
    check_equal(values(model, job.optimizer), expected)


def test_rows_by_shards_are_not_given_in_order() -> None:
    model = Bags()
    job = syncwright.loopback(step, model, MAKE["Adagrad"](model), plan=SHARDS, trainers=1, servers=2)
    job.step([batches(count=1)[0]])
    for name in ("table.weight", "table.weight.sum"):
        with pytest.raises(RequestError, match=rf"'{name}' by virtual shards, .* trainer.state_dict\(\)"):
            next(job.rows(name))
    assert sum(len(rows) for _, rows in job.rows("head.weight")) == 1


def test_ids_of_shards_are_all_ids_once() -> None:
    found = [ids_in(1000, 7, start, stop) for start, stop in ((0, 2), (2, 5), (5, 7))]
    assert torch.cat(found).sort().values.tolist() == list(range(1000))
    assert [count_in(1000, 7, *span) for span in ((0, 2), (2, 5), (5, 7))] == [len(ids) for ids in found]
    assert Selection("w", "shards", 0, 2, 0, 7).shape((1000, 3)) == (len(found[0]), 3)
    assert Selection("w", "ids", 0, 2, 0, 7).shape((1000, 3)) == (1000, 3)
