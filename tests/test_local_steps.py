"""Trainers that train alone between exchanges: against a simulation of all trainers in plain PyTorch, by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from golden_files import check_golden
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Plan, Program, Rules
from syncwright.errors import BatchError, LoweringError
from syncwright.exchanges import outer_steps
from syncwright.lower import communications, lower
from syncwright.passes import JOINING
from syncwright.plan import Even, Mean, Optimizer, Outer
from syncwright.planning import make_plan
from syncwright.runtime.inductor import is_available
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.session import Training
from syncwright.text import to_text
from syncwright.view.planned import plan_notes, plan_table
from syncwright.view.programs import program_text

Batch = tuple[torch.Tensor, torch.Tensor]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DILOCO = Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True)
OUTER: dict[Optimizer, Make] = {
    DILOCO: lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
    Optimizer.of("Adam", lr=0.02, betas=(0.8, 0.9)): lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.9)),
}
INNER: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss


def model_of(inner: str = "momentum") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, INNER[inner](list(model.parameters()))


def batches(parts: Sequence[int], steps: int) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [[(draw(n, 3), draw(n, 1)) for n in parts] for _ in range(steps)]


class Simulation:
    """All trainers in plain PyTorch, each with a model and an optimizer. Changes with every step.

    alone  variables that trainers train alone; the others are averaged in every step
    """

    def __init__(self, trainers: int, alone: Mapping[str, LocalSteps], inner: str) -> None:
        made = [model_of(inner) for _ in range(trainers)]
        self.models, self.optimizers = [dict(m.named_parameters()) for m, _ in made], [o for _, o in made]
        self._forward = [m for m, _ in made]
        self.alone, self.steps = alone, 0
        self.outers = {name: OuterOf(sync, self.models[0][name]) for name, sync in alone.items()}

    def step(self, parts: Sequence[Batch]) -> None:
        total = sum(len(x) for x, _ in parts)
        losses = [((m(x) - y) ** 2).sum() for m, (x, y) in zip(self._forward, parts, strict=True)]
        own = [torch.autograd.grad(loss, list(m.values())) for loss, m in zip(losses, self.models, strict=True)]
        for index, name in enumerate(self.models[0]):
            alone = name in self.alone and self.steps >= self.alone[name].start
            mean = sum(grads[index] for grads in own) / total
            for model, grads, (x, _) in zip(self.models, own, parts, strict=True):
                mine = grads[index] / len(x) if len(x) else None
                model[name].grad = mine if alone else mean  # type: ignore[assignment]
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        for name, outer in self.outers.items():
            if self.steps <= outer.sync.start:
                self.outers[name] = OuterOf(outer.sync, self.models[0][name])
            else:
                outer.examples.append([len(x) for x, _ in parts])
                if len(outer.examples) == outer.sync.every:
                    outer.exchange([model[name] for model in self.models])

    def finish(self) -> None:
        for name, outer in self.outers.items():
            if outer.examples:
                outer.exchange([model[name] for model in self.models])

    def expected(self, name: str) -> torch.Tensor:
        """What the job hands back."""
        return self.outers[name].base if name in self.outers else self.models[0][name]


class OuterOf:
    """A variable's value after the last exchange, and its outer optimizer. Changes with every exchange."""

    def __init__(self, sync: LocalSteps, value: torch.Tensor) -> None:
        self.sync, self.base = sync, nn.Parameter(value.detach().clone())
        make = OUTER.get(sync.outer) if isinstance(sync.outer, Optimizer) else None
        self.optimizer = make([self.base]) if make else None
        self.examples: list[list[int]] = []

    @torch.no_grad()
    def exchange(self, values: Sequence[torch.Tensor]) -> None:
        """Local SGD: base + mean(latest - base). DiLoCo: base - mean(latest) is the gradient of the outer optimizer."""
        counts = [sum(column) for column in zip(*self.examples, strict=True)]
        mean = sum((n / sum(counts)) * value for n, value in zip(counts, values, strict=True))
        if self.optimizer is not None:
            self.base.grad = self.base - mean  # type: ignore[operator]
            self.optimizer.step()
        else:
            self.base.copy_(mean)  # type: ignore[arg-type]
        for value in values:
            value.copy_(self.base)
        self.examples = []


