"""Tables of any 64-bit ids on servers: the same training as on one device, rows made by who keeps them, and what is refused."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.checking import check_plan
from syncwright.deferred.tensor import Deferred
from syncwright.errors import CaptureError, LoweringError, PlanError, RequestError, TableFull
from syncwright.lower import communications, lower
from syncwright.nn import CountFilter, HashEmbedding, HashEmbeddingBag, Probability, TimeToLive
from syncwright.optim import RowWiseAdagrad
from syncwright.plan import Hashed
from syncwright.planning import make_plan
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.messages import Address, Message, Order, PullRows
from syncwright.runtime.replay import Replay
from syncwright.runtime.server import Outgoing, Server
from syncwright.text import parse, to_text
from syncwright.view.planned import plan_table
from syncwright.view.tables import plain

VOCABULARY = torch.tensor([-(2**63), -1, 0, 1, 17, 2**40, 2**63 - 1, 3, 99, -12345])
WIDTH, STEPS = 3, 5
MAKE: dict[str, Callable] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5),
    "RowWiseAdagrad": lambda model: RowWiseAdagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5),
}


class Items(nn.Module):
    """Bags of three ids, each the sum of its rows."""

    def __init__(self, mode: str | None = None, **options) -> None:
        super().__init__()
        options = {"capacity": 40, "seed": 1, **options}
        self.table = HashEmbedding(WIDTH, **options) if mode is None else HashEmbeddingBag(WIDTH, mode=mode, **options)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.table(ids)
        return self.head(rows.sum(1) if rows.dim() == 3 else rows)


def step(model: nn.Module, optimizer: object, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def clipped(model: nn.Module, optimizer: object, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    if model.table.weight.grad.is_sparse:  # as it is on one device, where a norm takes no such gradient
        model.table.weight.grad = model.table.weight.grad.to_dense()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def batches(seed: int = 0, count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six bags of three ids: some come again in a batch, in another trainer's part, and in the next batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            VOCABULARY[torch.randint(len(VOCABULARY), (6, 3), generator=generator)],
            torch.randn(6, 1, generator=generator),
        )
        for _ in range(count)
    ]


def parts(batch: tuple, trainers: int) -> list[tuple]:
    return list(zip(*(leaf.tensor_split(trainers) for leaf in batch), strict=True))


def build(*args, **options) -> Items:
    torch.manual_seed(0)
    return Items(*args, **options)


def started(model: Items, optimizer: object, trainers: int = 2, servers: int = 2, sync=None, step=step) -> Loopback:
    rules = Rules(sync or ParameterServer())
    return syncwright.loopback(step, model, optimizer, plan=rules, trainers=trainers, servers=servers)


def read(model: Items, ids: torch.Tensor = VOCABULARY) -> torch.Tensor:
    """As an evaluation reads."""
    table = model.table.eval()
    with torch.no_grad():
        found = table.weight[table.slots(ids)]
    model.table.train()
    return found


def state(model: Items, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimizer keeps for the rows of the vocabulary."""
    slots = model.table.eval().slots(VOCABULARY)
    model.table.train()
    held = optimizer.state.get(model.table.weight, {})
    return {
        name: value[slots] if value.dim() else value for name, value in held.items() if isinstance(value, torch.Tensor)
    }


def check_same(model: Items, optimizer, other: Items, other_optimizer) -> None:
    assert torch.allclose(read(model), read(other), rtol=1e-5, atol=1e-6)
    assert torch.allclose(model.head.weight, other.head.weight, rtol=1e-5, atol=1e-6)
    mine, theirs = state(model, optimizer), state(other, other_optimizer)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name].float(), theirs[name].float(), rtol=1e-5, atol=1e-6), name
    assert model.table.count() == other.table.count()
    assert model.table.clock.tolist()[0] == other.table.clock.tolist()[0]


def check_like_one_device(make: Callable, trainers: int, servers: int, step=step, model=build, **options) -> Items:
    one, many = model(**options), model(**options)
    its, theirs = make(one), make(many)
    for batch in batches():
        step(one, its, *batch)
    job = started(many, theirs, trainers, servers, step=step)
    for batch in batches():
        job.step(parts(batch, trainers))
    assert not any(server.refused for server in job.servers)
    job.sync()
    check_same(many, theirs, one, its)
    return many


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("trainers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", MAKE)
def test_equal_to_one_device(optimizer: str, trainers: int, servers: int) -> None:
    check_like_one_device(MAKE[optimizer], trainers, servers)


