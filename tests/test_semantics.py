"""The numbers of SEMANTICS, exactly, in loopback."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import StepLR

import syncwright
from syncwright.errors import BatchError, CaptureError, LoweringError
from syncwright.job import Channel, Job
from syncwright.plan import AllReduce, ParameterServer, Rules
from syncwright.program import Role, Variable
from syncwright.runtime.client import Client
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.merging import merge
from syncwright.runtime.messages import Address, Hello, Kind, Leave, Message, Pull, Push, Value
from syncwright.runtime.replica import Part
from syncwright.runtime.server import Server
from tests.buckets import buckets_of

PLANS = {"all_reduce": 0, "parameter_server": 1, "parameter_server_partitioned": 2}
every_plan = pytest.mark.parametrize(("plan", "servers"), PLANS.items())


class Scalar(nn.Module):
    """One weight, w."""

    def __init__(self, w: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


def mean_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


def start(step: Callable, model: nn.Module, plan: object, trainers: int, servers: int, **settings: float) -> Loopback:
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 1.0, **settings})
    return syncwright.loopback(step, model, optimizer, plan=plan, trainers=trainers, servers=servers)


# Section 1: reduction


@every_plan
def test_mean_is_weighted_by_examples(plan: str, servers: int) -> None:
    """x=[1,2,3,4,10] split 3+2: the gradient is 4.0, not 4.5."""
    model = Scalar()
    job = start(mean_step, model, plan, 2, servers)
    x = torch.tensor([1.0, 2, 3, 4, 10])
    job.step([(x[:3],), (x[3:],)])
    job.sync()
    assert model.w.item() == -4.0


@every_plan
def test_mean_of_halves_does_not_overflow(plan: str, servers: int) -> None:
    """The mean of 40000 and 40000 in float16 is 40000, not inf."""
    model = Scalar(dtype=torch.float16)
    job = start(mean_step, model, plan, 2, servers)
    x = torch.tensor([40000.0], dtype=torch.float16)
    job.step([(x,), (x,)])
    job.sync()
    assert model.w.item() == -40000.0


@pytest.mark.parametrize(("sync", "servers"), [(AllReduce(reduce="sum"), 0), (ParameterServer(reduce="sum"), 1)])
def test_sum_is_of_local_gradients(sync: object, servers: int) -> None:
    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    model = Scalar()
    job = start(step, model, Rules(sync), 2, servers)
    x = torch.tensor([1.0, 2, 3, 4, 10])
    job.step([(x[:3],), (x[3:],)])
    job.sync()
    assert model.w.item() == -20.0


@every_plan
def test_what_a_step_returns(plan: str, servers: int) -> None:
    """Float scalars: weighted mean; integer scalars: sum; along the batch axis: local."""

    def step(model, optimizer, x):
        loss = mean_step(model, optimizer, x)
        return loss, {"large": (x > 2.5).sum(), "double": 2 * x}

    job = start(step, Scalar(1.0), plan, 2, servers)
    x = torch.tensor([1.0, 2, 3, 4, 10])
    loss, metrics = job.step([(x[:3],), (x[3:],)])
    assert loss.item() == 4.0
    assert metrics["large"].item() == 3
    assert metrics["double"].tolist() == [2.0, 4.0, 6.0]
    assert job.job.local == ("metrics.double",)


@every_plan
def test_other_results_are_refused_by_name(plan: str, servers: int) -> None:
    def step(model, optimizer, x):
        return mean_step(model, optimizer, x), {"pair": torch.stack([x.mean(), x.sum()])}

    job = start(step, Scalar(), plan, 2, servers)
    x = torch.ones(3)
    with pytest.raises(LoweringError, match=r"metrics\.pair"):
        job.step([(x,), (x,)])


@every_plan
@pytest.mark.parametrize("trainers", [1, 2, 3])
def test_one_optimizer_call_per_step(plan: str, servers: int, trainers: int) -> None:
    """Momentum and step counts advance once per global step, whatever the number of trainers."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    job = syncwright.loopback(mean_step, model, optimizer, plan=plan, trainers=trainers, servers=servers)
    for _ in range(3):
        job.step([(torch.ones(2, 2),)] * trainers)
    job.sync()
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


@every_plan
def test_empty_parts_contribute_nothing(plan: str, servers: int) -> None:
    model = Scalar()
    job = start(mean_step, model, plan, 3, servers)
    x = torch.tensor([2.0, 4.0])
    loss = job.step([(x[:1],), (x[1:],), (x[:0],)])
    job.sync()
    assert loss.item() == 0.0
    assert model.w.item() == -3.0


