"""Parameters that cannot be cut, under `shard`: who keeps them, that nobody else does, equality with one device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import Rules, ops
from syncwright.cut.of_trainer import of_trainer
from syncwright.errors import PlanError
from syncwright.plan import Plan, Shard, Sharing
from syncwright.plan.placement import in_order, least_loaded
from syncwright.runtime.loopback import Loopback
from syncwright.text import parse, to_text

STAGES = (1, 2, 3)
STEPS = 4


class Net(nn.Module):
    """Used in another order than registered in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.last, self.first, self.inner = nn.Linear(5, 3), nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.first(x)))))


def muon(model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)


def adafactor(model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    return (torch.optim.Adafactor(model.parameters(), lr=0.02, weight_decay=0.01),)


OPTIMIZERS = {"Muon": muon, "Adafactor": adafactor}


def step(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], x: torch.Tensor, y: torch.Tensor):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.4)
    for optimizer in optimizers:
        optimizer.step()
    return loss, norm


def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(steps)]


def job_of(make: Callable, sync: Shard, trainers: int = 2, model: nn.Module | None = None) -> Loopback:
    model = Net() if model is None else model
    return syncwright.loopback(step, model, make(model), plan=Rules(sync), trainers=trainers)


def train(job: Loopback, given: list, sizes: list[int] | None = None) -> list[tuple[float, float]]:
    found = []
    for x, y in given:
        parts = sizes or [len(part) for part in x.tensor_split(job.trainers)]
        loss, norm = job.step(list(zip(x.split(parts), y.split(parts), strict=True)))  # type: ignore[misc]
        found.append((float(loss), float(norm)))
    return found


def state_of(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            found |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
    return found


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}")


def plan_of(job: Loopback) -> Plan:
    train(job, batches(1))
    return job.job.plan  # type: ignore[union-attr]


def test_who_keeps_what():
    """SEMANTICS 7."""
    assert in_order([1, 1, 1, 1], 2) == [0, 0, 0, 1]
    assert in_order([90, 5, 5], 4) == [0, 1, 2]
    assert least_loaded([4, 3, 2, 2, 1], 2) == [0, 1, 1, 0, 1]


def test_the_plan_says_who_keeps_what():
    """Registered: last (15 elements), first (54), inner (45); used: first, inner, last."""
    least = plan_of(job_of(muon, Shard(), 2))
    assert [s.keeper for s in least.sharings if s.variable.endswith("weight")] == [0, 1, 0]
    assert "first.weight is kept whole by trainer 1: its update needs the whole tensor" in least.notes
    used = plan_of(job_of(muon, Shard(owner="use_order"), 2))
    assert {s.variable: s.keeper for s in used.sharings if s.variable.endswith("weight")} == {
        "first.weight": 0,
        "inner.weight": 0,
        "last.weight": 1,
    }
    assert all(s.keeper is None for s in used.sharings if s.variable.endswith("bias"))
    assert Plan.from_yaml(used.to_yaml()) == used


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("trainers", [2, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_one_device(kind, trainers, stage):
    """With a norm over what one trainer keeps and what all have parts of; four trainers, one of which keeps nothing."""
    alone = Net()
    its = OPTIMIZERS[kind](alone)
    expected = [tuple(float(each) for each in step(alone, its, *batch)) for batch in batches()]
    job = job_of(OPTIMIZERS[kind], Shard(stage), trainers)
    torch.testing.assert_close(train(job, batches()), expected, rtol=1e-5, atol=1e-6)
    job.sync()
    check_close(state_of(job.model, job.optimizer), state_of(alone, its))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_trainer_without_examples_takes_part(stage):
    alone = Net()
    its = muon(alone)
    for batch in batches():
        step(alone, its, *batch)
    job = job_of(muon, Shard(stage), 3)
    train(job, batches(), sizes=[5, 0, 3])
    job.sync()
    check_close(state_of(job.model, job.optimizer), state_of(alone, its))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_is_skipped_is_skipped_by_all(kind, stage):
    """The third batch overflows, on one trainer."""

    def build() -> tuple[nn.Module, tuple[torch.optim.Optimizer, ...], torch.amp.GradScaler, Callable]:
        model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def scaled(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], x: torch.Tensor, y: torch.Tensor):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.4)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            return loss

        return model, OPTIMIZERS[kind](model), scaler, scaled

    given = batches(5)
    given[2][1][1] = float("inf")
    alone, its, scaler, the_step = build()
    for batch in given:
        the_step(alone, its, *batch)
    model, optimizers, other, the_step = build()
    job = syncwright.loopback(the_step, model, optimizers, plan=Rules(Shard(stage)), trainers=2)
    for x, y in given:
        job.step(list(zip(x.chunk(2), y.chunk(2), strict=True)))
    job.sync()
    check_close(state_of(model, optimizers), state_of(alone, its))
    assert other.get_scale() == scaler.get_scale() == 16.0


