"""The numbers of SEMANTICS section 4 that depend on who comes first: schedules replayed in loopback."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright.capture.state import Binding
from syncwright.errors import LoweringError, PlanError
from syncwright.plan import Even
from syncwright.runtime.executor import Blocked
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.merging import Arrivals, together
from syncwright.runtime.messages import Push
from syncwright.runtime.replay import Event, Replay, ScheduleError, events
from syncwright.runtime.ticking import Ticking

BOTH_PULL = "0 pulls w \n 1 pulls w"


class Scalar(nn.Module):
    """One weight, w: the gradient of the mean of w * x is the mean of x, whatever w is."""

    def __init__(self, w: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
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


def start(sync: ParameterServer, trainers: int = 2, w: float = 1.0, **settings: float) -> Loopback:
    model = Scalar(w)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 1.0, **settings})
    return syncwright.loopback(mean_step, model, optimizer, plan=Rules(sync), trainers=trainers, servers=1)


def gives(*gradients: float) -> list[tuple]:
    """Batches whose gradients are these."""
    return [(torch.tensor([gradient], dtype=torch.float64),) for gradient in gradients]


def value(job: Loopback) -> float:
    job.sync()
    return job.model.w.item()


@pytest.mark.parametrize(("order", "expected"), [("01", 0.922), ("10", 0.904)])
def test_each_push_is_applied_on_arrival(order: str, expected: float) -> None:
    job = start(ParameterServer(mode="async"), lr=0.1, momentum=0.9)
    Replay(job, [gives(0.2), gives(0.4)]).play(BOTH_PULL).play([Event(int(k), "pushes", "w") for k in order])
    assert value(job) == pytest.approx(expected, abs=1e-15)


def test_in_step_the_mean_is_applied() -> None:
    job = start(ParameterServer(), lr=0.1, momentum=0.9)
    Replay(job, [gives(0.2), gives(0.4)]).drain()
    assert value(job) == pytest.approx(0.970, abs=1e-15)


def test_delay_compensation() -> None:
    """lr 0.1, w=1, lambda=1: 0.2 gives 0.98; 0.5 from who pulled at 1: g' = 0.495, w = 0.9305."""
    job = start(ParameterServer(mode="async", compensate=1.0), lr=0.1)
    replay = Replay(job, [gives(0.2), gives(0.5)]).play(BOTH_PULL).play("0 pushes w")
    assert job.servers[0].held("w").item() == pytest.approx(0.98, abs=1e-15)
    replay.play("1 pushes w")
    assert value(job) == pytest.approx(0.9305, abs=1e-15)


def test_state_counts_pushes() -> None:
    """Adam's step is how often it has been called, which is once for every push."""
    model = Scalar()
    optimizer = torch.optim.Adam(model.parameters())
    plan = Rules(ParameterServer(mode="async"))
    job = syncwright.loopback(mean_step, model, optimizer, plan=plan, trainers=3, servers=1)
    Replay(job, [gives(1.0, 2.0), gives(1.0), gives(3.0)]).drain()
    job.sync()
    assert optimizer.state[model.w]["step"].item() == 4.0


@pytest.mark.parametrize(
    ("take", "pushed", "expected"),
    [(3, [1.0, 3.0, 5.0], [0.0, 0.0, 3.0]), (2, [4.0, 8.0], [0.0, 6.0]), (1, [4.0, 8.0], [4.0, 12.0])],
)
def test_take_applies_means_of_so_many(take: int, pushed: Sequence[float], expected: Sequence[float]) -> None:
    """push 1, 3, 5 with take=3 gives 3 and empties; 4, then 8, with take=2 gives 6, and nothing after the 4."""
    job = start(ParameterServer(mode="async", take=take), w=0.0)
    replay = Replay(job, [gives(*pushed[::2]), gives(*pushed[1::2])])
    for number, gradient in enumerate(expected):
        rank = number % 2
        replay.play([Event(rank, "pulls", "w"), Event(rank, "pushes", "w")])
        assert -job.servers[0].held("w").item() == gradient
    assert not job.servers[0].pending