@every_plan
def test_a_step_without_any_examples_is_refused(plan: str, servers: int) -> None:
    """On trainers and on servers alike, who do not see each other's parts; nothing was updated."""
    model = Scalar(1.0)
    job = start(mean_step, model, plan, 2, servers, momentum=0.9)
    x = torch.tensor([2.0, 4.0])
    job.step([(x[:1],), (x[1:],)])
    prepared, empty = job.session.programs().for_batch((x[:1],)), Part((x[:0],), 0.0)
    with pytest.raises(BatchError, match="step 1: no trainer has examples"):
        job.drive([replica.step(prepared, empty) for replica in job.replicas])
    if not servers:
        job.sync()
        assert model.w.item() == -2.0


# Section 2: buckets


def test_bucket_sizes() -> None:
    """Sizes [20,10,5,40,1] with cap 32 give [20,10],[5],[40],[1]."""
    assert buckets_of([20, 10, 5, 40, 1], cap=32) == [[20, 10], [5], [40], [1]]


def test_bucket_of_zero_is_one_collective_per_variable() -> None:
    assert buckets_of([20, 10, 5], cap=0) == [[20], [10], [5]]


# Section 4: parameter servers, sync


def test_merge_is_over_those_that_are_there() -> None:
    """Remaining gradients all 1 give 1.0, not 0.75 of 4."""
    channel = Channel(Variable("w.grad", Role.GRAD, (1,), torch.float32, of="w"), 0, "mean")
    given = {k: (1.0, torch.ones(1) * (1.0 / 4)) for k in (0, 1, 3)}
    assert merge(channel, given, trainers=4).item() == 1.0


def test_leaving() -> None:
    """A server goes on with the trainers that are left; what the others owed is not waited for."""
    server = _server_of_one_weight(trainers=4)
    left = Address(Kind.TRAINER, 2)
    answers = server.handle(left, Message(Leave(0)))
    for rank in (0, 1, 3):
        pushed = Message(Push("w.grad", 0, 1.0, {"optimizer.0.lr": 1.0}), torch.ones(1) / 4)
        answers += server.handle(Address(Kind.TRAINER, rank), pushed)
    answers += server.handle(Address(Kind.TRAINER, 0), Message(Pull("w", 1)))
    values = [message.tensor.item() for _, message in answers if isinstance(message.header, Value)]
    assert values == [-1.0]


