"""Several calls of a step that make one update: equal to one step on their batches together, under every sharing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from golden_files import GOLDEN, check_golden
from torch import nn

import syncwright
from syncwright import AllGather, AllReduce, Local, LocalSteps, ParameterServer, Plan, Rules, Shard, ops
from syncwright.errors import PlanError
from syncwright.job import BETWEEN, STEP
from syncwright.passes import accumulate, average_gradients, average_values, only_accumulate, tidy
from syncwright.plan import Cast, ErrorFeedback, Even, Hashed, Int8, PowerSGD, TopK
from syncwright.planning import make_plan
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.session import Training
from syncwright.text import parse, to_text
from syncwright.verify import verify
from tests.test_rows import ROWS, Bags

OPTIMIZERS: dict[str, Callable] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
}
SGD: Callable = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
SHARINGS: dict[str, object] = {
    "all_reduce": AllReduce(),
    "zero1": Shard(stage=1),
    "zero2": Shard(stage=2),
    "zero3": Shard(stage=3),
    "servers": ParameterServer(),
    "pieces": ParameterServer(partition=Even(2)),
    "copies": ParameterServer(replicated=True),
}
MIXED = Rules(
    AllReduce(),
    (("0.weight", Shard(stage=2)), ("2.weight", ParameterServer()), ("2.bias", Shard(stage=3))),
    accumulate=3,
)
ALIKE = [(2, 2)] * 6
RAGGED = [(3, 1, 2), (2, 0, 1), (0, 2, 0), (0, 1, 0), (0, 4, 0), (0, 2, 0)]
"""Examples by call and trainer: some calls are empty for one, and in the second update all calls are for two."""


def mean(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    return loss


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def drawn(sizes: Sequence[Sequence[int]]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """By call and trainer a batch."""
    made = torch.Generator().manual_seed(1)
    return [[(torch.randn(n, 5, generator=made), torch.randn(n, 3, generator=made)) for n in row] for row in sizes]


def joined(batches: Sequence[tuple]) -> tuple:
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def job_of(rules: Rules, make: Callable, trainers: int, step: Callable = mean, compile: bool = False) -> Loopback:
    model = network()
    training = Training(
        *(step, model, make(model.parameters()), None, None),
        lambda program: make_plan(rules, program, trainers, 2),
        compile=compile,
        dynamic_shapes=None if compile else ({0: "n"}, {0: "n"}),
    )
    return Loopback(training, trainers)


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    for (name, value), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.allclose(value, wanted, atol=1e-6), f"{name}: {(value - wanted).abs().max()}"


def check_one_device(rules: Rules, make: Callable, sizes: Sequence[Sequence[int]], compile: bool = False) -> None:
    """After every call: the values of one device that takes a step for so many calls, and this call's own loss."""
    job, model = job_of(rules, make, len(sizes[0]), compile=compile), network()
    optimizer, since = make(model.parameters()), []
    for parts in drawn(sizes):
        x, y = joined(parts)
        with torch.no_grad():
            expected = ((model(x) - y) ** 2).mean()
        assert float(job.step(parts)) == pytest.approx(float(expected), abs=1e-6)  # type: ignore[arg-type]
        since.append((x, y))
        if len(since) == rules.accumulate:
            mean(model, optimizer, *joined(since))
            since = []
        job.sync()
        check_equal(job.model, model)


CASES = [(sharing, "Adam") for sharing in SHARINGS if sharing != "copies"] + [("copies", "momentum")]


@pytest.mark.parametrize(("sharing", "optimizer"), CASES)
def test_it_equals_one_step_on_all_batches(sharing, optimizer):
    rules = Rules(SHARINGS[sharing], accumulate=3)  # type: ignore[arg-type]
    check_one_device(rules, OPTIMIZERS[optimizer], RAGGED)


@pytest.mark.parametrize("sharing", ["all_reduce", "servers"])
def test_one_trainer_accumulates(sharing):
    rules = Rules(SHARINGS[sharing], accumulate=3)  # type: ignore[arg-type]
    check_one_device(rules, OPTIMIZERS["Adam"], [(n,) for n in (3, 1, 2, 2, 2, 4)])