def test_means_are_weighted_and_halves_are_added_wide() -> None:
    channel = start_channel(take=2)
    arrivals = Arrivals(channel)
    given = [(1.0, torch.tensor([40000.0], dtype=torch.float16)), (3.0, torch.tensor([40000.0], dtype=torch.float16))]
    assert together(channel, given).item() == 40000.0
    assert together(channel, [(1.0, torch.tensor([4.0])), (3.0, torch.tensor([8.0]))]).item() == 7.0
    assert arrivals.take(0, Push("w.grad", 0, 0.0), torch.zeros(1)) is None, (
        "a part without examples counts for nothing"
    )
    assert not arrivals.complete()


def start_channel(take: int):
    job = start(ParameterServer(mode="async", take=take))
    Replay(job, [gives(1.0), []])
    return job.job.channels["w.grad"]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_trainer_returns_from_so_many_steps_more(staleness: int) -> None:
    """While its peer pauses in step 2; one more push is with the server. Then the peer goes on, and so does it."""
    job = start(ParameterServer(mode="async", staleness=staleness), w=0.0)
    replay = Replay(job, [gives(*[1.0] * 9), gives(*[1.0] * 9)])
    for _ in range(2):
        for act in ("pulls w", "pushes w", "pulls w", "ticks"):
            for rank in (0, 1):
                play_next(replay, rank, act)
    assert [len(returned) for returned in replay.returned] == [2, 2]
    while any(event.trainer == 0 for event, _ in replay.next):
        replay.play([next(event for event, _ in replay.next if event.trainer == 0)])
    assert [len(returned) for returned in replay.returned] == [2 + staleness, 2]
    assert -job.servers[0].held("w").item() == 4 + staleness + 1
    assert replay.waits[0].channel == "clocks"
    replay.drain()
    assert [len(returned) for returned in replay.returned] == [9, 9]
    assert value(job) == -18.0


def play_next(replay: Replay, rank: int, act: str) -> None:
    """Lets it happen if it is what the trainer does next: values are asked for ahead only once."""
    event = events(f"{rank} {act}")[0]
    if event in [possible for possible, _ in replay.next]:
        replay.play([event])


def test_a_trainer_that_leaves_holds_nobody_back() -> None:
    job = start(ParameterServer(mode="async", staleness=0), w=0.0)
    replay = Replay(job, [gives(1.0, 1.0, 1.0), gives(1.0)]).drain()
    assert [len(returned) for returned in replay.returned] == [1, 1]
    job.replicas[1].client.leave(1)
    assert [len(returned) for returned in replay.drain().returned] == [3, 1]
    assert value(job) == -4.0


def test_staged_steps_read_values_one_step_old() -> None:
    """v0, v0, v1, v2: the loss is the value."""
    job = start(ParameterServer(staged=True))
    replay = Replay(job, [gives(*[1.0] * 5), gives(*[1.0] * 5)]).drain()
    for returned in replay.returned:
        assert [loss.item() for loss in returned] == [1.0, 1.0, 0.0, -1.0, -2.0]
    assert value(job) == -4.0


def test_gradients_of_a_trainer_are_merged_while_one_is_under_way() -> None:
    """merge=2: the first goes at once; the next two are held back and go as their mean; the fourth waits."""
    job = start(ParameterServer(mode="async", merge=2), w=0.0)
    replay = Replay(job, [gives(1.0, 2.0, 4.0, 8.0), []]).play("0 pulls w")
    assert len(replay.returned[0]) == 3, "steps go on with the value that came last"
    assert replay.waits[0] == Blocked("push_default", "w.grad")
    replay.play("0 pushes w")
    assert -job.servers[0].held("w").item() == 1.0
    assert len(replay.returned[0]) == 4, "what was held back is under way: there is room for the fourth"
    replay.play("0 pulls w \n 0 pushes w")
    assert -job.servers[0].held("w").item() == 1.0 + (2.0 + 4.0) / 2
    replay.drain()
    assert value(job) == -(1.0 + 3.0 + 8.0)


