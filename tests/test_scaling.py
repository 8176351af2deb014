"""Loss scaling: a step with torch's GradScaler, on every kind of sharing, against the same step on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import syncwright
from syncwright import AllGather, AllReduce, ParameterServer, Rules
from syncwright.capture.scaling import SCALING
from syncwright.capture.state import Binding
from syncwright.capture.step import capture_step
from syncwright.errors import CaptureError, LoweringError
from syncwright.lower import lower
from syncwright.nn import HashEmbedding
from syncwright.passes import COMPILED, PIPELINE
from syncwright.passes.flat import flat_parts
from syncwright.plan import Shard
from syncwright.plan.compression import Cast, ErrorFeedback, PowerSGD
from syncwright.planning import make_plan
from syncwright.runtime.compiled import Compiled, CompiledExecutor
from syncwright.runtime.executor import NO_PORT, Executor
from syncwright.runtime.flat_values import apart, equal, laid_flat
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.loopback import Loopback
from syncwright.text import to_text

FINITE = (1, 1, 1, 0, 1)
NUMBERS = ((8.0, 1), (8.0, 2), (16.0, 0), (8.0, 0), (8.0, 1))
"""SEMANTICS section 7: scale and count behind every step, from scale 8 with a growth interval of 3."""

SGD: Callable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
ADAMW: Callable = lambda p: torch.optim.AdamW(p, lr=0.01)  # noqa: E731
PLANS: dict[str, tuple[object, int]] = {
    "all_reduce": ("all_reduce", 0),
    "zero1": (Rules(default=Shard(stage=1)), 0),
    "zero2": (Rules(default=Shard(stage=2)), 0),
    "zero3": (Rules(default=Shard(stage=3)), 0),
    "parameter_server": ("parameter_server", 1),
    "parameter_server_partitioned": ("parameter_server_partitioned", 2),
    "a mix": (
        Rules.of(
            AllReduce(),
            {"first.weight": ParameterServer(), "second.weight": Shard(stage=3), "second.bias": ParameterServer()},
        ),
        2,
    ),
}


class Net(nn.Module):
    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def scaler_of(**options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 8.0, "growth_interval": 3, **options})


def scaled(scaler: torch.amp.GradScaler, clip: bool = False) -> Callable:
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def batches(finite: tuple[int, ...] = FINITE, trainers: int = 2, bad: int = -1) -> list[list[tuple]]:
    """A batch for each trainer, of steps of which some have an infinite target, on one trainer only."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for good in finite:
        parts = [
            (torch.randn(2, 5, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(trainers)
        ]
        if not good:
            parts[bad][1][0, 0] = float("inf")
        found.append(parts)
    return found


def job_of(plan: str, scaler, make: Callable = SGD, trainers: int = 2, clip: bool = False, **options) -> Loopback:
    model, (rules, servers) = Net(), PLANS[plan]
    return syncwright.loopback(
        *(scaled(scaler, clip), model, make(model.parameters())),
        plan=rules,
        trainers=trainers,
        servers=servers,
        **options,
    )


def values(job: Loopback) -> dict[str, torch.Tensor]:
    job.sync()
    return {name: torch.as_tensor(value).clone() for name, value in job.binding.values().items()}


def on_one_device(
    scaler, given: list[list[tuple]], make: Callable = SGD, clip: bool = False
) -> dict[str, torch.Tensor]:
    """The same steps on whole batches, in plain PyTorch."""
    model = Net()
    optimizer, step = make(model.parameters()), scaled(scaler, clip)
    for parts in given:
        step(model, optimizer, *(torch.cat(each) for each in zip(*parts, strict=True)))
    binding = Binding(model, optimizer)
    binding.add_scaler(scaler)
    return {name: torch.as_tensor(value).clone() for name, value in binding.values().items()}


@pytest.mark.parametrize("plan", PLANS)
def test_scale_and_count_are_those_of_the_semantics_on_every_trainer(plan: str) -> None:
    scaler = scaler_of()
    job, before = job_of(plan, scaler, check_replicas=True), None
    for finite, parts, numbers in zip(FINITE, batches(), NUMBERS, strict=True):
        before = values(job) if job.replicas else None
        job.step(parts)
        for replica in job.replicas:
            assert (float(replica.values["scaler.scale"]), int(replica.values["scaler.growth_tracker"])) == numbers
        after = values(job)
        assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == numbers
        if before is not None:
            kept = [name for name in after if not name.startswith("scaler.")]
            same = [torch.equal(before[name], after[name]) for name in kept]
            assert not any(same) if finite else all(same), dict(zip(kept, same, strict=True))


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("plan", PLANS)
def test_one_trainer_is_one_device_bit_for_bit(plan: str, make: Callable) -> None:
    """Step counts and the batch's loss scale among them, behind steps that are skipped too."""
    given = batches(trainers=1)
    expected = on_one_device(scaler_of(), given, make, clip=True)
    job = job_of(plan, scaler_of(), make, trainers=1, clip=True)
    for parts in given:
        job.step(parts)
    found = values(job)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("plan", PLANS)
def test_two_trainers_are_one_device(plan: str, clip: bool) -> None:
    expected = on_one_device(scaler_of(), batches(), ADAMW, clip)
    job = job_of(plan, scaler_of(), ADAMW, clip=clip)
    for parts in batches():
        job.step(parts)
    for name, value in values(job).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def trained(job: Loopback, given: list[list[tuple]]) -> dict[str, torch.Tensor]:
    for parts in given:
        job.step(parts)
    return values(job)


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


SMALLER = {torch.float16: 1e3, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e30}


@pytest.mark.parametrize("dtype", SMALLER, ids=str)
@pytest.mark.parametrize("bad", [None, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("inverse", [1.0, 0.125, 1 / 3])
def test_gradients_are_looked_at_and_unscaled_as_torch_does_it(dtype, bad, inverse) -> None:
    torch.manual_seed(3)
    grads = [torch.randn(3, 4, dtype=dtype), torch.full((5,), SMALLER[dtype], dtype=dtype), torch.ones(0, dtype=dtype)]
    if bad is not None:
        grads[1][3] = bad
    mine, found, number = [g.clone() for g in grads], torch.zeros(()), torch.tensor(inverse)
    expected = torch.zeros(())
    torch._amp_foreach_non_finite_check_and_unscale_(grads, expected, number)
    SCALING[torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default](mine, found, number)
    assert float(found) == float(expected) == float(bad is not None)
    for one, other in zip(mine, grads, strict=True):
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("scale", [1.0, 3.1, 65536.0, 3e38])
def test_the_scale_follows_torchs_rule(scale: float, count: int, found: float) -> None:
    """Also with factors that are no powers of two, and where the scale would become infinite."""
    options = (1.7, 0.3, 3)
    expected = torch.tensor(scale), torch.tensor(count, dtype=torch.int32)
    mine = expected[0].clone(), expected[1].clone()
    torch._amp_update_scale_(*expected, torch.tensor(found), *options)
    SCALING[torch.ops.aten._amp_update_scale_.default](*mine, torch.tensor(found), *options)
    assert [float(x) for x in mine] == [float(x) for x in expected]
    assert [x.dtype for x in mine] == [torch.float32, torch.int32]


@pytest.mark.parametrize("plan", ["all_reduce", "zero3", "parameter_server_partitioned", "a mix"])
def test_trainers_without_examples_skip_what_the_others_skip(plan: str) -> None:
    given = batches(trainers=3)
    for parts, idle in zip(given, (0, 1, 0, 1, 2), strict=True):
        parts[idle] = (parts[idle][0][:0], parts[idle][1][:0])
    scaler = scaler_of()
    job = job_of(plan, scaler, ADAMW, trainers=3, clip=True, check_replicas=True)
    check_close(trained(job, given), on_one_device(scaler_of(), given, ADAMW, clip=True))


def test_the_users_scaler_trains_on_alone() -> None:
    """Before it is written it is as it was; then its numbers are the job's, and more steps are as if all were one device's."""
    scaler, given = scaler_of(), batches()
    model = Net()
    optimizer, step = SGD(model.parameters()), scaled(scaler)
    job = syncwright.loopback(step, model, optimizer, plan="all_reduce", trainers=1)
    whole = [tuple(torch.cat(each) for each in zip(*parts, strict=True)) for parts in given]
    for batch in whole:
        job.step([batch])
    assert scaler.get_scale() == 8.0
    assert scaler._scale is None
    job.sync()
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (8.0, 1)
    for batch in whole:
        step(model, optimizer, *batch)
    expected = on_one_device(scaler_of(), given + given)
    binding = Binding(model, optimizer)
    binding.add_scaler(scaler)
    check_equal({name: torch.as_tensor(value) for name, value in binding.values().items()}, expected)


@pytest.mark.parametrize("before_the_first_step", [False, True])
def test_checkpoints_hold_the_scale(before_the_first_step: bool) -> None:
    """Saved under one plan, loaded under another, also where no step has shown yet that there is a scaler; and by torch."""
    given = batches()
    saved = None
    job = job_of("zero3", scaler_of())
    trained(job, given)
    saved = job.state_dict()
    expected = trained(job, given)
    assert saved["scaler"] == {
        **{"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 1}
    }
    other = job_of("a mix", scaler_of(init_scale=4.0))
    if not before_the_first_step:
        other.step(given[0])
    other.load_state_dict(saved)
    assert other.state_dict()["scaler"] == saved["scaler"]
    check_close(trained(other, given), expected)
    plain = scaler_of(init_scale=2.0)
    plain.load_state_dict(saved["scaler"])
    assert plain.state_dict() == saved["scaler"]


def test_a_scaler_that_is_disabled_changes_nothing() -> None:
    def plain(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    texts = []
    for step in (plain, scaled(scaler_of(enabled=False))):
        model = Net()
        texts.append(to_text(syncwright.capture(step, model, SGD(model.parameters()), *batches()[0][0])))
    assert texts[0] == texts[1]


class Loop:
    """A user's own training loop, which keeps what it needs."""

    def __init__(self, scaler) -> None:
        self.scaler = scaler

    def step(self, model, optimizer, x, y):
        return scaled(self.scaler)(model, optimizer, x, y)


@pytest.mark.parametrize("way", ["argument", "attribute"])
def test_a_scaler_comes_from_where_the_step_takes_it(way: str) -> None:
    scaler, model = scaler_of(), Net()

    def step(model, optimizer, x, y, scaler):
        return scaled(scaler)(model, optimizer, x, y)

    chosen, more = (step, (scaler,)) if way == "argument" else (Loop(scaler).step, ())
    job = syncwright.loopback(chosen, model, SGD(model.parameters()), trainers=2)
    for parts in batches():
        job.step([(*part, *more) for part in parts])
    assert job.state_dict()["scaler"] == {**scaler_of().state_dict(), "_growth_tracker": 1}


def test_a_step_is_captured_once_and_again_where_a_factor_is_set() -> None:
    scaler = scaler_of()
    job, given = job_of("a mix", scaler), batches((1, 1, 1, 1))
    job.step(given[0])
    first = job.session.programs().latest
    job.step(given[1])
    assert job.session.programs().latest is first
    scaler.set_growth_interval(4)
    scaler.set_growth_factor(3.0)
    job.step(given[2])
    assert job.session.programs().latest is not first
    job.step(given[3])
    job.sync()
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (24.0, 0)


def test_a_scaler_that_the_first_step_did_not_use_is_refused() -> None:
    scaler, model = scaler_of(), Net()

    def step(model, optimizer, x, y, use: bool):
        chosen = scaler if use else scaler_of(enabled=False)
        return scaled(chosen)(model, optimizer, x, y)

    job = syncwright.loopback(step, model, SGD(model.parameters()))
    (part,) = batches(trainers=1)[0]
    job.step([(*part, False)])
    with pytest.raises(CaptureError, match="by 1 GradScalers, the first one by 0"):
        job.step([(*part, True)])


@pytest.mark.parametrize("plan", ["all_reduce", "zero1", "a mix"])
def test_two_optimizers_skip_each_for_itself_and_share_the_scale(plan: str) -> None:
    """As torch does it: an infinite gradient of one does not keep the other from its step."""

    def step(model, optimizers, x, y, z):
        for each in optimizers:
            each.zero_grad()
        loss = ((model(x) - y) ** 2).mean() + model.extra.sum() * z.mean()
        scaler.scale(loss).backward()
        for each in optimizers:
            scaler.step(each)
        scaler.update()
        return loss

    def make():
        model = Net()
        model.extra = nn.Parameter(torch.ones(3))
        rest = [p for name, p in model.named_parameters() if name != "extra"]
        return model, (ADAMW(rest), SGD([model.extra]))

    given = [
        [(*parts[0], torch.full((2,), z))]
        for parts, z in zip(batches((1, 1, 1), 1), (1.0, torch.inf, 1.0), strict=True)
    ]
    scaler, (model, optimizers) = scaler_of(), make()
    kept = []
    for parts in given:
        step(model, optimizers, *parts[0])
        kept.append(copy.deepcopy(dict(model.state_dict())))
    assert torch.equal(kept[1]["extra"], kept[0]["extra"])
    assert not torch.equal(kept[1]["first.weight"], kept[0]["first.weight"])
    expected = {**kept[-1], "scale": torch.tensor(scaler.get_scale())}
    scaler, (model, optimizers) = scaler_of(), make()
    rules, servers = PLANS[plan]
    job = syncwright.loopback(step, model, optimizers, plan=rules, trainers=1, servers=servers)
    trained(job, given)
    assert scaler.get_scale() == 4.0
    check_equal({**dict(model.state_dict()), "scale": torch.tensor(scaler.get_scale())}, expected)


def test_gradients_that_overflow_on_their_way_are_found() -> None:
    """Finite on every trainer, and infinite as the halves that travel."""
    scaler, model = scaler_of(init_scale=2.0**20), Net()
    rules = Rules(default=AllReduce(compress=Cast("float16")))
    job = syncwright.loopback(scaled(scaler), model, SGD(model.parameters()), plan=rules, trainers=2)
    before = copy.deepcopy(dict(model.state_dict()))
    after = trained(job, batches((1,)))
    assert scaler.get_scale() == 2.0**19
    check_equal({name: after[name] for name in before}, before)


@pytest.mark.parametrize("by", [ErrorFeedback(Cast("float16")), PowerSGD(1)], ids=["error feedback", "PowerSGD"])
def test_what_was_not_sent_stays_when_a_step_is_skipped(by) -> None:
    scaler, model = scaler_of(), Net()
    job = syncwright.loopback(
        *(scaled(scaler), model, SGD(model.parameters())), plan=Rules(default=AllReduce(compress=by)), trainers=2
    )
    kept = []
    for parts, numbers in zip(batches(), NUMBERS, strict=True):
        job.step(parts)
        held = job.replicas[1].values
        kept.append({n: v.clone() for n, v in held.items() if n.endswith((".residual", ".factor"))})
        assert (float(held["scaler.scale"]), int(held["scaler.growth_tracker"])) == numbers
    assert kept[0]
    check_equal(kept[3], kept[2])
    assert not any(torch.equal(kept[4][name], kept[3][name]) for name in kept[4])


def test_clipping_by_each_trainers_own_norm_sees_the_unscaled_gradient() -> None:
    """A scale that is a power of two changes no bit; a step with an infinite gradient on one trainer is skipped on both."""
    rules = Rules(default=AllReduce(), clip="per_trainer")
    found = []
    for scaler in (scaler_of(), scaler_of(enabled=False)):
        model = Net()
        job = syncwright.loopback(scaled(scaler, clip=True), model, SGD(model.parameters()), plan=rules, trainers=2)
        if scaler.is_enabled():
            trained(job, batches((0,)))
        trained(job, batches((1, 1, 1)))
        found.append(dict(model.state_dict()))
    check_equal(*found)


def compiled_step(passes, compiled: bool, clip: bool, width: int = 7) -> dict[str, object]:
    """What a lowered step of one trainer leaves behind FINITE steps, node by node or compiled."""
    torch.manual_seed(0)
    model, given = Net(width), batches(trainers=1)
    optimizer = ADAMW(model.parameters())
    binding = Binding(model, optimizer)
    captured = capture_step(scaled(scaler_of(), clip), binding, optimizer, given[0][0])
    program = lower(captured.program, make_plan("all_reduce", captured.program, 1, 0), passes=passes).trainer["step"]
    executor = CompiledExecutor(program) if compiled else Executor(program)
    if isinstance(executor, CompiledExecutor):
        assert any(isinstance(item, Compiled) for item in executor._items)
        assert {"flat.0", "flat.0.step", "scaler.scale"} <= set(executor.overwritten)
    known = {name: torch.as_tensor(value).clone() for name, value in binding.values().items()}
    joined = flat_parts(program)
    for name, parts in joined.items():
        flat = program.variables[name]
        known[name] = laid_flat(flat, parts, known) if flat.shape else equal(parts, known)
    for parts in given:
        inputs = dict(zip(("batch.0", "batch.1"), parts[0], strict=True))
        running = executor.run({**known, **binding.hyper_values(), **captured.constants, **inputs}, NO_PORT)
        with pytest.raises(StopIteration) as stop:
            next(running)
        known.update({name: value for name, value in stop.value.value.items() if name in known})
    return {**known, **apart({name: known[name] for name in joined}, joined)}


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_flat_updates_skip_bit_for_bit(clip: bool) -> None:
    """Joined to one update, also where a norm reads the unscaled gradients."""
    plain, flat = (compiled_step(passes, False, clip) for passes in (PIPELINE, COMPILED))
    assert "flat.0.exp_avg" in flat
    for name, value in plain.items():
        assert torch.equal(flat[name], value), name
    assert (float(flat["scaler.scale"]), int(flat["scaler.growth_tracker"])) == NUMBERS[-1]


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
def test_a_compiled_step_skips_what_an_interpreted_one_skips() -> None:
    expected, found = compiled_step(PIPELINE, False, True, 999), compiled_step(COMPILED, True, True, 999)
    assert (float(found["scaler.scale"]), int(found["scaler.growth_tracker"])) == NUMBERS[-1]
    assert float(found["first.weight.step"]) == 4
    check_close(found, expected)


def test_servers_join_small_variables_also_where_a_norm_reads_unscaled_gradients() -> None:
    job = job_of("parameter_server", scaler_of(), ADAMW, clip=True)
    job.step(batches()[0])
    assert job.job is not None
    assert "second.bias and 3 more" in job.job.owners


class Tables(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(6, 3, sparse=sparse)
        self.top = nn.Linear(3, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.table(ids)).squeeze(1)


TABLES = {
    "SGD": (True, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    "Adam": (False, lambda m: torch.optim.Adam(m.parameters(), lr=0.1)),
    "SparseAdam": (
        True,
        lambda m: (torch.optim.SparseAdam(m.table.parameters(), lr=0.1), torch.optim.SGD(m.top.parameters(), lr=0.1)),
    ),
}
ROWS: dict[str, tuple[object, int]] = {
    "all_reduce": ("all_reduce", 0),
    "all_gather": (Rules.of(AllReduce(), {"table.weight": AllGather()}), 0),
    "parallax": ("parallax", 2),
    "parameter_server_partitioned": ("parameter_server_partitioned", 2),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("plan", ROWS)
def test_rows_of_tables_are_looked_at_and_skipped(plan: str, kind: str) -> None:
    """The rows that a batch touches, of gathered and of served tables, against one device with the same step."""

    def step(model, optimizer, ids, y):
        every = optimizer if isinstance(optimizer, tuple) else (optimizer,)
        for each in every:
            each.zero_grad()
        loss = ((model(ids) - y) ** 2).mean()
        scaler.scale(loss).backward()
        for each in every:
            scaler.step(each)
        scaler.update()
        return loss

    generator = torch.Generator().manual_seed(4)
    given = []
    for finite in FINITE:
        parts = [
            (torch.randint(0, 6, (3,), generator=generator), torch.randn(3, generator=generator)) for _ in range(2)
        ]
        if not finite:
            parts[1][1][0] = torch.inf
        given.append(parts)
    sparse, make = TABLES[kind]
    scaler, model = scaler_of(), Tables(sparse)
    optimizer = make(model)
    for parts in given:
        step(model, optimizer, *(torch.cat(each) for each in zip(*parts, strict=True)))
    expected, numbers = dict(model.state_dict()), (scaler.get_scale(), scaler.state_dict()["_growth_tracker"])
    scaler, model = scaler_of(), Tables(sparse)
    rules, servers = ROWS[plan]
    job = syncwright.loopback(step, model, make(model), plan=rules, trainers=2, servers=servers)
    trained(job, given)
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == numbers == NUMBERS[-1]
    check_close(dict(model.state_dict()), expected)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_tables_of_any_ids_skip_with_the_others(clip: bool) -> None:
    """Rows on two servers, of which one has none of a batch; the head is all-reduced."""
    torch.manual_seed(0)
    scaler, model = scaler_of(), nn.Sequential(HashEmbedding(3, capacity=64, seed=1), nn.Linear(3, 1))
    job = syncwright.loopback(
        *(scaled(scaler, clip), model, torch.optim.SGD(model.parameters(), lr=0.1)),
        plan="parallax",
        trainers=2,
        servers=2,
    )
    before: list[dict] = []
    for finite, numbers in zip(FINITE, NUMBERS, strict=True):
        y = torch.ones(2, 1, 1)
        y[1] = 1.0 if finite else torch.inf
        job.step([(torch.tensor([3]), y[0]), (torch.tensor([3]), y[1])])
        found = trained(job, [])
        assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == numbers
        kept = {name: found[name] for name in ("0.weight", "1.weight")}
        same = [torch.equal(kept[name], value) for each in before[-1:] for name, value in each.items()]
        assert not any(same) if finite else all(same)
        before.append(kept)


@pytest.mark.parametrize(
    ("rules", "servers", "said"),
    [
        (
            "default: {parameter_server: {mode: async}}",
            1,
            "'first.weight' is updated asynchronously, but the step scales",
        ),
        (
            "default: all_reduce\nvariables:\n  second.*: local",
            0,
            "'second.weight' is local and 'first.weight' is shared, but the step scales its loss by 'scaler.scale'",
        ),
    ],
    ids=["async", "local"],
)
def test_plans_under_which_trainers_would_scale_differently_are_refused(rules: str, servers: int, said: str) -> None:
    model = Net()
    job = syncwright.loopback(
        *(scaled(scaler_of()), model, SGD(model.parameters())),
        plan=Rules.from_yaml(rules),
        trainers=2,
        servers=servers,
    )
    with pytest.raises(LoweringError, match=said):
        job.step(batches()[0])


def test_trainers_that_are_all_alone_scale_each_for_itself() -> None:
    model = Net()
    job = syncwright.loopback(scaled(scaler_of()), model, SGD(model.parameters()), plan="independent", trainers=2)
    for parts in batches():
        job.step(parts)
    numbers = [(float(r.values["scaler.scale"]), int(r.values["scaler.growth_tracker"])) for r in job.replicas]
    assert numbers == [(16.0, 2), NUMBERS[-1]]


def test_what_may_hide_an_infinite_gradient_from_the_others_is_refused() -> None:
    scaler, model = scaler_of(), Net()

    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        scaler.scale(((model(x) - y) ** 2).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return model(x).mean()

    rules = Rules(default=AllReduce(), clip="per_trainer")
    job = syncwright.loopback(step, model, SGD(model.parameters()), plan=rules, trainers=2)
    with pytest.raises(LoweringError, match=r"may make a gradient of '\w+\.\w+' finite"):
        job.step(batches()[0])