@pytest.mark.parametrize("sizes", [ALIKE, RAGGED])
def test_a_mixture_equals_one_device(sizes):
    check_one_device(MIXED, OPTIMIZERS["Adam"], sizes)


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
@pytest.mark.parametrize("sharing", ["all_reduce", "zero2"])
def test_compiled_equals_one_device(sharing):
    rules = Rules(SHARINGS[sharing], accumulate=2)  # type: ignore[arg-type]
    check_one_device(rules, OPTIMIZERS["Adam"], ALIKE, compile=True)


def test_exact_numbers():
    """Gradients 1 and 3 of the first call, 2 (of one trainer, with two examples) of the second: (1 + 3 + 2 * 2) / 4."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def products(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    plan = Rules(AllReduce(), accumulate=2)
    job = syncwright.loopback(products, model, torch.optim.SGD(model.parameters(), lr=1.0), plan=plan, trainers=2)
    job.step([(torch.tensor([[1.0]]),), (torch.tensor([[3.0]]),)])
    job.sync()
    assert model.weight.item() == 0
    job.step([(torch.tensor([[2.0], [2.0]]),), (torch.empty(0, 1),)])
    job.sync()
    assert model.weight.item() == -2


@pytest.mark.parametrize(
    ("by", "reduce"),
    [
        (None, "sum"),
        (ErrorFeedback(Cast("float16")), "mean"),
        (PowerSGD(1, start_step=1), "mean"),
        (TopK(0.2, warmup_steps=1), "mean"),
        (TopK(0.2, momentum=0.9), "sum"),
        (Int8(8), "mean"),
    ],
)
def test_a_trainers_calls_are_as_one_with_their_batches(by, reduce):
    """So also where a compression keeps what it has not sent, and begins at a step: which counts updates."""
    sizes = [(2, 1), (1, 3), (2, 2), (1, 0), (2, 2), (3, 3)]
    sync = AllReduce(reduce=reduce, compress=by)
    accumulating = job_of(Rules(sync, accumulate=2), SGD, 2, step=fitted[reduce])
    at_once = job_of(Rules(sync), SGD, 2, step=fitted[reduce])
    batches = drawn(sizes)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        accumulating.step(first)
        accumulating.step(second)
        at_once.step([joined(pair) for pair in zip(first, second, strict=True)])
    accumulating.sync()
    at_once.sync()
    for value, expected in zip(accumulating.model.parameters(), at_once.model.parameters(), strict=True):
        assert torch.allclose(value, expected, atol=1e-5), (value - expected).abs().max()


def added_up(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).sum() / 100
    loss.backward()
    optimizer.step()
    return loss


fitted = {"mean": mean, "sum": added_up}
TABLES: dict[str, object] = {
    "rows to all": AllGather(),
    "rows to a server": ParameterServer(),
    "rows to pieces": ParameterServer(partition=Even(2)),
    "rows by shards": ParameterServer(partition=Hashed(8), prefetch=False),
}


@pytest.mark.parametrize(
    ("sharing", "optimizer", "trainers"),
    [
        *(("rows to all", "Adagrad", 1), ("rows to all", "Adagrad", 3), ("rows to all", "Adam", 3)),
        *(("rows to a server", "Adagrad", 1), ("rows to a server", "Adagrad", 3)),
        *(("rows to pieces", "Adam", 2), ("rows by shards", "Adagrad", 2)),
    ],
)
def test_rows_of_tables_are_those_of_all_calls(sharing, optimizer, trainers):
    """Where an update writes the rows that were touched, and where it writes all of them; also of parts without examples."""
    torch.manual_seed(0)
    model = Bags()
    expected = copy.deepcopy(model)
    make = getattr(torch.optim, optimizer)
    rules = Rules(AllReduce(), (("table.*", TABLES[sharing]),), accumulate=3)  # type: ignore[arg-type]
    given, alone = make(model.parameters(), lr=0.1), make(expected.parameters(), lr=0.1)
    dynamic = ({0: "n"}, {0: "n"})
    job = syncwright.loopback(mean, model, given, plan=rules, trainers=trainers, servers=2, dynamic_shapes=dynamic)
    made, since = torch.Generator().manual_seed(2), []
    calls = []
    for call in range(9):
        sizes = [2 if (call + k) % 3 else k % 2 for k in range(trainers)] if trainers > 1 else [2]
        calls.append([(_ids(n, made), torch.randn(n, 1, generator=made)) for n in sizes])
    for parts, following in zip(calls, [*calls[1:], None], strict=True):
        if following is not None and trainers == 1:
            job.session.announce(following[0])
        job.step(parts)
        since.append(joined(parts))
        if len(since) == 3:
            mean(expected, alone, *joined(since))
            since = []
    job.sync()
    check_equal(model, expected)


def _ids(count: int, made: torch.Generator) -> torch.Tensor:
    return torch.randint(0, ROWS, (count, 4), generator=made)


def test_buffers_are_written_in_every_call():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Normed()
    expected = [copy.deepcopy(model) for _ in range(2)]
    make = OPTIMIZERS["momentum"]
    plan = Rules(ParameterServer(), (("head.*", AllReduce()),), accumulate=2)
    job = syncwright.loopback(mean, model, make(model.parameters()), plan=plan, trainers=2, servers=1)
    for at, parts in enumerate(drawn([(2, 2)] * 3), start=1):
        job.step(parts)
        for each, (x, _) in zip(expected, parts, strict=True):
            each(x)
        job.sync()
        assert int(model.norm.num_batches_tracked) == at
        means = [each.norm.running_mean for each in expected]
        assert torch.allclose(model.norm.running_mean, sum(means) / 2, atol=1e-6)  # type: ignore[arg-type]


def test_a_loss_scale_sees_all_calls():
    """Of three updates one has an infinite gradient, in its first call: it is skipped, and halves the scale."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def scaled(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nn.init.zeros_(model.weight)
    for rules in (Rules(AllReduce(), accumulate=2), Rules(Shard(stage=3), accumulate=2)):
        job = syncwright.loopback(scaled, model, optimizer, plan=rules, trainers=2)
        seen = []
        for x in (1.0, 3.0, float("inf"), 1.0, 2.0, 4.0):
            job.step([(torch.full((1, 1), x),), (torch.full((1, 1), 1.0),)])
            job.sync()
            seen.append((model.weight.item(), scaler.get_scale()))
        assert seen == [(0, 8), (-1.5, 8), (-1.5, 8), (-1.5, 4), (-1.5, 4), (-3.5, 4)]
        with torch.no_grad():
            model.weight.zero_()
        scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0, "_growth_tracker": 0})
    assert scaler.get_scale() == 8


