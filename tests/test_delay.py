"""Gradients that are applied one step late: exact numbers, equality with a loop that does so, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Plan, Rules, Shard, ops
from syncwright.errors import LoweringError, PlanError
from syncwright.job import FIRST, LAST, STEP
from syncwright.plan import Cast, ErrorFeedback, PowerSGD, TopK
from syncwright.planning import make_plan
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.session import Training
from syncwright.verify import BadWait, verify_job

DELAYED = Rules(AllReduce(delay=1))
OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


def mean(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    return loss


def products(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    """The gradient is the mean of x."""
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


class Late:
    """Plain PyTorch that applies the gradient of each step one step later."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, late: Sequence[str] | None = None):
        self.model, self.optimizer = model, optimizer
        self.late = [n for n, _ in model.named_parameters() if late is None or n in late]
        self.kept: dict[str, torch.Tensor] | None = None

    def step(self, x: torch.Tensor, y: torch.Tensor, clip: float | None = 0.05) -> None:
        self.optimizer.zero_grad()
        ((self.model(x) - y) ** 2).mean().backward()
        named = dict(self.model.named_parameters())
        now = {name: named[name].grad for name in self.late}
        for name in self.late:
            named[name].grad = None if self.kept is None else self.kept[name]
        self.kept = now  # type: ignore[assignment]
        self._apply(clip)

    def end(self, clip: float | None = 0.05) -> None:
        self.optimizer.zero_grad()
        assert self.kept is not None
        for name, parameter in self.model.named_parameters():
            parameter.grad = self.kept.get(name)
        self._apply(clip)

    def _apply(self, clip: float | None) -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def job_of(rules: Rules, make: Callable, trainers: int, step: Callable = mean, compile: bool = False) -> Loopback:
    model = network()
    training = Training(
        *(step, model, make(model.parameters()), None, None),
        lambda program: make_plan(rules, program, trainers, 2),
        compile=compile,
    )
    return Loopback(training, trainers)


