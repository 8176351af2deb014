"""Tables on servers: rows travel, servers update the rows that are touched, and what is asked for ahead is exact."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import ParameterServer, Rules
from syncwright.capture import Captured
from syncwright.errors import PlanError
from syncwright.job import Channel
from syncwright.lower import communications
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.program import Role, Variable
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.replay import Replay
from syncwright.runtime.rows import RowGradient, bits, from_bits, merge_rows
from syncwright.untouched import leaves_rows_alone
from syncwright.update import find_updates

ROWS, WIDTH, STEPS = 40, 3, 5
MAKE: dict[str, Callable] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "decay": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "RowWiseAdagrad": lambda model: syncwright.optim.RowWiseAdagrad(model.parameters(), lr=0.1),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
}
STILL = {"SGD", "Adagrad", "RowWiseAdagrad"}


class Bags(nn.Module):
    def __init__(self, mode: str = "sum", padding: int | None = None, **options: bool) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, padding_idx=padding, **options)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def batches(seed: int = 0, count: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Six bags of three ids: some ids come again in a batch, in the other trainer's part, and in the next batch."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, ROWS, (6, 3), generator=generator), torch.randn(6, 1, generator=generator))
        for _ in range(count)
    ]


def parts(given: list[tuple], trainers: int) -> list[list[tuple]]:
    """By trainer, its parts of the batches."""
    cut = [list(zip(*(leaf.tensor_split(trainers) for leaf in batch), strict=True)) for batch in given]
    return [[batch[rank] for batch in cut] for rank in range(trainers)]


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = {
        f"{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }
    return {**dict(model.state_dict()), **state}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def on_one_device(model: nn.Module, make: Callable, given: list[tuple]) -> dict[str, torch.Tensor]:
    optimizer = make(model)
    for ids, y in given:
        step(model, optimizer, ids, y)
    return values(model, optimizer)


def started(model: nn.Module, make: Callable, sync: ParameterServer, trainers: int) -> Loopback:
    return syncwright.loopback(step, model, make(model), plan=Rules(sync), trainers=trainers, servers=2)


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> Captured:
    return syncwright.capture(step, model, optimizer, *batches(count=1)[0])


@pytest.mark.parametrize("optimizer", MAKE)
def test_which_updates_leave_rows_alone_is_proven(optimizer: str) -> None:
    model = Bags()
    program = capture(model, MAKE[optimizer](model))
    assert leaves_rows_alone(program, find_updates(program), "table.weight") == (optimizer in STILL)
    plan = make_plan(Rules(ParameterServer()), program, 2, 1)
    assert plan.sharing("table.weight").rows == ("touched" if optimizer in STILL else "all")
    assert bool(plan.notes) == (optimizer not in STILL)


@pytest.mark.parametrize("trainers", [1, 2, 3])
@pytest.mark.parametrize("partition", [1, 2, 7])
@pytest.mark.parametrize("optimizer", MAKE)
def test_equal_to_one_device(optimizer: str, partition: int, trainers: int) -> None:
    model = Bags(padding=3)
    expected = on_one_device(deepcopy(model), MAKE[optimizer], batches())
    job = started(model, MAKE[optimizer], ParameterServer(partition=Even(partition)), trainers)
    for each in zip(*parts(batches(), trainers), strict=True):
        job.step(list(each))
    job.sync()
    check_equal(values(model, job.optimizer), expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_every_mode(mode: str) -> None:
    model = Bags(mode)
    expected = on_one_device(deepcopy(model), MAKE["Adagrad"], batches())
    job = started(model, MAKE["Adagrad"], ParameterServer(), 2)
    for each in zip(*parts(batches(), 2), strict=True):
        job.step(list(each))
    job.sync()
    check_equal(values(model, job.optimizer), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_asked_for_ahead_are_exact_whatever_arrives_when(data: st.DataObject) -> None:
    """Also where the next batch turns out to be another, and where some trainers do not look ahead."""
    trainers = data.draw(st.integers(1, 3))
    optimizer, pieces = data.draw(st.sampled_from(["SGD", "Adagrad"])), data.draw(st.sampled_from([1, 3]))
    looks = data.draw(st.lists(st.sampled_from(["", "next", "other"]), min_size=trainers, max_size=trainers))
    order = random.Random(data.draw(st.integers(0, 1000)))
    torch.manual_seed(0)
    model = Bags(padding=3)
    expected = on_one_device(deepcopy(model), MAKE[optimizer], batches())
    mine, others = parts(batches(), trainers), parts(batches(seed=1), trainers)

    def following(rank: int, number: int) -> tuple | None:
        known = {"": None, "next": mine, "other": mine if number % 2 else others}[looks[rank]]
        return None if known is None or number + 1 == STEPS else known[rank][number + 1]

    job = started(model, MAKE[optimizer], ParameterServer(partition=Even(pieces)), trainers)
    replay = Replay(job, mine, following)
    while replay.next:
        replay.deliver(order.choice(replay.next)[1])
    assert [len(returned) for returned in replay.returned] == [STEPS] * trainers, replay.waits
    assert not any(server.refused for server in job.servers)
    job.sync()
    check_equal(values(model, job.optimizer), expected)


def test_rows_that_the_running_step_does_not_change_come_at_once() -> None:
    """Trainer 0 has the rows of its second step before trainer 1 has pushed the first, but for those that change."""
    model = nn.Module()
    model.table = nn.Embedding(ROWS, WIDTH)
    model.forward = lambda ids: model.table(ids).sum(1)

    def lookup(model, optimizer, ids):
        optimizer.zero_grad()
        loss = model.forward(ids).mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    job = syncwright.loopback(lookup, model, optimizer, plan="parameter_server", trainers=2, servers=1)
    mine = [[(torch.tensor([1, 2]),), (torch.tensor([2, 5]),)], [(torch.tensor([3, 4]),), (torch.tensor([5, 6]),)]]
    replay = Replay(job, mine, lambda rank, number: mine[rank][number + 1] if number == 0 else None)
    replay.play("0 pulls table.weight \n 1 pulls table.weight \n 0 pulls table.weight")
    (request,) = [r for r in job.replicas[0].client._rows._requests.values() if r.ids.tolist() == [2, 5]]
    assert request._whole.tolist() == [[0.0] * WIDTH, model.table.weight[5].tolist()], "2 changes in the step that runs"
    assert request.rows is None
    replay.drain()
    assert len(replay.returned[0]) == 2


def test_duplicates_are_summed_and_rows_are_merged_by_name() -> None:
    """A has rows [0,1] with [2,4], B rows [1,2] with [6,8]: sum [2,10,8,0], mean [1,5,4,0], mean_by_touch [2,5,8,0]."""
    a = RowGradient(torch.tensor([0, 1]), torch.tensor([[2.0], [4.0]]))
    b = RowGradient(torch.tensor([1, 2]), torch.tensor([[6.0], [8.0]]))
    grad = Variable("w.grad", Role.GRAD, (4, 1), torch.float32, of="w")
    merged = merge_rows(Channel(grad, 0, "sum", rows="touched"), [(1.0, a), (1.0, b)])
    assert merged.dense(4).view(-1).tolist() == [2, 10, 8, 0]
    by_touch = merge_rows(Channel(grad, 0, "mean_by_touch", rows="touched"), [(1.0, a), (1.0, b)])
    assert by_touch.dense(4).view(-1).tolist() == [2, 5, 8, 0]


@pytest.mark.parametrize(
    ("reduce", "expected"), [("sum", [2, 10, 8, 0]), ("mean", [1, 5, 4, 0]), ("mean_by_touch", [2, 5, 8, 0])]
)
def test_the_reductions_of_rows(reduce: str, expected: list[float]) -> None:
    """The same numbers through a whole job: the gradient of sum(w[ids] * x) is x in the rows that are looked up."""
    model = nn.Module()
    model.table = nn.Embedding(4, 1)
    nn.init.zeros_(model.table.weight)

    def lookup(model, optimizer, ids, x):
        optimizer.zero_grad()
        loss = (model.table(ids) * x).sum()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = Rules(ParameterServer(reduce=reduce))
    job = syncwright.loopback(lookup, model, optimizer, plan=rules, trainers=2, servers=1)
    given = [(torch.tensor([0, 1]), torch.tensor([[2.0], [4.0]])), (torch.tensor([1, 2]), torch.tensor([[6.0], [8.0]]))]
    job.step(given)
    job.sync()
    assert (-model.table.weight).view(-1).tolist() == expected


def test_lazy_leaves_rows_that_nobody_touches() -> None:
    model = Bags()
    before = model.table.weight.detach().clone()
    rules = Rules(ParameterServer(), (("table.*", ParameterServer(lazy=True)),))
    optimizer = MAKE["Adam"](model)
    job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=1)
    ids = torch.tensor([[1, 2, 1], [2, 2, 5]])
    for _ in range(3):
        job.step([(part, torch.ones(1, 1)) for part in ids.split(1)])
    job.sync()
    changed = (model.table.weight != before).any(1).nonzero().view(-1).tolist()
    assert changed == [1, 2, 5]
    state = optimizer.state[model.table.weight]
    assert (state["exp_avg"] != 0).any(1).nonzero().view(-1).tolist() == [1, 2, 5]


def test_asynchronous_rows_are_applied_on_arrival() -> None:
    model = Bags()
    job = started(model, MAKE["SGD"], ParameterServer(mode="async"), 2)
    given = batches(count=4)
    mine = parts(given, 2)
    Replay(job, mine, lambda rank, number: mine[rank][number + 1] if number < 3 else None).drain()
    assert sum(server.step for server in job.servers) > 0
    job.sync()
    assert torch.isfinite(model.table.weight).all()


def test_a_trainers_program_never_pulls_the_table() -> None:
    model = Bags()
    job = started(model, MAKE["Adagrad"], ParameterServer(), 2)
    job.step([part[0] for part in parts(batches(count=1), 2)])
    pulled = [node for node in communications(job.job.trainer["step"]) if "table" in str(node.args[1])]
    assert {str(node.target) for node in pulled} == {"syncwright.pull_rows.default", "syncwright.push_rows.default"}
    assert pulled[0].meta["val"].shape == (9, WIDTH), "as many rows as the batch has ids"


def test_evaluation_pulls_rows() -> None:
    model = Bags()
    job = started(model, MAKE["Adagrad"], ParameterServer(partition=Even(3)), 2)
    for each in zip(*parts(batches(), 2), strict=True):
        job.step(list(each))
    found = job.evaluate(lambda model, ids: model(ids), [(ids,) for ids, _ in batches(seed=5)])
    job.sync()
    expected = torch.cat([model(ids) for ids, _ in batches(seed=5)])
    assert torch.equal(found, expected)
    (evaluated,) = list(job.session._evaluations._kept)
    assert {str(n.target) for n in communications(evaluated._warming.program) if "table" in str(n.args[1])} == {
        "syncwright.pull_rows.default"
    }


def test_what_is_only_for_tables_is_refused_elsewhere() -> None:
    model = Bags()
    rules = Rules(ParameterServer(lazy=True), (("table.weight", ParameterServer()),))
    job = syncwright.loopback(step, model, MAKE["SGD"](model), plan=rules, trainers=1, servers=1)
    with pytest.raises(PlanError, match=r"'head.weight': found lazy: True, expected it for tables"):
        job.step([batches(count=1)[0]])


@pytest.mark.parametrize(
    "sync",
    [
        ParameterServer(staged=True),
        ParameterServer(mode="async", merge=2),
        ParameterServer(mode="async", compensate=0.1),
    ],
    ids=repr,
)
def test_what_tables_of_which_rows_travel_do_not_have_is_refused(sync: ParameterServer) -> None:
    model = Bags()
    job = syncwright.loopback(step, model, MAKE["SGD"](model), plan=Rules(sync), trainers=2, servers=1)
    with pytest.raises(PlanError, match=r"'table.weight': found \w+: .* for a table of which rows travel"):
        job.step([part[0] for part in parts(batches(count=1), 2)])


def test_rows_travel_in_the_dtype_that_the_plan_says() -> None:
    model = Bags()
    before = model.table.weight.detach().clone()
    job = started(model, MAKE["SGD"], ParameterServer(push="bfloat16", pull="float16"), 2)
    job.step([part[0] for part in parts(batches(count=1), 2)])
    pulled = [n for n in communications(job.job.trainer["step"]) if n.meta["val"].dtype is torch.float16]
    assert str(pulled[0].args[1]) == "table.weight as float16"
    job.sync()
    expected = on_one_device(deepcopy(Bags()), MAKE["SGD"], [])
    assert expected.keys() == values(model, job.optimizer).keys()
    assert 0 < (model.table.weight - before).abs().max() < 1


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_travel_as_bits(mask: list[bool]) -> None:
    assert from_bits(bits(torch.tensor(mask)), len(mask)).tolist() == mask