@pytest.mark.parametrize("trainers", [1, 2])
def test_sparse_adam_is_that_of_one_device(trainers: int) -> None:
    """Rows that nobody looks up, and their moments, stay as they are."""

    def make(model: Items) -> tuple:
        head = torch.optim.SGD(model.head.parameters(), lr=0.1)
        return torch.optim.SparseAdam(model.table.parameters(), lr=0.1), head

    def both(model, optimizers, ids, y):
        for each in optimizers:
            each.zero_grad()
        loss = ((model(ids) - y) ** 2).mean()
        loss.backward()
        for each in optimizers:
            each.step()
        return loss

    one, many = build(), build()
    its, theirs = make(one), make(many)
    for batch in batches():
        both(one, its, *batch)
    job = started(many, theirs, trainers, step=both)
    for batch in batches():
        job.step(parts(batch, trainers))
    job.sync()
    check_same(many, theirs[0], one, its[0])
    assert theirs[0].state[many.table.weight]["step"] == its[0].state[one.table.weight]["step"]


def test_lazy_adam_moves_the_rows_that_a_batch_touches() -> None:
    """As it moves those of a table whose rows are counted."""
    many, counted = build(), nn.Module()
    counted.table, counted.head = nn.Embedding(len(VOCABULARY), WIDTH), deepcopy(many.head)
    many.table(VOCABULARY)
    counted.table.weight = nn.Parameter(read(many))
    counted.forward = lambda ids: counted.head(counted.table(ids).sum(1))
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (many, counted)]
    rules = Rules(ParameterServer(), (("table.weight", ParameterServer(lazy=True)),))
    jobs = [
        syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=2)
        for model, optimizer in zip((many, counted), optimizers, strict=True)
    ]
    for ids, y in batches():
        places = (ids[..., None] == VOCABULARY).int().argmax(-1)
        for job, given in zip(jobs, (ids, places), strict=True):
            job.step(parts((given, y), 2))
    for job in jobs:
        job.sync()
    assert torch.allclose(read(many), counted.table.weight, rtol=1e-6)


@pytest.mark.parametrize("admission", [CountFilter(5), Probability(0.2)], ids=repr)
def test_ids_that_are_not_admitted_read_zeros_and_are_not_trained(admission) -> None:
    """Neither do their gradients count in a norm."""
    model = check_like_one_device(MAKE["Adagrad"], 2, 2, step=clipped, admission=admission)
    assert 0 < model.table.count() < len(VOCABULARY)


def test_the_third_step_admits() -> None:
    """CountFilter(3): the first two pushes of an id are not trained and read zeros, the third admits."""
    model = build(admission=CountFilter(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def rows(model, optimizer, ids):
        optimizer.zero_grad()
        found = model.table(ids)
        loss = found.sum() / 2
        loss.backward()
        optimizer.step()
        return loss, found

    job = started(model, optimizer, trainers=2, servers=1, step=rows)
    given, found = [(torch.tensor([5, 5]),), (torch.tensor([5, 8]),)], []
    for _ in range(3):
        found.append(job.step(given)[1])
        job.sync()
        found.append(read(model, torch.tensor([5])))
    assert not any(each.any() for each in found[:4]), "two trainers in one step see an id once"
    begun, trained = found[4][0], found[5][0]
    assert begun.any()
    assert torch.allclose(trained, begun - (2 + 1) / 2 / 2, atol=1e-6), (
        "the mean over two trainers of 2 and 1 times 1/2"
    )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, -1, 17], ids=repr)
def test_bags_with_padding(mode: str, padding: int | None) -> None:
    check_like_one_device(MAKE["Adagrad"], 2, 2, mode=mode, padding_id=padding)


def test_ids_of_32_bits_and_several_lookups_of_a_table() -> None:
    def twice(model, optimizer, ids, y):
        return step(lambda i: model(i) + model.head(model.table(i[:, 0])), optimizer, ids, y)

    small = [((ids % 1000).int(), y) for ids, y in batches()]
    one, many = build(), build()
    its, theirs = (MAKE["Adagrad"](model) for model in (one, many))
    job = started(many, theirs, step=twice)
    for batch in small:
        twice(one, its, *batch)
        job.step(parts(batch, 2))
    job.sync()
    known = torch.cat([ids.flatten() for ids, _ in small]).unique().long()
    assert torch.allclose(read(one, known), read(many, known), rtol=1e-5, atol=1e-6)


def test_a_table_without_a_batch_on_a_trainer() -> None:
    """Whose part is empty looks nothing up, and sends rows of nothing."""
    one, many = build(), build()
    its, theirs = (MAKE["Adagrad"](model) for model in (one, many))
    job = started(many, theirs)
    for ids, y in batches():
        step(one, its, ids, y)
        job.step([(ids, y), (ids[:0], y[:0])])
    job.sync()
    check_same(many, theirs, one, its)