def test_the_schedule_of_the_last_call_counts():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)

    def products(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    job = syncwright.loopback(products, model, optimizer, plan=Rules(ParameterServer(), accumulate=2), servers=1)
    job.step([(torch.ones(1, 1),)])
    schedule.step()
    job.step([(torch.ones(1, 1),)])
    job.sync()
    assert model.weight.item() == pytest.approx(-0.1)


def test_what_is_unfinished_is_said_once_and_is_not_loaded(caplog):
    batches = drawn([(2, 2)] * 4)
    job = job_of(Rules(AllReduce(), accumulate=2), OPTIMIZERS["Adam"], 2)
    job.step(batches[0])
    with caplog.at_level(logging.WARNING, "syncwright"):
        state = copy.deepcopy(job.state_dict())
        job.sync()
    assert len([each for each in caplog.records if each.name == "syncwright"]) == 1
    assert "of the 2 calls that make one update (accumulate) only 1 are done" in caplog.text
    job.load_state_dict(state)
    other = job_of(Rules(AllReduce(), accumulate=2), OPTIMIZERS["Adam"], 2)
    for parts in batches[1:3]:
        job.step(parts)
        other.step(parts)
    job.sync()
    other.sync()
    check_equal(job.model, other.model)


@pytest.mark.parametrize("sharing", ["all_reduce", "table"])
def test_a_state_is_loaded_in_the_middle(sharing):
    """What was begun is forgotten, also by servers, which have had rows of it."""
    rules = Rules(AllReduce(), (("table.*", ParameterServer()),) if sharing == "table" else (), accumulate=3)
    torch.manual_seed(0)
    model = Bags()
    fresh = copy.deepcopy(model)
    made = torch.Generator().manual_seed(3)
    calls = [[(_ids(2, made), torch.randn(2, 1, generator=made)) for _ in range(2)] for _ in range(8)]

    def started(of: nn.Module) -> Loopback:
        optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
        return syncwright.loopback(mean, of, optimizer, plan=rules, trainers=2, servers=1)

    job, other = started(model), started(fresh)
    state = {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict(),
    }
    for parts in calls[:2]:
        job.step(parts)
    job.load_state_dict(state)
    for parts in calls[2:]:
        job.step(parts)
        other.step(parts)
    job.sync()
    other.sync()
    check_equal(model, fresh)


def test_a_trainer_that_leaves_in_the_middle_counts_for_nothing():
    """Of servers alone the others go on: gradients 1 and 1, and 9 of the one that leaves after the first of two calls."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def products(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    job = syncwright.loopback(
        products, model, optimizer, plan=Rules(ParameterServer(), accumulate=2), trainers=2, servers=1
    )
    job.step([(torch.ones(1, 1),), (torch.full((1, 1), 9.0),)])
    job.replicas[1].leave()
    job._deliver()
    replica, part = job.replicas[0], job.session.part((torch.ones(1, 1),))
    loss = job.drive([replica.step(job.session.prepared(part), part)])
    assert loss == [0]
    job.drive([replica.served()])
    assert job.servers[0].held("weight").item() == -1  # type: ignore[union-attr]


def test_rows_of_a_trainer_that_leaves_in_the_middle_count_for_nothing():
    model = nn.Embedding(4, 1)
    nn.init.zeros_(model.weight)

    def products(model, optimizer, ids):
        optimizer.zero_grad()
        loss = model(ids).sum() / len(ids)
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    job = syncwright.loopback(
        products, model, optimizer, plan=Rules(ParameterServer(), accumulate=2), trainers=2, servers=1
    )
    job.step([(torch.tensor([0]),), (torch.tensor([3]),)])
    job.replicas[1].leave()
    job._deliver()
    replica, part = job.replicas[0], job.session.part((torch.tensor([1]),))
    job.drive([replica.step(job.session.prepared(part), part)])
    assert job.servers[0].held("weight").flatten().tolist() == [-0.5, -0.5, 0, 0]  # type: ignore[union-attr]


def test_pushes_that_are_applied_as_they_come_come_every_few_calls():
    """Each trainer's own mean: 1 and 3 give 2 from the first, 5 and 7 give 6 from the second."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def products(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = Rules(ParameterServer(mode="async"), clip="per_trainer", accumulate=2)
    job = syncwright.loopback(products, model, optimizer, plan=rules, trainers=2, servers=1)
    for a, b in ((1.0, 5.0), (3.0, 7.0)):
        job.step([(torch.tensor([[a]]),), (torch.tensor([[b]]),)])
    job._deliver()
    assert job.servers[0].held("weight").item() == -8  # type: ignore[union-attr]


def test_each_trainer_clips_the_mean_of_its_calls():
    """[3, 4] and [9, 12] have the mean [6, 8], of norm 10."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)

    def products(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = Rules(AllReduce(), clip="per_trainer", accumulate=2)
    job = syncwright.loopback(products, model, optimizer, plan=rules, trainers=2)
    job.step([(torch.tensor([[3.0, 4.0]]),), (torch.zeros(1, 2),)])
    job.step([(torch.tensor([[9.0, 12.0]]),), (torch.zeros(1, 2),)])
    job.sync()
    assert model.weight.flatten().tolist() == pytest.approx([-0.3, -0.4], abs=1e-6)


def test_what_is_made_of_an_update_is_returned_by_the_call_that_makes_it():
    def normed(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss, "norm": norm}

    job = job_of(Rules(AllReduce(), accumulate=2), OPTIMIZERS["momentum"], 2, step=normed)
    first, second = (job.step(parts) for parts in drawn([(2, 2)] * 2))
    assert first["norm"] is None  # type: ignore[index]
    assert float(second["norm"]) > 0  # type: ignore[index]
    assert float(first["loss"]) > 0  # type: ignore[index]


def test_an_evaluation_between_calls_changes_nothing():
    jobs = [job_of(Rules(ParameterServer(), accumulate=2), OPTIMIZERS["Adam"], 2) for _ in range(2)]
    for at, parts in enumerate(drawn([(2, 2)] * 4)):
        for job in jobs:
            job.step(parts)
        if at % 2 == 0:
            jobs[0].evaluate(lambda model, x, y: model(x), [joined(parts)])
    for job in jobs:
        job.sync()
    check_equal(jobs[0].model, jobs[1].model)


@pytest.mark.parametrize(
    ("sharing", "between", "last"),
    [
        ("all_reduce", ["all_reduce"], ["all_reduce"]),
        ("zero1", ["all_reduce"], ["all_reduce", "gather_parts", "gather_parts", "reduce_scatter"]),
        ("zero2", ["all_reduce", "reduce_scatter"], ["all_reduce", "gather_parts", "gather_parts", "reduce_scatter"]),
        ("servers", ["push"], ["push", "push", "push"]),
    ],
)
def test_what_travels_in_the_calls_between(sharing, between, last):
    """The loss and its weights; parts of gradients, where whole ones are not kept."""
    job = job_of(Rules(SHARINGS[sharing], accumulate=2), OPTIMIZERS["Adam"], 2)  # type: ignore[arg-type]
    job.step(drawn([(2, 2)])[0])
    assert job.job is not None
    sent = {
        phase: sorted(str(n.target).split(".")[1] for n in program.graph.nodes if n.target in ops.SENDS)
        for phase, program in job.job.trainer.items()
    }
    assert set(sent[BETWEEN]) == set(between)
    assert set(sent[STEP]) == set(last)
    held = {n: v for n, v in job.replicas[0].values.items() if n.endswith(".accumulated")}
    whole = sum(p.numel() for p in job.model.parameters())
    assert (sum(v.numel() for v in held.values()) < whole) == (sharing == "zero2")  # type: ignore[union-attr]


def test_a_local_variable_accumulates_too():
    job = job_of(Rules(Local(), accumulate=2), OPTIMIZERS["momentum"], 1)
    other, (first, second) = network(), drawn([(1,), (3,)])
    job.step(first)
    job.step(second)
    job.sync()
    mean(other, OPTIMIZERS["momentum"](other.parameters()), *joined([first[0], second[0]]))
    check_equal(job.model, other)


@pytest.mark.parametrize(
    ("sync", "message"),
    [
        (LocalSteps(4), r"accumulate: found 2 with variable 'table\.weight', which trainers train alone for 4 steps"),
        (
            ParameterServer(mode="async"),
            r"found 2 with variable 'table\.weight', of which servers take rows as they come",
        ),
        (AllGather(reduce="mean_by_touch"), r"whose rows are divided by the trainers that touched them"),
    ],
)
def test_what_means_nothing_is_refused(sync, message):
    model = Bags()
    rules = Rules(AllReduce(), (("table.weight", sync),), accumulate=2)
    job = syncwright.loopback(
        mean, model, torch.optim.SGD(model.parameters(), lr=0.1), plan=rules, trainers=2, servers=1
    )
    with pytest.raises(PlanError, match=message):
        job.step([(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 1))] * 2)


def test_golden_call_between():
    """What is left of a step that has been rewritten for all-reduce."""
    case = GOLDEN / "accumulate" / "linear"
    program, plan = parse((case / "before.txt").read_text(encoding="utf-8")), Plan.from_yaml(case / "plan.yaml")
    for each in (accumulate, average_gradients, average_values, only_accumulate, tidy):
        program = each(program, plan)
        verify(program)
    check_golden("accumulate/linear/between", to_text(program))


def test_it_is_read_and_written():
    text = "default: all_reduce\naccumulate: 4\n"
    assert Rules.from_yaml(text).to_yaml() == text
    job = job_of(Rules(AllReduce(), accumulate=4), OPTIMIZERS["Adam"], 2)
    job.step(drawn([(2, 2)])[0])
    assert job.job is not None
    assert Plan.from_yaml(job.job.plan.to_yaml()) == job.job.plan
    with pytest.raises(PlanError, match="accumulate"):
        Rules(AllReduce(), accumulate=0)