def run(
    plan: Rules, parts: Sequence[int], inner: str = "momentum", steps: int = 8, servers: int = 0, compile: bool = False
) -> Loopback:
    """The job, compared with the simulation after every step and after the end."""
    model, optimizer = model_of(inner)

    def of(program: Program) -> Plan:
        return make_plan(plan, program, len(parts), servers)

    training = Training(step, model, optimizer, None, None, of, compile=compile, check_replicas=True)
    job, simulation = Loopback(training, len(parts)), None
    for each in batches(parts, steps):
        job.step(each)
        if simulation is None:
            syncs = {s.variable: s.sync for s in job.job.plan.sharings}  # type: ignore[union-attr]
            simulation = Simulation(len(parts), {n: s for n, s in syncs.items() if isinstance(s, LocalSteps)}, inner)
        simulation.step(each)
        for replica, its in zip(job.replicas, simulation.models, strict=True):
            for name in its.keys() & replica.values.keys():
                close(replica.values[name], its[name])
        for name, value in job.state_dict()["model"].items():  # type: ignore[attr-defined]
            close(value, simulation.expected(name))
    assert simulation is not None
    job.leave()
    simulation.finish()
    job.sync()
    for name, value in model.named_parameters():
        close(value, simulation.expected(name))
    return job


def close(found: object, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-11, atol=1e-13, check_device=False)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("parts", [(2, 2), (4, 2, 1), (2, 0)])
def test_local_sgd(inner: str, parts: tuple[int, ...]) -> None:
    run(Rules(LocalSteps(3)), parts, inner)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("parts", [(2, 2), (4, 2, 1), (3,)])
def test_diloco_is_nesterov_on_what_trainers_have_moved_by(inner: str, parts: tuple[int, ...]) -> None:
    run(Rules(LocalSteps(3, DILOCO)), parts, inner)


MIXED = Rules.of(
    LocalSteps(2),
    {
        "0.weight": AllReduce(),
        "0.bias": LocalSteps(3, DILOCO, start=2),
        "2.weight": ParameterServer(partition=Even(2)),
        "2.bias": LocalSteps(2, start=4, over=AllReduce(bucket_mb=0.0)),
    },
)


@pytest.mark.parametrize("parts", [(2, 2), (3, 0, 1)])
def test_a_choice_for_each_variable(parts: tuple[int, ...]) -> None:
    job = run(MIXED, parts, servers=2, steps=9)
    assert job.job is not None
    assert [(each.clock.every, each.clock.start) for each in job.job.exchanges] == [(2, 4), (3, 2)]
    assert [span.until for span in job.job.spans] == [2, 4]


@pytest.mark.skipif(not is_available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("plan", [Rules(LocalSteps(2, DILOCO, start=2)), MIXED], ids=["diloco", "mixed"])
def test_compiled(plan: Rules) -> None:
    run(plan, (2, 2), "adam", servers=2, steps=7, compile=True)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    every=st.integers(1, 4),
    start=st.integers(0, 3),
    parts=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
    inner=st.sampled_from(list(INNER)),
    outer=st.sampled_from([Mean(), *OUTER]),
)
def test_any_clock(every: int, start: int, parts: list[int], inner: str, outer: Outer) -> None:
    run(Rules(LocalSteps(every, outer, start)), parts, inner, steps=7)