def test_evaluation_makes_no_rows() -> None:
    model = build()
    job = started(model, MAKE["Adagrad"](model))
    for batch in batches():
        job.step(parts(batch, 2))
    unknown = torch.tensor([[1, 2, 12345678], [-5, 3, 99]])
    found = [job.evaluate(lambda model, ids: model(ids), [(unknown,)])]
    model.eval()
    found.append(job.evaluate(lambda model, ids: model(ids) + 0, [(unknown,)]))
    model.train()
    job.sync()
    assert model.table.count() == len(VOCABULARY)
    assert model.table.clock.tolist()[0] == STEPS
    model.eval()
    for each in found:
        assert torch.allclose(each, model(unknown), atol=1e-6)


def test_rows_travel_in_the_dtype_that_the_plan_says_and_are_evaluated_in_their_own() -> None:
    model = build()
    job = started(model, MAKE["SGD"](model), sync=ParameterServer(push="bfloat16", pull="float16"))
    job.step(parts(batches()[0], 2))
    dtypes = {
        node.meta["val"].dtype for node in communications(job.job.trainer["step"]) if "as float16" in str(node.args[1])
    }
    assert dtypes == {torch.float16}
    found = job.evaluate(lambda model, ids: model(ids), [(VOCABULARY[:, None],)])
    job.sync()
    assert torch.equal(found, model.eval()(VOCABULARY[:, None]))


def test_evaluation_before_the_first_step_makes_no_rows() -> None:
    model = build()
    job = started(model, MAKE["SGD"](model))
    found = job.evaluate(lambda model, ids: model.table(ids), [(torch.tensor([5, 6]),)])
    assert not found.any()
    assert model.table.count() == 0