def test_what_no_update_writes_is_what_was_loaded_last_whoever_asks_first() -> None:
    """Trainer 1 asks behind `load_state_dict` before trainer 0's values have come: it waits for them."""

    class Anchored(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                anchor = self.state[parameter].setdefault("anchor", torch.full_like(parameter, 2.0))
                parameter.sub_(parameter.grad * anchor)

    model = Scalar()
    optimizer = Anchored(model.parameters(), lr=1.0)
    loopback = syncwright.loopback(mean_step, model, optimizer, plan="parameter_server", trainers=2, servers=1)
    loopback.step([(torch.ones(2),)] * 2)
    job = loopback.job
    assert job.fixed == {"w.anchor"}
    server, answers = Server(job, 0), []
    trainers = [Client(job, Recorded(rank)) for rank in range(2)]

    def deliver(client: Client) -> None:
        while client.transport.sent:
            for to, message in server.handle(client.transport.me, client.transport.sent.pop(0)):
                trainers[to.rank].take(Address(Kind.SERVER, 0), message)
                answers.append((to.rank, message.tensor.item()))

    for version, values in enumerate([(0.0, 2.0), (1.0, 3.0)]):
        if version:
            for each in trainers:
                each.restart(version)
        trainers[1].fetch("w.anchor", version)
        deliver(trainers[1])
        for name, value in zip(("w", "w.anchor"), values, strict=True):
            trainers[0].give(name, version, torch.tensor([value]))
        deliver(trainers[0])
    assert answers == [(1, 2.0), (1, 3.0)]
    assert trainers[1].fetch("w.anchor", 7).item() == 3.0


class Recorded:
    """An outlet that keeps what is sent through it."""

    def __init__(self, rank: int) -> None:
        self.me, self.sent = Address(Kind.TRAINER, rank), []

    def send(self, to: Address, message: Message) -> None:
        self.sent.append(message)

    def progress(self, step: int, node: str) -> None:
        pass


def _server_of_one_weight(trainers: int) -> Server:
    job: Job = _lowered(Scalar(), trainers)
    server = Server(job, 0)
    first = Address(Kind.TRAINER, 0)
    server.handle(first, Message(Hello(job.digest)))
    server.handle(first, Message(Value("w", 0), torch.zeros(1)))
    return server


def _lowered(model: nn.Module, trainers: int) -> Job:
    job = start(mean_step, model, "parameter_server", trainers, 1)
    job.step([(torch.ones(2),)] * trainers)
    return job.job


def clipped_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@every_plan
def test_clip_is_by_the_global_norm(plan: str, servers: int) -> None:
    """Gradients 6 and 0 on two trainers, max_norm 1: the step is 1.0, up to clip_grad_norm_'s own 1e-6."""
    model = Scalar()
    job = start(clipped_step, model, plan, 2, servers)
    job.step([(torch.tensor([6.0]),), (torch.tensor([0.0]),)])
    job.sync()
    assert model.w.item() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("mixed", [False, True], ids=["servers", "servers and trainers"])
def test_norms_of_pieces_combine(norm_type: float, mixed: bool) -> None:
    """Partials of inf combine by max, of p by the sum of p-th powers, among servers and trainers together."""

    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=norm_type)
        optimizer.step()
        return loss

    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    expected = deepcopy(model)
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    partition = syncwright.plan.Even(3)
    rules = Rules.of(ParameterServer(partition=partition), {"bias": AllReduce()} if mixed else {})
    job = start(step, model, rules, 2, 2)
    job.step([(x[0], y[0]), (x[1], y[1])])
    job.sync()
    step(expected, torch.optim.SGD(expected.parameters(), lr=1.0), x.flatten(0, 1), y.flatten(0, 1))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, expected.get_parameter(name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_a_server_of_whose_rows_none_is_looked_up_has_a_part_in_the_norm(norm_type: float) -> None:
    """Rows 0 to 3 of 8 are looked up: the second server's part is that of zeros."""

    def step(model, optimizer, ids, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(ids), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01, norm_type=norm_type)
        optimizer.step()
        return loss

    torch.manual_seed(0)
    model = nn.Embedding(8, 2).double()
    expected = deepcopy(model)
    ids, y = torch.tensor([[0, 1], [3, 1]]), torch.randn(2, 2, 2, dtype=torch.float64)
    job = start(step, model, Rules(ParameterServer(partition=syncwright.plan.Even(2))), 2, 2)
    job.step([(ids[0], y[0]), (ids[1], y[1])])
    job.sync()
    step(expected, torch.optim.SGD(expected.parameters(), lr=1.0), ids.flatten(), y.flatten(0, 1))
    torch.testing.assert_close(model.weight, expected.weight, rtol=1e-12, atol=1e-14)


def test_a_mean_in_an_update_keeps_the_variable_whole() -> None:
    """What pieces cannot add up is not cut: a named strategy says so in the plan."""

    class ByMean(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad / (1 + p.grad.abs().mean()), alpha=-group["lr"])

    model = nn.Linear(3, 5, bias=False)
    expected = deepcopy(model)
    job = syncwright.loopback(
        mean_step,
        model,
        ByMean(model.parameters(), lr=0.1),
        plan=syncwright.strategies.named("parameter_server_partitioned", [], min_elements=1),
        trainers=1,
        servers=2,
    )
    x = torch.randn(4, 3)
    job.step([(x,)])
    assert job.job.plan.sharing("weight").sizes == (5,)
    assert any("weight is kept whole" in note for note in job.job.plan.notes)
    job.sync()
    mean_step(expected, ByMean(expected.parameters(), lr=0.1), x)
    assert torch.equal(model.weight, expected.weight)


@every_plan
def test_schedule_reaches_every_server(plan: str, servers: int) -> None:
    """StepLR(2, 0.1) from lr 1, 4 steps: 1, 1, 0.1, 0.1."""
    model = nn.Linear(1, 4, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = StepLR(optimizer, 2, 0.1)
    rules = syncwright.strategies.named(plan, [], **({"min_elements": 1} if "partitioned" in plan else {}))

    def step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).sum(1).mean()
        loss.backward()
        optimizer.step()
        return loss

    job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=2, servers=servers)
    moved, before = [], torch.zeros(4, 1)
    for _ in range(4):
        job.step([(torch.ones(2, 1),), (torch.ones(2, 1),)])
        job.sync()
        moved.append((before - model.weight).flatten().tolist())
        before = model.weight.detach().clone()
        schedule.step()
    for found, lr in zip(moved, [1, 1, 0.1, 0.1], strict=True):
        assert found == pytest.approx([lr] * 4, rel=1e-6)