class Scale(nn.Module):
    """One number w, buffers that hold the mean of what it has seen and a count, and an average of w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.ones((), dtype=torch.float64))


def scaled(model: Scale, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model.w * x).mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.seen.copy_(x.mean())
        model.count.add_(len(x))
        model.average.mul_(0.5).add_(model.w, alpha=0.5)
    return loss


def numbers(
    plan: object, steps: Sequence[Sequence[Sequence[float]]], lr: float = 0.5, of: Callable = scaled
) -> Loopback:
    """A job on `Scale`; each step is, for each trainer, the numbers of its part."""
    model = Scale()
    job = syncwright.loopback(
        of,
        model,
        torch.optim.SGD([model.w], lr=lr),
        plan=plan,
        trainers=len(steps[0]),  # type: ignore[arg-type]
    )
    for parts in steps:
        job.step([(torch.tensor(part, dtype=torch.float64),) for part in parts])
    return job


def value(job: Loopback, name: str = "w") -> list[float]:
    return [float(replica.values[name]) for replica in job.replicas]  # type: ignore[arg-type]


def test_every_step_is_all_reduce() -> None:
    """Bit for bit, where nothing is rounded."""
    steps = [[(1.0, 2.0), (3.0, 5.0)], [(0.0, 4.0), (2.0, 1.0)]]
    assert value(numbers(Rules(LocalSteps(1)), steps)) == value(numbers("all_reduce", steps)) == [-1.25, -1.25]


def test_the_mean_is_weighted_by_examples_since_the_last_exchange() -> None:
    """Trainer 0 has seen 2 and 1 examples, trainer 1 none and 1: weights 3/4 and 1/4. lr 1."""
    job = numbers(Rules(LocalSteps(2)), [[(1.0, 3.0), ()], [(2.0,), (8.0,)]], lr=1.0)
    assert value(job) == [0.75 * (1 - 2 - 2) + 0.25 * (1 - 8)] * 2 == [-4.0, -4.0]


def test_an_exchange_for_which_nobody_has_examples_is_refused() -> None:
    """Loopback refuses such a step itself: so the exchange of two trainers is run by hand."""
    job = numbers(Rules(LocalSteps(2)), [[(1.0,), (3.0,)]])
    for replica in job.replicas:
        replica.outers[0].forget()
        replica.outers[0].begin(replica.values)
        replica.outers[0].add(0.0, {})
    with pytest.raises(BatchError, match="step 1: no trainer has examples"):
        job.leave()


def test_diloco_in_numbers() -> None:
    """Trainers move by 0.5 and 1.5, so by 1 in the mean: 1 - 0.7 (1 + 0.9) = -0.33, then -0.33 - 0.7 (1 + 0.9 * 1.9)."""
    steps = [[(0.5,), (1.5,)]] * 4
    assert value(numbers(Rules(LocalSteps(2, DILOCO)), steps[:2])) == pytest.approx([-0.33, -0.33], abs=1e-15)
    assert value(numbers(Rules(LocalSteps(2, DILOCO)), steps)) == pytest.approx([-2.227, -2.227], abs=1e-15)


def test_clipping_is_by_each_trainers_own_norm() -> None:
    """Gradients 6 and 0, max_norm 1, lr 1: they move by 1 and 0."""

    def clipped(model: Scale, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.w * x).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    assert value(numbers(Rules(LocalSteps(1)), [[(6.0,), (0.0,)]], 1.0, clipped)) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_buffers_go_with_the_exchange() -> None:
    steps = [[(1.0, 3.0), (4.0, 4.0)], [(2.0, 2.0), (6.0, 6.0)]]
    before, after = numbers(Rules(LocalSteps(2)), steps[:1]), numbers(Rules(LocalSteps(2)), steps)
    assert (value(before, "seen"), value(after, "seen")) == ([2.0, 4.0], [4.0, 4.0])
    assert (value(before, "count"), value(after, "count")) == ([2, 2], [4, 4])
    assert value(before, "average") == [0.5, 0.0]
    own = [0.5 * 0.5 + 0.5 * (0.0 - 1.0), 0.5 * 0.0 + 0.5 * (-1.0 - 3.0)]
    assert value(after, "average") == [sum(own) / 2] * 2


def test_what_is_handed_back_is_of_the_last_exchange_until_the_end() -> None:
    """Also in an evaluation; a copy that a trainer goes on with is its own."""
    job = numbers(Rules(LocalSteps(2)), [[(1.0,), (3.0,)]] * 3)
    assert value(job) == [-1.5, -2.5]

    def read(model: Scale, x: torch.Tensor) -> torch.Tensor:
        return x * model.w

    assert float(job.state_dict()["model"]["w"]) == -1.0  # type: ignore[index]
    assert job.evaluate(read, [torch.ones(2, dtype=torch.float64)]).tolist() == [-1.0, -1.0]  # type: ignore[attr-defined]
    job.leave()
    assert value(job) == [-2.0, -2.0]
    assert float(job.state_dict()["model"]["w"]) == -2.0  # type: ignore[index]


def test_a_state_that_is_loaded_begins_anew() -> None:
    """Two steps after the load are not the second and third since the last exchange."""
    job = numbers(Rules(LocalSteps(3, DILOCO)), [[(1.0,), (3.0,)]] * 4)
    saved = numbers("all_reduce", [[(1.0,)]]).state_dict()
    job.load_state_dict(saved)
    part = [(torch.tensor([x], dtype=torch.float64),) for x in (1.0, 3.0)]
    job.step(part)
    job.step(part)
    assert value(job) == [0.5 - 1.0, 0.5 - 3.0]
    job.step(part)
    assert value(job) == pytest.approx([0.5 - 0.7 * 1.9 * 3.0] * 2, abs=1e-14)


def test_a_norm_over_variables_of_both_kinds_is_refused() -> None:
    def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    model, optimizer = model_of()
    plan = Rules.of(AllReduce(), {"2.*": LocalSteps(2)})
    job = syncwright.loopback(clipped, model, optimizer, plan=plan, trainers=2)
    with pytest.raises(
        LoweringError, match=r"'2\.bias' is local between exchanges, but its gradient takes part in a global"
    ):
        job.step(batches((2, 2), 1)[0])


def test_one_trainer_exchanges_nothing_but_with_itself() -> None:
    model, optimizer = model_of()
    ((x, y),) = batches((2,), 1)[0]
    program = syncwright.capture(step, model, optimizer, x, y)
    mean = lower(program, make_plan(Rules(LocalSteps(2, start=3)), program, 1, 0))
    assert (mean.exchanges, mean.spans) == ((), ())
    (outer,) = lower(program, make_plan(Rules(LocalSteps(2, DILOCO)), program, 1, 0)).exchanges
    assert communications(outer.job.trainer["step"]) == []


def test_a_step_taken_alone_has_no_communication() -> None:
    model, optimizer = model_of()
    ((x, y),) = batches((2,), 1)[0]
    program = syncwright.capture(step, model, optimizer, x, y)
    job = lower(program, make_plan(Rules(LocalSteps(2, start=3)), program, 2, 0))
    assert communications(job.at(3).trainer["step"]) == [] != communications(job.at(2).trainer["step"])
    assert job.digest != lower(program, make_plan(Rules(LocalSteps(3, start=3)), program, 2, 0)).digest
    assert job.digest == lower(program, job.plan).digest


def test_what_people_see() -> None:
    """Of 8 bytes and 2 trainers in a ring, 8 are sent; once in 4 steps, that is 2 in each."""
    model, optimizer = model_of()
    ((x, y),) = batches((2,), 1)[0]
    program = syncwright.capture(step, model, optimizer, x, y)
    plan = make_plan(Rules.of(AllReduce(), {"2.bias": LocalSteps(4)}), program, 2, 0)
    job = lower(program, plan)
    assert "syncwright.all_reduce" in program_text("exchange:0", program, job)
    assert plan_notes(program, plan, job)[-1] == "a step of one trainer: 1 all-reduce; every 4 steps: 1 all-reduce"
    table = plan_table(program, plan, lower(program, plan, JOINING))
    row = next(row for row in table.rows if row[0] == "2.bias")
    assert (row[4], row[6]) == ("local_steps, every 4", "2 B")


def test_golden_exchange() -> None:
    model = Scale()
    program = syncwright.capture(scaled, model, torch.optim.SGD([model.w], lr=0.5), torch.ones(2, dtype=torch.float64))
    for name, sync in {"mean": LocalSteps(2), "diloco": LocalSteps(2, DILOCO)}.items():
        plan = make_plan(Rules(sync), program, 2, 0)
        (outer,) = outer_steps(program, plan)
        (exchange,) = lower(program, plan).exchanges
        check_golden(f"exchanges/{name}/captured", to_text(outer.program))
        check_golden(f"exchanges/{name}/lowered", to_text(exchange.job.trainer["step"]))


@pytest.mark.parametrize(
    "name",
    [
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ],
)
def test_any_optimizer_is_an_outer_one(name: str) -> None:
    """Three exchanges, in which trainers have moved by 1, 2 and 1 in the mean."""
    job = numbers(Rules(LocalSteps(2, Optimizer(name))), [[(0.5,), (1.5,)], [(0.5,), (1.5,)]], lr=0.5)
    base = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([base])
    for grads in [(1.0, 1.0), (1.0, 3.0), (0.5, 1.5)]:
        base.grad = torch.tensor(sum(grads) / 2, dtype=torch.float64)
        optimizer.step()
    for part in [(1.0, 3.0), (1.0, 3.0), (0.5, 1.5), (0.5, 1.5)]:
        job.step([(torch.tensor([x], dtype=torch.float64),) for x in part])
    assert value(job) == pytest.approx([float(base)] * 2, rel=1e-9)
