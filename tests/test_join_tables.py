"""Tables that become one on their server: to the bit what they are alone, and each its own for whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllGather, AllReduce, ParameterServer, Rules
from syncwright.deferred.tensor import Deferred
from syncwright.errors import SyncwrightError
from syncwright.passes.flat import flat_parts
from syncwright.program import Role
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.messages import Address, Kind, Message, PullRows

STEPS, WIDTH, ROWS = 4, 3, {"a": 40, "b": 7, "c": 25}
MAKE: dict[str, Callable] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
}
PLANS = {
    "sync": Rules(ParameterServer()),
    "touch": Rules.of(ParameterServer(), {"tables.*": ParameterServer(reduce="mean_by_touch", lazy=True)}),
    "async": Rules(ParameterServer(mode="async")),
    "gathered": Rules.of(AllReduce(), {"tables.*": AllGather()}),
    "half": Rules(ParameterServer(push="bfloat16", pull="bfloat16")),
}
JOINED = "tables.a.weight and 2 more"


class Tables(nn.Module):
    """Lookups of one id or two per example; bags of two."""

    def __init__(self, bags: str = "", rows: dict[str, int] = ROWS, ids: int = 2) -> None:
        super().__init__()
        make = (lambda n: nn.EmbeddingBag(n, WIDTH, mode=bags)) if bags else (lambda n: nn.Embedding(n, WIDTH))
        self.tables = nn.ModuleDict({name: make(count) for name, count in rows.items()})
        self.rows, self.ids = rows, ids
        self.head = nn.Linear(WIDTH * len(rows) * (1 if bags else ids), 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        columns = ids.split(self.ids, dim=1)
        found = [t(part % n) for t, part, n in zip(self.tables.values(), columns, self.rows.values(), strict=True)]
        return self.head(torch.cat([each.flatten(1) for each in found], dim=1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def started(
    model: nn.Module,
    optimizer: str = "Adagrad",
    plan: object = "sync",
    without: tuple[str, ...] = (),
    **options: object,
) -> Loopback:
    rules = PLANS[plan] if isinstance(plan, str) else plan
    return syncwright.loopback(
        step, model, MAKE[optimizer](model), plan=rules, trainers=2, servers=1, without=without, **options
    )


def build(bags: str = "", **options: object) -> Tables:
    torch.manual_seed(3)
    return Tables(bags, **options)


def train(job: Loopback, steps: int = STEPS, seed: int = 1, sizes: tuple[int, ...] = (6,)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for number in range(steps):
        size = sizes[number % len(sizes)]
        ids, y = torch.randint(0, 1000, (size, 6), generator=generator), torch.randn(size, 1, generator=generator)
        losses.append(job.step([(ids[: size // 2], y[: size // 2]), (ids[size // 2 :], y[size // 2 :])]))
    return torch.stack(losses)


def named(state: dict) -> dict[str, object]:
    each = state["optimizer"]["state"].items()
    return {**state["model"], **{f"{index}.{key}": value for index, held in each for key, value in held.items()}}


def check_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


def joined(job: Loopback) -> list[str]:
    """Tables of several tables' rows, on the server or on trainers."""
    kept = flat_parts(job.job.trainer["step"]) | job.job.joined
    return sorted(n for n, parts in kept.items() if parts[0].role is Role.PARAM and parts[0].selection.along == "rows")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("optimizer", MAKE)
@pytest.mark.parametrize("bags", ["", "mean"])
def test_what_is_joined_trains_as_it_does_alone(bags: str, optimizer: str, plan: str) -> None:
    one, alone = (started(build(bags), optimizer, plan, without) for without in ((), ("join_tables",)))
    assert torch.equal(train(one), train(alone))
    assert joined(one) == [JOINED]
    assert not joined(alone)
    check_equal(named(one.state_dict()), named(alone.state_dict()))


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_bags_of_every_mode(mode: str) -> None:
    one, alone = (started(build(mode), without=without) for without in ((), ("join_tables",)))
    assert torch.equal(train(one), train(alone))
    assert joined(one)


def test_one_message_for_all_tables() -> None:
    """What is joined costs a trainer a request and a push, however many tables there are."""
    one, alone = (started(build(), without=without) for without in ((), ("join_tables",)))
    for job, tables in ((one, 1), (alone, 3)):
        train(job, 1)
        pushed = [name for name, channel in job.job.channels.items() if channel.rows]
        assert len(pushed) == tables


@pytest.mark.parametrize("bags", ["", "mean"])
def test_batches_of_any_size(bags: str) -> None:
    jobs = [
        started(build(bags), dynamic_shapes=({0: "n"}, {0: "n"}), without=without) for without in ((), ("join_tables",))
    ]
    one, alone = (train(job, 6, sizes=(6, 10, 4)) for job in jobs)
    assert joined(jobs[0])
    assert torch.equal(one, alone)


@pytest.mark.parametrize("plan", ["sync", "gathered"])
def test_each_is_loaded_and_saved_by_its_own_name(plan: str) -> None:
    one, fresh = started(build(), plan=plan), started(build(), plan=plan)
    train(one)
    saved = one.state_dict()
    fresh.load_state_dict(saved)
    check_equal(named(fresh.state_dict()), named(saved))
    assert torch.equal(train(fresh, seed=2), train(one, seed=2))