def test_more_servers_than_variables() -> None:
    """A server with nothing to do starts and ends cleanly."""
    model = Scalar()
    job = start(mean_step, model, "parameter_server_partitioned", 2, 3)
    job.step([(torch.ones(1),), (torch.ones(1),)])
    job.sync()
    assert model.w.item() == -1.0


# Section 8: buffers, accumulation


class Counting(Scalar):
    """Writes what it sees to a floating and to an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.mean().detach()
        self.count += x.shape[0]
        return super().forward(x)


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize(("policy", "seen"), [("mean", 4.0), ("trainer0", 2.0), ("local", 2.0)])
def test_buffers(servers: int, policy: str, seen: float) -> None:
    """A floating buffer: the weighted mean, trainer 0's or each its own; integers are trainer 0's."""
    model = Counting()
    sync = ParameterServer() if servers else AllReduce()
    job = start(mean_step, model, Rules.of(sync, buffers={"seen": policy}), 2, servers)
    x = torch.tensor([1.0, 2, 3, 4, 10])
    job.step([(x[:3],), (x[3:],)])
    assert [r.values["seen"].item() for r in job.replicas] == ([2.0, 7.0] if policy == "local" else [seen] * 2)
    assert [r.values["count"].item() for r in job.replicas] == [3, 3]


@pytest.mark.parametrize("servers", [0, 1])
def test_buffers_of_an_idle_trainer_0(servers: int) -> None:
    """What is trainer 0's stays as it was in a step that trainer 0 does not run."""
    model = Counting()
    job = start(mean_step, model, Rules(ParameterServer() if servers else AllReduce()), 2, servers)
    x = torch.tensor([1.0, 2.0, 3.0])
    job.step([(x[:2],), (x[2:],)])
    job.step([(x[:0],), (x,)])
    assert [r.values["count"].item() for r in job.replicas] == [2, 2]
    assert [r.values["seen"].item() for r in job.replicas] == [2.0, 2.0]


@every_plan
def test_several_backward_calls_reduce_once(plan: str, servers: int) -> None:
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        for part in (x, y):
            (model(part).mean() / 2).backward()
        optimizer.step()
        return model(x).mean()

    model = Scalar()
    job = start(step, model, plan, 2, servers)
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
    job.step([(a[:1], b[:1]), (a[1:], b[1:])])
    job.sync()
    assert model.w.item() == -4.0
    channels = [n for n in job.job.channels if n.startswith("w.grad")]
    assert len(channels) == (1 if servers else 0)


def test_gradient_that_outlives_the_step_is_refused() -> None:
    def step(model, optimizer, x):
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    job = start(step, Scalar(), "all_reduce", 1, 0)
    with pytest.raises(CaptureError, match="'w' outlives the step"):
        job.step([(torch.ones(2),)])


def test_gradient_set_to_zero_starts_from_nothing() -> None:
    def step(model, optimizer, x):
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    model = Scalar()
    job = start(step, model, "all_reduce", 2, 0)
    for _ in range(2):
        job.step([(torch.tensor([1.0]),), (torch.tensor([3.0]),)])
    job.sync()
    assert model.w.item() == -4.0


class Averaged(nn.Module):
    """A weight and a running average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 2))
        self.register_buffer("average", torch.ones(4, 2))


def averaging_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = (model.w.sum(0) * x).mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.average.mul_(0.5).add_(model.w, alpha=0.5)
    return loss


@every_plan
def test_average_of_weights_runs_where_the_update_runs(plan: str, servers: int) -> None:
    torch.manual_seed(0)
    model, expected = Averaged(), Averaged()
    rules = syncwright.strategies.named(plan, [], **({"min_elements": 1} if "partitioned" in plan else {}))
    job = start(averaging_step, model, rules, 2, servers)
    optimizer = torch.optim.SGD(expected.parameters(), lr=1.0)
    for _ in range(3):
        x = torch.randn(4, 2)
        job.step([(x[:2],), (x[2:],)])
        averaging_step(expected, optimizer, x)
    job.sync()
    torch.testing.assert_close(model.average, expected.average, rtol=1e-6, atol=1e-7)
    for part in job.job.servers:
        held = {v.whole or v.name for v in part.holds}
        assert held == {"w", "average"}
        for program in part.programs:
            assert {program.variables[n].whole or n for n in program.writes} == {"w", "average"}
