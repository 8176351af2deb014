"""Parameters in trainers' own parts: exact numbers, equality with all-reduce and one device, what each trainer holds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllGather, AllReduce, ParameterServer, Rules, ops
from syncwright.capture.state import Binding
from syncwright.capture.step import capture_step
from syncwright.errors import DeferredError, PlanError
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Shard
from syncwright.planning import make_plan
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.scatters import lay_out
from syncwright.selection import Own
from tests.test_passes import packed
from tests.together import cut_values, run_together

STAGES = (1, 2, 3)
OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.0),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def batches(steps: int = 3, examples: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(examples, 5, generator=generator), torch.randn(examples, 3, generator=generator))
        for _ in range(steps)
    ]


def train(job: Loopback, given: list[tuple[torch.Tensor, torch.Tensor]]) -> Loopback:
    for x, y in given:
        job.step(list(zip(x.chunk(job.trainers), y.chunk(job.trainers), strict=True)))
    return job


def job_of(rules: Rules, make: Callable, trainers: int = 2, the_step: Callable = step, servers: int = 0) -> Loopback:
    model = Net()
    return syncwright.loopback(
        the_step, model, make(model.parameters()), plan=rules, trainers=trainers, servers=servers
    )


def state_of(job: Loopback, deferred: bool = False) -> dict[str, torch.Tensor]:
    found = job.state_dict(deferred)
    states = found["optimizer"]["state"]  # type: ignore[index]
    numbered = {f"{k}.{key}": torch.as_tensor(value) for k, its in states.items() for key, value in its.items()}
    return {**found["model"], **numbered}  # type: ignore[dict-item]


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}")


def on_one_device(make: Callable, the_step: Callable, given: list) -> dict[str, torch.Tensor]:
    model = Net()
    optimizer = make(model.parameters())
    for batch in given:
        the_step(model, optimizer, *batch)
    numbered = {
        f"{k}.{key}": torch.as_tensor(value)
        for k, its in optimizer.state_dict()["state"].items()
        for key, value in its.items()
    }
    return {**model.state_dict(), **numbered}


def test_even_parts():
    own = Own("w", (3, 3), 2)
    assert (own.count, own.is_padded) == (5, True)
    assert [own.bounds(k) for k in range(2)] == [(0, 5), (5, 9)]
    small = Own("b", (2,), 4)
    assert [small.bounds(k) for k in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]


def test_what_goes_to_whom_is_laid_out_with_zeros():
    whole = torch.full((6,), 9.0)
    lay_out(whole, [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[3.0], [4.0]])], 2)
    assert whole.tolist() == [0, 1, 3, 2, 0, 4]


@pytest.mark.parametrize("stage", STAGES)
def test_a_norm_over_parts(stage):
    """Trainer 0 has the gradients [3, 4], trainer 1 has [12]: the norm is 13 everywhere; clipped to 6.5 they are halved."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

    def products(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> tuple:
        optimizer.zero_grad()
        loss = (model.w * x).sum(1).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 6.5)
        optimizer.step()
        return loss, norm

    model = Three()
    job = syncwright.loopback(
        products, model, torch.optim.SGD(model.parameters(), lr=1.0), plan=Rules(Shard(stage)), trainers=2
    )
    _, norm = job.step([(torch.tensor([[3.0, 4.0, 12.0]]),), (torch.tensor([[3.0, 4.0, 12.0]]),)])
    assert float(norm) == pytest.approx(13.0, abs=1e-6)
    kept = [replica.values["w[own]"].tolist() for replica in job.replicas]
    assert kept[0] == pytest.approx([-1.5, -2.0], abs=1e-6)
    assert kept[1] == pytest.approx([-6.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bucket_mb", [25.0, 0.0])
def test_every_stage_ends_as_all_reduce_does(stage, optimizer, bucket_mb):
    """To the bit: sums are made in the same order. RMSprop without eps divides by zero behind a variable's end."""
    expected = state_of(train(job_of(Rules(AllReduce()), OPTIMIZERS[optimizer]), batches()))
    found = state_of(train(job_of(Rules(Shard(stage, bucket_mb)), OPTIMIZERS[optimizer]), batches()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("trainers", [2, 3, 6])
@pytest.mark.parametrize("stage", [1, 3])
def test_clipping_equals_one_device(stage, trainers):
    make = OPTIMIZERS["AdamW"]
    job = train(job_of(Rules(Shard(stage)), make, trainers, clipped), batches())
    check_close(state_of(job), on_one_device(make, clipped, batches()))


def test_what_every_trainer_holds():
    """Stage 3: parts of parameters and state, a third each, and step counts. Stage 1: the parameters too."""
    names = [name for name, _ in Net().named_parameters()]
    counts = {name: -(-p.numel() // 3) for name, p in Net().named_parameters()}
    for stage in STAGES:
        job = train(job_of(Rules(Shard(stage)), OPTIMIZERS["AdamW"], 3), batches(1))
        for replica in job.replicas:
            held = {n: v.numel() for n, v in replica.values.items() if isinstance(v, torch.Tensor) and v.dim()}
            parts = {f"{name}{key}[own]": counts[name] for name in names for key in ("", ".exp_avg", ".exp_avg_sq")}
            whole = {name: p.numel() for name, p in Net().named_parameters()} if stage < 3 else {}
            assert held == {**parts, **whole}


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_behind_the_end_changes_no_number(stage):
    """A number that an update makes of all of a parameter: exp(0) = 1 behind its end is not in it."""

    def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.grad.div_(p.exp().sum() + p.grad.amax() + p.grad.amin() + torch.linalg.vector_norm(p, float("inf")))
        optimizer.step()
        return loss

    make = OPTIMIZERS["SGD"]
    job = train(job_of(Rules(Shard(stage)), make, 3, scaled), batches())
    check_close(state_of(job), on_one_device(make, scaled, batches()))


def test_backward_gathers_again_what_forward_let_go():
    """One collective per variable: forward gathers four; backward reads but the second weight again, gathered before, as forward
    read the second bias last."""
    job = train(job_of(Rules(Shard(3, bucket_mb=0.0)), OPTIMIZERS["SGD"]), batches(1))
    sent = [str(n.target).split(".")[1] for n in communications(job.job.trainer["step"])]  # type: ignore[union-attr]
    assert sent.count("gather_parts") == 5
    kept = train(job_of(Rules(Shard(3, bucket_mb=0.0, keep=True)), OPTIMIZERS["SGD"]), batches(1))
    sent = [str(n.target).split(".")[1] for n in communications(kept.job.trainer["step"])]  # type: ignore[union-attr]
    assert sent.count("gather_parts") == 4


@pytest.mark.parametrize(("prefetch", "most"), [(0, 1), (1, 2), (2, 3)])
def test_no_more_buckets_are_under_way_than_asked_for(prefetch, most):
    job = train(job_of(Rules(Shard(3, bucket_mb=0.0, prefetch=prefetch)), OPTIMIZERS["SGD"]), batches(1))
    under_way = worst = 0
    for node in communications(job.job.trainer["step"]):  # type: ignore[union-attr]
        kind = str(node.target).split(".")[1]
        under_way += {"gather_parts": 1, "wait_whole": -1}.get(kind, 0)
        worst = max(worst, under_way)
    assert worst == most


def test_every_kind_of_sharing_in_one_step():
    """Two stages, a replica, a server in pieces, rows gathered and rows on a server; one norm clips all, each piece counted
    once. One device uses foreach updates; the result is the same."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.near, self.far = nn.Embedding(11, 4), nn.Embedding(13, 4)
            self.first, self.second, self.third, self.last = (nn.Linear(*s) for s in ((8, 7), (7, 6), (6, 5), (5, 1)))

        def forward(self, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
            x = torch.cat([self.near(near), self.far(far)], 1)
            for layer in (self.first, self.second, self.third):
                x = torch.tanh(layer(x))
            return self.last(x)

    def mixed(
        model: nn.Module, optimizer: torch.optim.Optimizer, near: torch.Tensor, far: torch.Tensor
    ) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(near, far) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=True)
        optimizer.step()
        return loss

    rules = Rules.of(
        AllReduce(),
        {
            "near.*": AllGather(),
            "far.*": ParameterServer(),
            "first.*": Shard(3),
            "second.*": Shard(1),
            "third.weight": ParameterServer(partition=syncwright.plan.Even(2)),
        },
    )
    generator = torch.Generator().manual_seed(4)
    given = [
        (torch.randint(0, 11, (6,), generator=generator), torch.randint(0, 13, (6,), generator=generator))
        for _ in range(5)
    ]
    ends = []
    for trainers in (0, 2, 3):
        model = Mixed()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, foreach=True)
        if trainers:
            job = syncwright.loopback(mixed, model, optimizer, plan=rules, trainers=trainers, servers=2)
            for batch in given:
                job.step(list(zip(*(each.chunk(trainers) for each in batch), strict=True)))
            job.sync()
        else:
            for batch in given:
                mixed(model, optimizer, *batch)
        ends.append(
            {**model.state_dict(), **{f"{n}.sum": optimizer.state[p]["sum"] for n, p in model.named_parameters()}}
        )
    for found in ends[1:]:
        check_close(found, ends[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_an_average_of_weights_goes_in_parts_too(stage):
    class Averaged(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", self.first.weight.detach().clone())

    def averaging(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = step(model, optimizer, x, y)
        with torch.no_grad():
            model.average.lerp_(model.first.weight, 0.25)
        return loss

    ends = []
    for trainers in (0, 2):
        model = Averaged()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        if trainers:
            job = syncwright.loopback(averaging, model, optimizer, plan=Rules(Shard(stage)), trainers=trainers)
            train(job, batches())
            assert job.replicas[0].values["average[own]"].shape == (18,)  # type: ignore[union-attr]
            job.sync()
        else:
            for batch in batches():
                averaging(model, optimizer, *batch)
        ends.append(copy.deepcopy(model.state_dict()))
    check_close(ends[1], ends[0])


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_gathers_what_it_reads(stage):
    """Five examples of which the last batch has one: the second trainer takes part without an example."""
    job = train(job_of(Rules(Shard(stage)), OPTIMIZERS["SGD"]), batches())
    x = batches()[0][0]
    found = job.evaluate(lambda model, x: model(x), [(x[:4],), (x[4:5],)])
    job.sync()
    torch.testing.assert_close(found, job.model(x[:5]).detach())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bucket_mb", [0.0, 120 / 2**20, 200 / 2**20, 25.0])
@pytest.mark.parametrize("the_step", [step, clipped], ids=["plain", "clipped"])
def test_the_program_that_is_compiled_computes_the_same(stage, bucket_mb, the_step):
    """Updates joined, in one bucket and in several."""
    model, (batch,) = Net(), batches(1)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    binding = Binding(model, optimizer)
    program = capture_step(the_step, binding, optimizer, batch).program
    plan = make_plan(Rules(Shard(stage, bucket_mb)), program, 2, 0)
    whole = {
        **binding.values(),
        **binding.hyper_values(),
        "batch.weight": 1.0,
        "batch.0": batch[0],
        "batch.1": batch[1],
    }
    found = []
    for passes in (PIPELINE, COMPILED):
        made = lower(program, plan, passes=passes).trainer["step"]
        given = [{**each, **packed(made, each)} for each in cut_values(made, whole, 2)]
        found.append((made, run_together(made, given)))
    (_, expected), (made, joined) = found
    for its, other in zip(joined, expected, strict=True):
        for name, value in packed(made, other).items():
            assert torch.equal(its[name], value), name


@pytest.mark.parametrize(("one", "other"), [(Shard(3), AllReduce()), (AllReduce(), Shard(1)), (Shard(1), Shard(3))])
def test_what_one_plan_has_saved_another_goes_on_with(one, other):
    make = OPTIMIZERS["AdamW"]
    expected = state_of(train(job_of(Rules(one), make), batches(4)))
    before = train(job_of(Rules(one), make), batches(4)[:2])
    after = job_of(Rules(other), make)
    train(after, batches(1))
    after.load_state_dict(before.state_dict())
    assert all(torch.equal(v, expected[n]) for n, v in state_of(train(after, batches(4)[2:])).items())


def test_deferred_parameters_are_made_in_parts():
    make = OPTIMIZERS["SGD"]
    expected = state_of(train(job_of(Rules(Shard(3)), make), batches()))
    with syncwright.deferred(above=4):
        model = Net()
    job = syncwright.loopback(step, model, make(model.parameters()), plan=Rules(Shard(3)), trainers=2)
    train(job, batches())
    with pytest.raises(
        DeferredError, match=r"state_dict: first.bias, first.weight, second.weight \(deferred\) are cut"
    ):
        job.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in state_of(job, deferred=True).items())


def test_the_users_tensors_are_let_go_while_parts_are_trained():
    """After `sync` they hold what was trained, until the next step; a batch of another shape is captured without them."""
    job = train(job_of(Rules(Shard(3)), OPTIMIZERS["SGD"]), batches())
    model = job.model
    with pytest.raises(DeferredError, match=r"'first.bias' is cut among the trainers.*trainer.sync\(\)"):
        model(torch.zeros(1, 5))
    job.sync()
    trained = model.first.weight.detach().clone()
    assert torch.equal(torch.cat([r.values["first.weight[own]"] for r in job.replicas])[:35], trained.view(-1))  # type: ignore[misc]
    train(job, batches(1, examples=4))
    with pytest.raises(DeferredError):
        model(torch.zeros(1, 5))
    job.sync()
    assert not torch.equal(model.first.weight, trained)


@pytest.mark.parametrize("clip", [False, True])
def test_under_autocast_the_cast_is_gathered(clip):
    """Half the bytes; the masters are parts in full precision, and the numbers those of replicas, to the bit."""

    def cast(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss

    make = OPTIMIZERS["AdamW"]
    job = train(job_of(Rules(Shard(3)), make, 2, cast), batches())
    gathers = job.job.trainer["step"].graph.find_nodes(op="call_function", target=ops.gather_parts)  # type: ignore[union-attr]
    nbytes = [sum(part.meta["val"].nbytes for part in node.args[0]) for node in gathers]
    halves = [
        count
        for count, node in zip(nbytes, gathers, strict=True)
        if node.args[0][0].meta["val"].dtype is torch.bfloat16
    ]
    assert halves == [2 * (18 + 4 + 11 + 2)]
    assert all(v.dtype is torch.float32 for n, v in job.replicas[0].values.items() if n.endswith("[own]"))  # type: ignore[union-attr]
    expected, found = state_of(train(job_of(Rules(AllReduce()), make, 2, cast), batches())), state_of(job)
    if clip:
        check_close(found, expected)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_one_number_is_all_reduced():
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    job = syncwright.loopback(step, model, OPTIMIZERS["SGD"](model.parameters()), plan="zero3", trainers=2)
    train(job, batches())
    assert "scale is all-reduced: one number cannot be cut" in job.job.plan.notes  # type: ignore[union-attr]


def test_settings_that_mean_nothing_together_are_refused():
    with pytest.raises(PlanError, match=r"keep: true with stage: 1.*stage: 3"):
        Shard(1, keep=True)
    with pytest.raises(PlanError, match="stage"):
        Shard(4)  # type: ignore[arg-type]
