"""Jobs whose tables are deferred: equal to those whose tables are not, and trainers never hold one."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.capture.private import FakeTensor
from syncwright.deferred.tensor import Deferred
from syncwright.errors import CaptureError, DeferredError, Disagreement, RequestError
from syncwright.plan import Even
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.messages import Start
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.runtime.server import Server

ROWS, WIDTH, STEPS, ABOVE = 5000, 3, 3, 1000
MAKE: dict[str, Callable] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5),
    "RowWiseAdagrad": lambda model: syncwright.optim.RowWiseAdagrad(model.parameters(), lr=0.1),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
}
PLANS = {
    "whole": Rules(ParameterServer()),
    "pieces": Rules(ParameterServer(partition=Even(3))),
    "lazy": Rules.of(AllReduce(), {"table.weight": ParameterServer(partition=Even(2), lazy=True)}),
    "all_reduce": Rules(AllReduce()),
}


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(ROWS, WIDTH, mode="sum", padding_idx=3)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def build(deferred: bool, seed: int = 3) -> Bags:
    torch.manual_seed(seed)
    if not deferred:
        return Bags()
    with syncwright.deferred(above=ABOVE):
        return Bags()


def started(model: nn.Module, optimizer: str, plan: str) -> Loopback:
    return syncwright.loopback(step, model, MAKE[optimizer](model), plan=PLANS[plan], trainers=2, servers=2)


def train(job: Loopback, steps: int = STEPS, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids, y = torch.randint(0, ROWS, (6, 4), generator=generator), torch.randn(6, 1, generator=generator)
        losses.append(job.step([(ids[:3], y[:3]), (ids[3:], y[3:])]))
    return losses  # type: ignore[return-value]


def named(state: dict) -> dict[str, object]:
    """Everything of a state, by name."""
    each = state["optimizer"]["state"].items()
    return {**state["model"], **{f"{index}.{key}": value for index, held in each for key, value in held.items()}}


def check_equal(found: dict[str, object], expected: dict[str, object]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("optimizer", MAKE)
def test_equal_to_a_job_that_is_not_deferred(optimizer: str, plan: str) -> None:
    plain, deferred = (started(build(each), optimizer, plan) for each in (False, True))
    assert isinstance(deferred.model.table.weight, Deferred)
    assert torch.equal(torch.stack(train(deferred)), torch.stack(train(plain)))
    check_equal(named(deferred.state_dict(deferred=True)), named(plain.state_dict()))
    assert type(deferred.model.table.weight) is nn.Parameter

    train(deferred, seed=2)  # what was asked for once is the user's: written at every sync
    train(plain, seed=2)
    check_equal(named(deferred.state_dict()), named(plain.state_dict()))


@pytest.mark.parametrize("plan", ["whole", "pieces"])
def test_rows_come_a_few_at_a_time(plan: str) -> None:
    job = started(build(True), "Adagrad", plan)
    train(job)
    found = {name: list(job.rows(name, 700)) for name in ("table.weight", "table.weight.sum")}
    client = job.session.replicas[0].client
    assert len(client._rows._by_turn) <= 1 + 2 * 3, "kept: the rows of the step, and of each piece those that came last"
    train(job, steps=1)
    again = torch.cat([rows for _, rows in job.rows("table.weight", 700)])
    job.sync()
    assert isinstance(job.model.table.weight, Deferred)
    state = job.state_dict(deferred=True)
    assert torch.equal(again, state["model"]["table.weight"])  # type: ignore[index]

    same = started(build(False), "Adagrad", plan)
    train(same)
    expected = named(same.state_dict())
    for name, key in (("table.weight", "table.weight"), ("table.weight.sum", "0.sum")):
        at = 0
        for first, rows in found[name]:
            assert first == at
            assert len(rows) <= 700
            at += len(rows)
        assert at == ROWS
        assert torch.equal(torch.cat([rows for _, rows in found[name]]), expected[key])  # type: ignore[arg-type]


def test_rows_of_what_is_no_table_come_whole() -> None:
    job = started(build(True), "SGD", "pieces")
    train(job)
    ((first, weight),) = job.rows("head.weight")
    assert first == 0
    assert weight.shape == (1, WIDTH)
    with pytest.raises(RequestError, match=r"keep no 'table\.wight'.*table\.weight"):
        list(job.rows("table.wight"))


def test_what_servers_keep_is_not_brought_unasked() -> None:
    job = started(build(True), "momentum", "whole")
    train(job)
    with pytest.raises(
        DeferredError, match=r"table\.weight, table\.weight\.momentum_buffer.*state_dict\(deferred=True\)"
    ):
        job.state_dict()
    job.sync()
    assert isinstance(job.model.table.weight, Deferred)
    with pytest.raises(DeferredError, match="servers keep its values"):
        job.model.table.weight.sum()
    with pytest.raises(DeferredError, match="servers keep its values"):
        syncwright.deferred.build(job.model)


def test_the_end_of_a_job_says_what_it_leaves(caplog) -> None:
    for asked in (False, True):
        model = build(True)
        with syncwright.distribute(step, model, MAKE["Adagrad"](model), plan=PLANS["whole"], compile=False) as trainer:
            trainer.step(torch.randint(0, ROWS, (4, 3)), torch.randn(4, 1))
            if asked:
                assert sum(len(rows) for _, rows in trainer.rows("table.weight")) == ROWS
            caplog.set_level(logging.WARNING, "syncwright")
        assert ("table.weight, table.weight.step, table.weight.sum (of deferred" in caplog.text) == (not asked)
        caplog.clear()
        with pytest.raises(DeferredError, match="servers kept its values, which have ended"):
            model.table.weight.mean()
        assert type(model.head.weight) is nn.Parameter


def test_values_that_are_loaded_go_to_servers() -> None:
    plain, deferred = (started(build(each), "Adagrad", "pieces") for each in (False, True))
    train(plain)
    train(deferred)
    other = started(build(False, seed=9), "Adagrad", "pieces")
    train(other, seed=5)
    for job in (plain, deferred):
        job.load_state_dict(other.state_dict())
        train(job, seed=6)
    assert isinstance(deferred.model.table.weight, Deferred)
    check_equal(named(deferred.state_dict(deferred=True)), named(plain.state_dict()))


def test_values_that_were_loaded_before_a_job_go_to_servers() -> None:
    values, models = build(False, seed=9).state_dict(), [build(False), build(True)]
    for model in models:
        model.load_state_dict(values)
    plain, deferred = (started(model, "SGD", "pieces") for model in models)
    train(plain)
    train(deferred)
    check_equal(named(deferred.state_dict(deferred=True)), named(plain.state_dict()))


def test_evaluation_pulls_rows() -> None:
    plain, deferred = (started(build(each), "Adagrad", "pieces") for each in (False, True))
    batches = [(torch.arange(24).view(6, 4),)]

    def score(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return model(ids)

    for job in (plain, deferred):
        train(job)
    assert torch.equal(deferred.evaluate(score, batches), plain.evaluate(score, batches))  # type: ignore[arg-type]
    assert isinstance(deferred.model.table.weight, Deferred)


class Largest(TorchDispatchMode):
    """The most bytes that a tensor took outside of servers. Changes with every operation."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.nbytes, self._serving = 0, False
        handle = Server.handle

        def handled(server, sender, message):
            self._serving = True
            try:
                return handle(server, sender, message)
            finally:
                self._serving = False

        patch.setattr(Server, "handle", handled)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Deferred | FakeTensor) and not self._serving:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes() if tensor.device.type == "cpu" else 0)
        return made