def test_beside_a_table_whose_rows_are_asked_for_ahead() -> None:
    """Those of ids as they come are not: step by step, also where messages arrive in another order."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.known = HashEmbedding(WIDTH, capacity=40, seed=1), nn.Embedding(8, WIDTH)
            self.head = nn.Linear(WIDTH, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head((self.table(ids) + self.known(ids % 8)).sum(1))

    one, many = Both(), Both()
    its, theirs = (MAKE["SGD"](model) for model in (one, many))
    job = started(many, theirs)
    mine = [[parts(batch, 2)[rank] for batch in batches()] for rank in range(2)]
    replay = Replay(job, mine, lambda rank, number: mine[rank][number + 1] if number + 1 < STEPS else None)
    asked = [str(event) for event, _ in replay.next]
    queue = [m.header.channel for _, _, m in job.network.queue if isinstance(m.header, PullRows)]
    assert asked
    assert [queue.count(name) for name in ("known.weight", "table.weight[0]", "table.weight[1]")] == [4, 2, 2]
    order = random.Random(3)
    while replay.next:
        replay.deliver(order.choice(replay.next)[1])
    for batch in batches():
        step(one, its, *batch)
    job.sync()
    check_same(many, theirs, one, its)
    assert torch.allclose(many.known.weight, one.known.weight, atol=1e-6)


def test_trainers_hold_nothing_of_the_table() -> None:
    model = build(capacity=100_000)
    job = started(model, MAKE["Adagrad"](model))
    job.step(parts(batches()[0], 2))
    assert not any(name.startswith("table.") for name in job.replicas[0].values)
    rows = [node for node in communications(job.job.trainer["step"]) if "table" in str(node.args[1])]
    assert [tuple(node.meta["val"].shape) for node in rows if node.meta["val"].numel()] == [(9, WIDTH)]


def test_a_table_that_has_rows_goes_on_from_them() -> None:
    """Trained on one device, then by a job."""
    one = build()
    its = MAKE["Adagrad"](one)
    for batch in batches()[:2]:
        step(one, its, *batch)
    many = deepcopy(one)
    theirs = MAKE["Adagrad"](many)
    theirs.load_state_dict(deepcopy(its.state_dict()))
    job = started(many, theirs)
    for batch in batches()[2:]:
        step(one, its, *batch)
        job.step(parts(batch, 2))
    job.sync()
    check_same(many, theirs, one, its)


def test_the_text_of_a_program_says_what_the_table_does() -> None:
    model = build(admission=CountFilter(3), padding_id=-1)
    program = syncwright.capture(step, model, MAKE["SGD"](model), *batches()[0])
    text = to_text(program)
    assert to_text(parse(text)) == text
    assert parse(text).variables["table.weight"].unbounded == model.table.settings


def test_the_plan_keeps_a_table_by_virtual_shards_and_says_that_rows_are_not_asked_for_ahead() -> None:
    model = build()
    program = syncwright.capture(step, model, MAKE["SGD"](model), *batches()[0])
    sharing = make_plan(Rules(ParameterServer()), program, 2, 3).sharing("table.weight")
    assert (sharing.sizes, sharing.owners, sharing.rows) == ((342, 341, 341), (0, 1, 2), "touched")
    rules = Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(8))),))
    plan = make_plan(rules, program, 2, 3)
    assert plan.sharing("table.weight").sizes == (3, 3, 2)
    assert plan.notes == (
        "table.weight: rows are not asked for ahead, as which ids have one is known only behind the step before",
    )
    assert type(plan).from_yaml(plan.to_yaml()) == plan


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    model = build()

    def plan(rules: Rules | str, make: Callable = MAKE["SGD"], servers: int = 2, step=step, model=model) -> None:
        job = syncwright.loopback(step, model, make(model), plan=rules, trainers=2, servers=servers)
        job.step(parts(batches()[0], 2))

    with pytest.raises(PlanError, match=r"'table.weight': found AllReduce for a table that makes rows.*nn.Embedding"):
        plan("all_reduce")
    with pytest.raises(
        PlanError, match=r"'table.weight': found device: cuda for a table of any ids, expected host memory"
    ):
        plan(Rules(ParameterServer(), (("table.*", ParameterServer(device="cuda")),)))
    with pytest.raises(PlanError, match=r"'table.weight': found an update that moves rows that no lookup touches"):
        plan(Rules(ParameterServer()), lambda m: torch.optim.Adam(m.parameters()))
    with pytest.raises(
        PlanError, match=r"'table.weight': found 2 virtual shards for 3 servers, expected at least one for"
    ):
        plan(Rules(ParameterServer(), (("table.*", ParameterServer(partition=Hashed(2))),)), servers=3)
    with pytest.raises(
        PlanError, match=r"'table.weight': found a HashEmbedding that makes rows while nothing trains it"
    ):
        plan(Rules(ParameterServer()), lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1))

    def penalised(model, optimizer, ids, y):
        return step(lambda i: model(i) + model.table.weight.square().sum(), optimizer, ids, y)

    with pytest.raises(PlanError, match=r"'table.weight': found a table of ids .* which is also read whole"):
        plan(Rules(ParameterServer()), step=penalised)

    def by_weights(model, optimizer, ids, y):
        optimizer.zero_grad()
        loss = ((model(ids) - y) ** 2).mean()
        loss.backward()
        size = torch.stack([p.detach().norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.mul_(size)
        optimizer.step()
        return loss

    with pytest.raises(
        LoweringError, match=r"'table.weight.*' is kept by ids that nobody has counted, and .* all of it"
    ):
        plan(Rules(ParameterServer()), step=by_weights)


def test_what_is_shown_of_a_table_says_no_length() -> None:
    model = build()
    program = syncwright.capture(step, model, MAKE["SGD"](model), *batches()[0])
    plan = make_plan("parallax", program, 2, 2)
    shown = plain(plan_table(program, plan, lower(program, plan, without=["bucket"])))
    (line,) = [line for line in shown.splitlines() if line.startswith("table.weight")]
    assert line.split("  ")[0] == "table.weight"
    assert "f32[3] for each id" in line
    assert "parameter_server, shards 512+512" in line


def test_what_would_make_rows_in_a_graph_is_refused() -> None:
    model = build()

    def by_slots(model, optimizer, ids, y):
        return step(lambda i: model(i) + model.table.slots(i).float().mean(), optimizer, ids, y)

    with pytest.raises(CaptureError, match=r"slots\(\) of a HashEmbedding that trains; they are known only where"):
        syncwright.capture(by_slots, model, MAKE["SGD"](model), *batches()[0])
    assert model.table.count() == 0


def test_a_table_is_not_verified_place_by_place() -> None:
    model = build()
    optimizer = MAKE["SGD"](model)
    program = syncwright.capture(step, model, optimizer, *batches()[0])
    plan = make_plan("parallax", program, 2, 2)
    first = FirstStep(step, model, optimizer, {}, plan, None, batches()[0])
    with pytest.raises(
        PlanError, match=r"'table.weight': found a table of any ids, expected variables whose rows stand in"
    ):
        check_plan(first, program, plan, 2)


def test_parallax_keeps_the_table_on_servers() -> None:
    model = build()
    job = syncwright.loopback(step, model, MAKE["Adagrad"](model), plan="parallax", trainers=2, servers=2)
    job.step(parts(batches()[0], 2))
    assert isinstance(job.job.plan.sharing("head.weight").sync, AllReduce)
    assert job.job.plan.sharing("table.weight").shards == 1024


def test_a_module_that_is_too_small_for_what_servers_hold() -> None:
    model = build(capacity=3)
    job = started(model, MAKE["SGD"](model))
    for batch in batches():
        job.step(parts(batch, 2))
    with pytest.raises(TableFull, match=r"'table.weight' has 10 rows on servers, and its module has a capacity of 3"):
        job.sync()


def test_closing_a_job_whose_module_is_too_small_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build(capacity=3)
    job = started(model, MAKE["SGD"](model))
    before = model.head.weight.detach().clone()
    for batch in batches():
        job.step(parts(batch, 2))
    with caplog.at_level(logging.WARNING, "syncwright"):
        job.session.finish()
    assert "'table.weight' has 10 rows on servers" in caplog.text
    assert model.table.count() == 0
    assert not torch.equal(model.head.weight, before)


def test_time_to_live_counts_the_steps_of_the_job() -> None:
    one, many = (build(eviction=TimeToLive(1)) for _ in range(2))
    its, theirs = (MAKE["Adagrad"](model) for model in (one, many))
    job = started(many, theirs)
    for ids, y in batches():
        step(one, its, ids, y)
        job.step(parts((ids, y), 2))
        assert job.shrink(many.table).tolist() == sorted(one.table.shrink(its).tolist())
    job.sync()
    check_same(many, theirs, one, its)


class Both(nn.Module):
    """A table of any ids beside a larger one with a known vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = HashEmbedding(WIDTH, capacity=40, seed=1)
        self.known = nn.Embedding(500, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(ids) + self.known(ids % 500)).sum(1))


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_beside_a_deferred_table(make: str, mode: str) -> None:
    """The deferred one is made by its servers, and stays there; the table of any ids travels as it does without it."""
    models: list[Both] = []
    for above in (10**6, 100):
        torch.manual_seed(0)
        with syncwright.deferred(above=above):
            models.append(Both())
    one, other = models
    assert isinstance(other.known.weight, Deferred)
    assert not isinstance(other.table.weight, Deferred)
    its, theirs = (MAKE[make](model) for model in models)
    plain, deferred = (started(m, o, sync=ParameterServer(mode=mode)) for m, o in ((one, its), (other, theirs)))
    for batch in batches():
        assert torch.equal(
            torch.as_tensor(deferred.step(parts(batch, 2))), torch.as_tensor(plain.step(parts(batch, 2)))
        )
    plain.sync()
    deferred.sync()
    assert isinstance(other.known.weight, Deferred)
    assert torch.equal(read(other), read(one))
    assert torch.equal(torch.cat([rows for _, rows in deferred.rows("known.weight", 100)]), one.known.weight)
    found, expected = state(other, theirs), state(one, its)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    plain.session.finish()
    deferred.session.finish()
    assert isinstance(other.known.weight, Deferred)
    assert torch.equal(read(other), read(one))
    assert torch.equal(other.head.weight, one.head.weight)