def test_values_and_gradients_travel_in_the_dtype_that_the_plan_says() -> None:
    """1 + 2^-12 is 1 in float16: the gradient that is applied, and the value that a step reads."""
    fine = 1 + 2.0**-12
    job = start(ParameterServer(push="float16", pull="float16"), w=fine)
    replay = Replay(job, [gives(fine), gives(fine)]).drain()
    assert replay.returned[0][0].item() == fine, "the loss is 1.0 (the value that was pulled) times x"
    assert value(job) == fine - 1.0
    assert job.job.channels["w.grad"].sent.dtype is torch.float16


def test_the_schedule_travels_with_the_push_it_belongs_to() -> None:
    """StepLR(2, 0.1) from 1, in step: 1, 1, 0.1, 0.1; asynchronous: of each trainer's own steps."""
    job = start(ParameterServer(), w=0.0)
    schedule, applied, before = StepLR(job.optimizer, 2, 0.1), [], 0.0
    for _ in range(4):
        job.step([gives(1.0)[0]] * 2)
        schedule.step()
        now = value(job)
        applied.append(round(before - now, 9))
        before = now
    assert applied == [1.0, 1.0, 0.1, 0.1]


CLIP = "a gradient clipped by each trainer, or all together"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a * x[:, :1] + self.b * x[:, 1:]


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@pytest.mark.parametrize("sync", [ParameterServer(), ParameterServer(partition=Even(1)), AllReduce()], ids=repr)
@pytest.mark.parametrize(("clip", "expected"), [("global", 1.0), ("per_trainer", 0.5)])
def test_clip(sync: object, clip: str, expected: float) -> None:
    """Gradients 6 and 0 on two trainers, max_norm 1: global gives 1.0, per trainer 0.5."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = Rules(sync, clip=clip)
    job = syncwright.loopback(clipped_step, model, optimizer, plan=rules, trainers=2, servers=1)
    job.step([(torch.tensor([[6.0, 0.0]]),), (torch.zeros(1, 2),)])
    job.sync()
    assert -model.a.item() == pytest.approx(expected, abs=1e-6)


def test_asynchronous_updates_have_no_global_norm() -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rules = Rules(ParameterServer(mode="async"))
    job = syncwright.loopback(clipped_step, model, optimizer, plan=rules, trainers=2, servers=1)
    with pytest.raises(LoweringError, match=r"'a' is updated asynchronously.*Say clip: per_trainer"):
        job.step([(torch.ones(1, 2),)] * 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ParameterServer(compensate=0.1),
        lambda: ParameterServer(staleness=1),
        lambda: ParameterServer(take=2),
        lambda: ParameterServer(merge=2),
        lambda: ParameterServer(clock="global_update"),
        lambda: ParameterServer(mode="async", staged=True),
        lambda: ParameterServer(staged=True, replicated=True),
        lambda: ParameterServer(mode="async", merge=2, replicated=True),
        lambda: ParameterServer(mode="async", staleness=1, merge=2),
        lambda: ParameterServer(mode="async", compensate=1.0, take=2),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(make: Callable[[], ParameterServer]) -> None:
    with pytest.raises(PlanError, match=r"^ParameterServer: found .*, but .*\. (Say|Leave) "):
        make()


def test_each_trainer_returns_its_own_loss_where_none_keep_step() -> None:
    job = start(ParameterServer(mode="async"))
    replay = Replay(job, [gives(2.0), gives(4.0)]).play(BOTH_PULL)
    assert [returned[0].item() for returned in replay.returned] == [2.0, 4.0]


def test_an_event_that_cannot_happen_is_told() -> None:
    replay = Replay(start(ParameterServer(mode="async")), [gives(1.0), gives(1.0)])
    with pytest.raises(ScheduleError, match=r"found the event '1 pushes w', expected one of: 0 pulls w, 1 pulls w"):
        replay.play("1 pushes w")
    with pytest.raises(ScheduleError, match=r"line 2: found 'w pulls 1', expected a trainer's number"):
        replay.play("0 pulls w\nw pulls 1")


def scheduled(sync: ParameterServer, trainers: int = 2, **settings: float) -> tuple[Loopback, StepLR]:
    """Gradients are 1, lr begins with 1 and is a tenth of it after every two ticks."""
    model = Scalar(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)  # type: ignore[arg-type]
    scheduler = StepLR(optimizer, 2, 0.1)
    job = syncwright.loopback(
        mean_step, model, optimizer, plan=Rules(sync), trainers=trainers, servers=1, scheduler=scheduler
    )
    return job, scheduler


def turns(*trainers: int) -> str:
    return "\n".join(f"{k} pulls w\n{k} pushes w" for k in trainers)


TICKED = ParameterServer(mode="async", clock="global_update")


@pytest.mark.parametrize("order", [(0, 1, 0, 1, 0, 1, 0, 1, 0), (0, 0, 0, 0, 0, 1, 1, 1, 1)])
def test_a_server_ticks_the_scheduler_once_for_as_many_pushes_as_there_are_trainers(order: tuple[int, ...]) -> None:
    """Whoever pushes: lr is 1 for four pushes (two ticks), 0.1 for four, then 0.01."""
    job, scheduler = scheduled(TICKED)
    replay = Replay(job, [gives(*[1.0] * order.count(k)) for k in range(2)])
    seen = []
    for trainer in order:
        replay.play(turns(trainer))
        seen.append(-job.servers[0].held("w").item())
    taken = [round(after - before, 12) for before, after in zip([0.0, *seen], seen, strict=False)]
    assert taken == [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01]
    assert (scheduler.last_epoch, job.optimizer.param_groups[0]["lr"]) == (0, 1.0)


def test_the_trainers_own_scheduler_is_another() -> None:
    """What a trainer sets travels under the other clock only."""
    for clock, expected in (("global_update", -2.0), ("trainer_step", -1.1)):
        job, scheduler = scheduled(ParameterServer(mode="async", clock=clock))  # type: ignore[arg-type]
        replay = Replay(job, [gives(1.0, 1.0), []])
        for _ in range(2):
            scheduler.step()
        replay.play("0 pulls w\n0 pushes w")
        replay.play("0 pulls w\n0 pushes w")
        assert value(job) == pytest.approx(expected), clock


def test_updates_of_several_pushes_tick_by_pushes() -> None:
    """take 4 on two trainers: an update is two ticks, so every update has a tenth of the lr of the one before."""
    job, _ = scheduled(ParameterServer(mode="async", take=4, clock="global_update"))
    Replay(job, [gives(*[1.0] * 4), gives(*[1.0] * 4)]).drain()
    assert value(job) == pytest.approx(-1.1)


def test_pieces_tick_by_themselves_and_other_variables_as_trainers_say() -> None:
    model = nn.Linear(4, 2, bias=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, 1, 0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        return loss

    rules = Rules.of(
        ParameterServer(mode="async"), {"weight": ParameterServer("async", Even(2), clock="global_update")}
    )
    job = syncwright.loopback(step, model, optimizer, plan=rules, trainers=1, servers=2, scheduler=scheduler)
    for _ in range(3):
        job.step([(torch.ones(1, 4, dtype=torch.float64),)])
    job.sync()
    assert torch.allclose(model.weight, torch.full((2, 4), -1.11, dtype=torch.float64))
    assert torch.allclose(model.bias, torch.full((2,), -3.0, dtype=torch.float64))


def test_a_trainer_that_leaves_is_not_waited_for_by_the_clock() -> None:
    job, _ = scheduled(TICKED)
    replay = Replay(job, [gives(*[1.0] * 3), []])
    job.replicas[1].client.leave(0)
    replay.drain()
    assert value(job) == pytest.approx(-2.1)


def test_schedulers_that_servers_cannot_tick_are_refused() -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def started(scheduler: object) -> None:
        settings = {"plan": Rules(TICKED), "trainers": 2, "servers": 1, "scheduler": scheduler}
        syncwright.loopback(mean_step, model, optimizer, **settings).open(gives(1.0)[0])  # type: ignore[arg-type]

    with pytest.raises(PlanError, match=r"'w': found clock: global_update and no scheduler; .* Give it to distribute"):
        started(None)
    with pytest.raises(PlanError, match=r"scheduler: found a ReduceLROnPlateau, whose step\(\) wants metrics, which"):
        started(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(PlanError, match=r"scheduler: found a int, expected one of torch.optim.lr_scheduler"):
        started(3)
    other = torch.optim.SGD(Scalar().parameters(), lr=1.0)
    with pytest.raises(PlanError, match=r"scheduler: found a StepLR of an optimizer that is not one of those given"):
        started(StepLR(other, 2))


@pytest.mark.parametrize("name", ["SequentialLR", "OneCycleLR", "LambdaLR", "two"])
def test_a_ticked_copy_goes_as_the_scheduler_itself(name: str) -> None:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedulers = torch.optim.lr_scheduler
    made: object = {
        "SequentialLR": lambda: schedulers.SequentialLR(
            optimizer, [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)], [2]
        ),
        "OneCycleLR": lambda: schedulers.OneCycleLR(optimizer, 1.0, total_steps=9),
        "LambdaLR": lambda: schedulers.LambdaLR(optimizer, lambda count: 1 / (1 + count)),
        "two": lambda: [StepLR(optimizer, 2, 0.1), schedulers.ExponentialLR(optimizer, 0.9)],
    }[name]()
    binding = Binding(model, optimizer)
    ticking = Ticking.of(made, binding)
    copies = [ticking.copied(), ticking.copied()]
    for _ in range(7):
        optimizer.step()
        for each in made if isinstance(made, list) else [made]:
            each.step()  # type: ignore[attr-defined]
        for each in copies:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                each.applied(3, 3)
            assert each.values() == binding.hyper_values()
    assert ticking.values() != binding.hyper_values()


def test_a_step_with_copies_returns_when_they_are_refreshed() -> None:
    """Under `replicated` a step ends with the values of its own update; without it, as soon as its loss is there."""
    losses_meet = "0 pushes loss\n1 pushes loss\n0 pushes w\n0 pulls w\n0 pulls loss"
    for replicated, returned in ((False, 1), (True, 0)):
        job = start(ParameterServer(replicated=replicated), lr=0.5)
        replay = Replay(job, [gives(1.0, 1.0), gives(3.0, 1.0)]).play(f"{BOTH_PULL}\n{losses_meet}")
        assert len(replay.returned[0]) == returned
        replay.play("1 pushes w")
        assert len(replay.returned[0]) == 1
        replay.drain()
        assert [loss.item() for loss in replay.returned[0]] == [2.0, 0.0]
        assert value(job) == -0.5


def test_copies_of_pieces_in_another_dtype_and_asynchronous() -> None:
    for sync in (
        ParameterServer(partition=Even(2), pull="bfloat16"),
        ParameterServer(mode="async", staleness=0),
    ):
        found = []
        for replicated in (False, True):
            torch.manual_seed(0)
            model = nn.Linear(3, 4)
            optimizer = torch.optim.Adam(model.parameters())
            rules = Rules(replace(sync, replicated=replicated))
            job = syncwright.loopback(mean_step, model, optimizer, plan=rules, trainers=2, servers=2)
            for seed in range(3):
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
                job.step([(x[:2],), (x[2:],)])
            job.sync()
            found.append(model.state_dict())
        assert all(torch.equal(v, found[1][name]) for name, v in found[0].items()), sync