@pytest.mark.parametrize("plan", ["whole", "pieces"])
@pytest.mark.parametrize("optimizer", MAKE)
def test_trainers_never_hold_a_table(optimizer: str, plan: str, monkeypatch) -> None:
    with Largest(monkeypatch) as largest:
        job = started(build(True), optimizer, plan)
        train(job)
        for _ in job.rows("table.weight", 500):
            pass
        job.sync()
        job.leave()
    assert largest.nbytes == 500 * WIDTH * 4  # the rows that were asked for; of a table there are 10 times as many


def test_records_are_compared() -> None:
    job = started(build(True), "SGD", "whole")
    train(job)
    assert job.job is not None
    variable = job.job.held["table.weight"]
    other = build(True, seed=4)
    for records, found in ((NO_RECORDS, "nothing"), (Records({"table.weight": other.table.weight}), "recorded as")):
        with pytest.raises(Disagreement, match=rf"'table\.weight' is deferred.*{found}.*Seed"):
            records.start(variable, Start("table.weight", 0, "abc"))
    filled = NO_RECORDS.start(variable, Start("table.weight", 0, number=0.5))
    assert torch.equal(filled, torch.full((ROWS, WIDTH), 0.5))


def test_only_trainer_0_says_what_servers_begin_with() -> None:
    from syncwright.runtime.messages import Address, Kind, Message

    job = started(build(True), "SGD", "whole")
    train(job)
    server = next(s for s in job.servers if s.job.owners["table.weight"] == s.rank)
    for kind, rank in ((Kind.TRAINER, 1), (Kind.SERVER, 1)):
        assert server.handle(Address(kind, rank), Message(Start("table.weight", 0))) == []
    assert server.handle(Address(Kind.TRAINER, 0), Message(Start("x", 0))) == []
    assert sum(server.refused.values()) == 3


class Anchored(torch.optim.Optimizer):
    """Pulls a parameter back to where it was at its first update: state that is a copy of the parameter."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["anchor"] = parameter.clone()
                parameter.add_(parameter.grad + parameter - state["anchor"], alpha=-group["lr"])


def test_state_that_is_made_of_the_parameter_is_refused() -> None:
    model = build(True)
    with pytest.raises(CaptureError, match=r"parameter 'table\.weight'.*deferred.*deferred\.build"):
        syncwright.capture(
            step, model, Anchored(model.parameters()), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1)
        )