def test_rows_of_any_ids_have_no_order() -> None:
    model = build()
    job = started(model, MAKE["Adagrad"](model))
    job.step(parts(batches()[0], 2))
    for name in ("table.weight", "table.weight.sum"):
        with pytest.raises(RequestError, match=rf"'{name}' has rows by 64-bit ids, .* by trainer.export\(table\)"):
            next(job.rows(name))


def test_a_table_is_not_read_for_the_rows_of_another_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    job = started(model, MAKE["Adagrad"](model))
    job.step(parts(batches()[0], 2))
    asked: list[object] = []
    take = Server.handle

    def noted(server: Server, sender: Address, message: Message) -> list[Outgoing]:
        asked.append(message.header)
        return take(server, sender, message)

    monkeypatch.setattr(Server, "handle", noted)
    assert sum(len(rows) for _, rows in job.rows("head.weight")) == 1
    assert not any(isinstance(header, Order) for header in asked)
    job.sync()
    assert any(isinstance(header, Order) for header in asked)


def test_deferred_state_of_a_table_of_any_ids_is_refused() -> None:
    model = build()
    optimizer = MAKE["RowWiseAdagrad"](model)
    with syncwright.deferred(above=1):
        optimizer.state[model.table.weight]["sum"] = torch.full((41, 1), 0.5)
    with pytest.raises(
        PlanError, match=r"'table.weight': found 'table.weight.sum' deferred, but rows .* virtual shards"
    ):
        started(model, optimizer).step(parts(batches()[0], 2))