@pytest.mark.parametrize("stage", STAGES)
def test_nobody_else_holds_it(stage):
    job = job_of(muon, Shard(stage), 3)
    train(job, batches(1))
    held = [
        {n for n, v in replica.values.items() if isinstance(v, torch.Tensor) and "weight" in n}
        for replica in job.replicas
    ]
    whole = set() if stage == 3 else {"last.weight", "first.weight", "inner.weight"}
    for trainer, name in enumerate(["last", "first", "inner"]):
        own = {f"{name}.weight.momentum_buffer[own]"} | ({f"{name}.weight[own]"} if stage == 3 else set())
        assert held[trainer] == own | whole


def test_nobody_else_runs_its_update():
    """Muon multiplies matrices; and every program sends and waits for the same."""
    job = job_of(muon, Shard(1), 3)
    train(job, batches(1))
    program = job.job.trainer["step"]  # type: ignore[union-attr]
    alone = [of_trainer(program, trainer) for trainer in range(4)]

    def counted(program, *targets) -> int:
        return sum(len(program.graph.find_nodes(op="call_function", target=target)) for target in targets)

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    forward = counted(alone[3], *products)
    each = [counted(program, *products) - forward for program in alone]
    assert each[0] == each[1] == each[2] > 0
    assert counted(program, *products) == forward + sum(each)
    kinds = (ops.reduce_to, ops.give, ops.reduce_scatter, ops.gather_parts, ops.wait_own, ops.wait_whole)
    assert {tuple(counted(each, kind) for kind in kinds) for each in (*alone, program)} == {
        tuple(counted(program, kind) for kind in kinds)
    }


def test_one_bucket_for_each_that_keeps():
    """Eight matrices of trainers 0 and 1, in turn: one reduction and one gift for each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(8)))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)

    def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    job = syncwright.loopback(plain, model, optimizer, plan="zero1", trainers=2)
    job.step([(torch.ones(2, 4),), (torch.ones(2, 4),)])
    program = job.job.trainer["step"]  # type: ignore[union-attr]
    for kind in (ops.reduce_to, ops.give):
        assert [len(n.args[0]) for n in program.graph.find_nodes(op="call_function", target=kind)] == [4, 4]


@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_reads_it(stage):
    """The last batch has one example: the others take part without one."""
    job = job_of(muon, Shard(stage), 3)
    train(job, batches())
    x = batches()[0][0]
    found = job.evaluate(lambda model, x: model(x), [(x[:6],), (x[6:7],)])
    job.sync()
    torch.testing.assert_close(found, job.model(x[:7]).detach())


def test_what_was_saved_goes_on():
    expected = job_of(adafactor, Shard(3))
    train(expected, batches())
    before, after = job_of(adafactor, Shard(3)), job_of(adafactor, Shard(1), 3)
    train(before, batches()[:2])
    train(after, batches(1))
    after.load_state_dict(before.state_dict())
    train(after, batches()[2:])
    for job in (expected, after):
        job.sync()
    check_close(
        state_of(after.model, after.optimizer),  # type: ignore[arg-type]
        state_of(expected.model, expected.optimizer),  # type: ignore[arg-type]
    )


def test_deferred_ones_are_made_by_who_keeps_them():
    expected = job_of(muon, Shard(3))
    train(expected, batches())
    with syncwright.deferred(above=4):
        model = Net()
    job = job_of(muon, Shard(3), model=model)
    train(job, batches())
    found, wanted = job.state_dict(deferred=True)["model"], expected.state_dict()["model"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)  # type: ignore[index]


def test_the_text_of_a_program_says_who_keeps_what():
    job = job_of(muon, Shard(3))
    train(job, batches(1))
    program = job.job.trainer["step"]  # type: ignore[union-attr]
    text = to_text(program)
    assert 'param  "first.weight[own]": f32[9,6] own "first.weight" [9,6] among 2 with 1' in text
    assert to_text(parse(text)) == text


def test_what_cannot_be_meant_is_refused():
    plan = plan_of(job_of(muon, Shard())).to_yaml()
    with pytest.raises(PlanError, match=r"'last.weight': found keeper 7, expected one of the plan's 2 trainers"):
        Plan.from_yaml(plan.replace("keeper: 0", "keeper: 7", 1))
    with pytest.raises(PlanError, match=r"'last.bias': found keeper: 1, expected none.*share it by shard"):
        Sharing("last.bias", syncwright.AllReduce(), (3,), keeper=1)