def test_rows_of_one_of_them() -> None:
    job = started(build())
    train(job)
    state = job.state_dict()["model"]
    for name, rows in ROWS.items():
        found = list(job.rows(f"tables.{name}.weight", 10))
        assert [first for first, _ in found] == list(range(0, rows, 10))
        assert torch.equal(torch.cat([each for _, each in found]), state[f"tables.{name}.weight"])
    assert torch.cat([each for _, each in job.rows("tables.b.weight.sum", 10)]).shape == (7, WIDTH)


@pytest.mark.parametrize("plan", ["sync", "gathered"])
def test_evaluation_reads_rows_or_the_whole_of_one_of_them(plan: str) -> None:
    def score(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(ids) + model.tables["b"].weight.sum()

    one, alone = (started(build(), plan=plan, without=without) for without in ((), ("join_tables",)))
    batches = [(torch.arange(36).view(6, 6),)]
    for job in (one, alone):
        train(job)
    assert torch.equal(one.evaluate(score, batches), alone.evaluate(score, batches))  # type: ignore[arg-type]


@pytest.mark.parametrize("above", [1, 60])
def test_deferred_tables_are_begun_by_the_server_one_by_one(above: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside tables that are not deferred."""
    plain = started(build())
    torch.manual_seed(3)
    with syncwright.deferred(above=above):
        model = Tables()
    kinds = {name: isinstance(table.weight, Deferred) for name, table in model.tables.items()}
    assert kinds == {name: rows * WIDTH > above for name, rows in ROWS.items()}
    job = started(model)
    assert torch.equal(train(job), train(plain))
    assert joined(job)
    found = job.state_dict(deferred=True)
    check_equal(named(found), named(plain.state_dict()))


@pytest.mark.parametrize("id", [-1, 7])
def test_an_id_that_its_table_does_not_have_is_no_other_tables(id: int) -> None:
    model = build(rows={"a": 40, "b": 1000}, ids=1)
    model.rows = {"a": 1000, "b": 1000}  # ids go in as they are
    job = started(model)
    ids = torch.zeros(6, 2, dtype=torch.int64)
    ids[4, 0] = 40 if id == 7 else id
    batch = [(ids[:3], torch.zeros(3, 1)), (ids[3:], torch.zeros(3, 1))]
    if id == -1:
        model.rows["a"] = 10**9
        ids[4, 0] = -1
    with pytest.raises(
        (IndexError, SyncwrightError), match=r"'tables.a.weight' is looked up by id .*expected ids from 0 to 39"
    ):
        job.step(batch)


def test_what_is_not_alike_stays_alone() -> None:
    """A width, a kind of lookup, padding, another optimizer's group, a rule: each table that differs is kept alone."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.ModuleList([nn.Embedding(9, 3), nn.Embedding(8, 3)])
            self.wide, self.bag = nn.Embedding(9, 5), nn.EmbeddingBag(9, 3)
            self.padded, self.slow, self.ruled = (
                nn.Embedding(9, 3, padding_idx=0),
                nn.Embedding(9, 3),
                nn.Embedding(9, 3),
            )
            self.twice = nn.Embedding(9, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            each = [*self.same, self.wide, self.padded, self.slow, self.ruled, self.twice, self.twice]
            return torch.cat([*(t(ids[:, 0]) for t in each), self.bag(ids)], 1).sum(1, keepdim=True)

    torch.manual_seed(0)
    model = Mixed()
    slow = [model.slow.weight]
    others = [p for n, p in model.named_parameters() if n != "slow.weight"]
    optimizer = torch.optim.SGD([{"params": others}, {"params": slow, "lr": 0.01}], lr=0.1)
    rules = Rules.of(ParameterServer(), {"ruled.weight": ParameterServer(reduce="sum")})
    job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=1)
    ids, y = torch.randint(0, 8, (6, 2)), torch.randn(6, 1)
    job.step([(ids[:3], y[:3]), (ids[3:], y[3:])])
    assert joined(job) == ["same.0.weight and 1 more"]


def test_a_global_norm_leaves_tables_alone() -> None:
    def clipped(model, optimizer, ids, y):
        optimizer.zero_grad()
        loss = ((model(ids) - y) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    model = build()
    job = syncwright.loopback(clipped, model, MAKE["SGD"](model), plan="parameter_server", trainers=2, servers=1)
    train(job, 1)
    assert not joined(job)


def test_rows_of_a_step_are_asked_for_by_the_name_of_all() -> None:
    """A request of a step by a part's name is counted and changes nothing: what it names is pushed as a whole."""
    job = started(build())
    train(job, 1)
    (server,) = job.servers
    message = Message(PullRows("tables.b.weight", 0, "step", 99, 1), torch.tensor([0]))
    assert server.handle(Address(Kind.TRAINER, 0), message) == []
    (why,) = server.refused
    assert JOINED in why
    train(job, 1)