def drawn(sizes: Sequence[int], steps: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    made = torch.Generator().manual_seed(1)
    return [
        [(torch.randn(n, 5, generator=made), torch.randn(n, 3, generator=made)) for n in sizes] for _ in range(steps)
    ]


def check_equal(model: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for (name, value), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.allclose(value, wanted, atol=atol), f"{name}: {(value - wanted).abs().max()}"


def check_late(rules: Rules, make: Callable, sizes: Sequence[int], compile: bool = False) -> None:
    """After every step, and at the end."""
    job, model = job_of(rules, make, len(sizes), compile=compile), network()
    late = Late(model, make(model.parameters()))
    for parts in drawn(sizes, 4):
        job.step(parts)  # type: ignore[arg-type]
        late.step(*map(torch.cat, zip(*parts, strict=True)))
        job.sync()
        check_equal(job.model, model)
    job.leave()
    job.sync()
    late.end()
    check_equal(job.model, model)


@pytest.mark.parametrize(
    ("sizes", "optimizer"),
    [
        ((4,), "momentum"),
        ((4,), "Adam"),
        ((2, 2), "SGD"),
        ((2, 2), "Adam"),
        ((2, 0, 1), "momentum"),
        ((2, 0, 1), "Adam"),
    ],
)
def test_it_equals_a_loop_that_applies_gradients_one_step_late(sizes, optimizer):
    """Clipped by the norm of the gradients that are applied; a part without examples takes part."""
    check_late(DELAYED, OPTIMIZERS[optimizer], sizes)


@pytest.mark.parametrize("bucket_mb", [0.0, 0.0001])
def test_in_buckets_of_any_size(bucket_mb):
    check_late(Rules(AllReduce(bucket_mb, delay=1)), OPTIMIZERS["momentum"], (2, 2))


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_compiled_equals_it_too(sizes):
    check_late(DELAYED, OPTIMIZERS["Adam"], sizes, compile=True)


def late_job(plan: Rules, trainers: int = 2, momentum: float = 0) -> Loopback:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    return syncwright.loopback(products, model, optimizer, plan=plan, trainers=trainers, servers=1)


def weights_after(job: Loopback, *gradients: Sequence[float]) -> list[float]:
    found = []
    for each in gradients:
        job.step([(torch.tensor([[float(x)]]),) for x in each])
        job.sync()
        found.append(job.model.weight.item())
    return found


def test_exact_numbers():
    """Means 2, 4, 6: nothing, 2, 2 + 4; the last when the job ends. With momentum 0.5: 2, then 4 + 0.5 * 2, then 6 + 2.5."""
    job = late_job(DELAYED)
    assert weights_after(job, [1, 3], [4, 4], [7, 5]) == [0, -2, -6]
    job.leave()
    job.sync()
    assert job.model.weight.item() == -12
    job = late_job(DELAYED, momentum=0.5)
    assert weights_after(job, [1, 3], [4, 4], [7, 5]) == [0, -2, -7]
    job.leave()
    job.sync()
    assert job.model.weight.item() == -15.5


def test_the_weights_are_those_of_the_gradients_step():
    """1 of three examples and 5 of one: 2; it is applied by a step on one and one."""
    job = late_job(DELAYED)
    job.step([(torch.ones(3, 1),), (torch.full((1, 1), 5.0),)])
    assert weights_after(job, [1, 1]) == [-2]


def test_the_first_step_leaves_state_alone():
    job = job_of(DELAYED, OPTIMIZERS["Adam"], 2)
    parts = drawn((2, 2), 2)
    job.step(parts[0])  # type: ignore[arg-type]
    steps = [value for name, value in job.replicas[0].values.items() if name.endswith(".step")]
    assert steps
    assert not any(steps)
    job.step(parts[1])  # type: ignore[arg-type]
    assert all(value == 1 for name, value in job.replicas[0].values.items() if name.endswith(".step"))


def test_a_state_that_is_loaded_drops_what_is_under_way():
    job = late_job(DELAYED)
    weights_after(job, [1, 3], [4, 4])
    state = copy.deepcopy(job.state_dict())
    assert state["model"]["weight"].item() == -2  # type: ignore[index]
    weights_after(job, [9, 9])
    job.load_state_dict(state)
    assert weights_after(job, [1, 1], [2, 2]) == [-2, -3]


def test_some_variables_are_delayed_and_others_not():
    """Of which no update reads a value of both; also beside servers and parts."""

    def plain(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    rules = Rules(
        AllReduce(delay=1),
        (("0.bias", AllReduce()), ("2.weight", ParameterServer()), ("2.bias", Shard(stage=3))),
    )
    make = OPTIMIZERS["Adam"]
    job, model = job_of(rules, make, 2, step=plain), network()
    late = Late(model, make(model.parameters()), ["0.weight"])
    for parts in drawn((2, 1), 4):
        job.step(parts)  # type: ignore[arg-type]
        late.step(*map(torch.cat, zip(*parts, strict=True)), clip=None)
        job.sync()
        check_equal(job.model, model)
    job.session.meet_last()
    job.sync()
    late.end(clip=None)
    check_equal(job.model, model)


def test_each_trainer_may_clip_alone():
    """Norms of 2 and 4, each clipped to 1: the mean of [1] and [-1] and [1] and [1]."""

    def clipped(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    rules = Rules(AllReduce(delay=1), clip="per_trainer")
    job = syncwright.loopback(
        clipped, model, torch.optim.SGD(model.parameters(), lr=1.0), plan=rules, trainers=2, servers=1
    )
    assert weights_after(job, [2, 4], [2, -4], [0, 0]) == pytest.approx([0, -1, -1], abs=1e-6)


@pytest.mark.parametrize("by", [Cast("bfloat16"), ErrorFeedback(Cast("float16"))])
def test_compressed_gradients_come_late_too(by):
    """1.5 and 3 are the same in halves; what a cast leaves out is kept in the step that sends it."""
    job = late_job(Rules(AllReduce(compress=by, delay=1)))
    assert weights_after(job, [1, 2], [3, 3], [1, 1]) == [0, -1.5, -4.5]
    if isinstance(by, ErrorFeedback):
        small = 1 + 2**-12
        job = late_job(Rules(AllReduce(compress=by, delay=1)))
        weights_after(job, [small, small])
        assert job.replicas[0].values["weight.residual"].item() == 2**-13  # type: ignore[union-attr]


def test_accumulated_gradients_come_late_too():
    """Of two calls each: means 2 and 5, of which the first is applied with the second."""
    job = late_job(Rules(AllReduce(delay=1), accumulate=2))
    assert weights_after(job, [1, 1], [3, 3], [4, 4], [6, 6]) == [0, 0, 0, -2]
    job.leave()
    job.sync()
    assert job.model.weight.item() == -7


def test_the_schedule_is_that_of_the_step_that_applies():
    job = late_job(DELAYED)
    weights_after(job, [1, 1])
    job.optimizer.param_groups[0]["lr"] = 0.5  # type: ignore[attr-defined]
    assert weights_after(job, [0, 0]) == [-0.5]


def test_what_travels_is_waited_for_in_the_next_step():
    job = job_of(DELAYED, OPTIMIZERS["Adam"], 2)
    job.step(drawn((2, 2), 1)[0])  # type: ignore[arg-type]
    assert job.job is not None
    programs = job.job.trainer
    begun = {
        phase: len(programs[phase].graph.find_nodes(op="call_function", target=ops.all_reduce_later))
        for phase in programs
    }
    waited = {
        phase: len(programs[phase].graph.find_nodes(op="call_function", target=ops.wait_before)) for phase in programs
    }
    assert (begun[STEP], begun[FIRST], begun[LAST]) == (1, 1, 0)
    assert (waited[STEP], waited[FIRST], waited[LAST]) == (1, 0, 1)
    assert job.replicas[0].client.has_begun_later
    forgetful = programs[STEP].edit()
    (wait,) = forgetful.graph.find_nodes(op="call_function", target=ops.wait_before)
    wait.replace_all_uses_with(
        next(iter(forgetful.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)))
    )
    forgetful.graph.erase_node(wait)
    broken = {**programs, STEP: forgetful}
    with pytest.raises(BadWait, match="wait once for all that the step before has begun"):
        verify_job(type(job.job)(**{f: getattr(job.job, f) for f in job.job.__slots__} | {"trainer": broken}))


def test_a_norm_of_delayed_and_other_gradients_is_refused():
    rules = Rules(AllReduce(delay=1), (("0.bias", AllReduce()),))
    job = job_of(rules, OPTIMIZERS["SGD"], 2)
    with pytest.raises(
        LoweringError, match=r"'0\.weight' is all-reduced with delay: 1 and '0\.bias' is not, but a value"
    ):
        job.step(drawn((2, 2), 1)[0])  # type: ignore[arg-type]


def test_a_loss_scale_is_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def scaled(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    job = job_of(DELAYED, OPTIMIZERS["SGD"], 2, step=scaled)
    with pytest.raises(LoweringError, match="which may be another when the gradient is applied, one step later"):
        job.step(drawn((2, 2), 1)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllReduce(compress=PowerSGD(1), delay=1), "found delay: 1 with compress: power_sgd"),
        (lambda: AllReduce(compress=ErrorFeedback(TopK(0.1)), delay=1), "found delay: 1 with compress: top_k"),
        (lambda: LocalSteps(4, over=AllReduce(delay=1)), r"LocalSteps\.over: found all_reduce with delay: 1"),
        (lambda: AllReduce(delay=2), r"AllReduce\.delay"),  # type: ignore[arg-type]
    ],
)
def test_what_means_nothing_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_it_is_read_and_written():
    text = "default: {all_reduce: {delay: 1}}\n"
    assert Rules.from_yaml(text).to_yaml() == text
    job = late_job(DELAYED)
    weights_after(job, [1, 1])
    assert job.job is not None
    assert Plan.from_yaml(job.job.plan.to_yaml()) == job.job.plan
