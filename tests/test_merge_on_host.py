"""Gradients that are merged on their host before one push: the numbers of the flat job, with one contribution for each host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_asynchronous import Scalar, gives, mean_step, value
from torch import nn
from torch.optim.lr_scheduler import StepLR

import syncwright
from syncwright import LocalSteps, ParameterServer, Rules
from syncwright.checking import check_plan
from syncwright.cluster import Cluster
from syncwright.errors import BatchError, ClusterError, PlanError
from syncwright.lower import communications, lower
from syncwright.plan import Even, Plan, check
from syncwright.planning import make_plan
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.loopback import Loopback
from syncwright.runtime.membership import membership
from syncwright.runtime.messages import Push
from syncwright.runtime.on_host import Sums
from syncwright.runtime.replay import Event, Replay
from syncwright.text import parse, to_text
from syncwright.verify import causes, verify_job

HOSTS = (2, 2)
ON_HOST = ParameterServer(merge_on_host=True)
ARRIVING = ParameterServer(mode="async", merge_on_host=True)


def start(sync: ParameterServer, hosts: Sequence[int] = HOSTS, w: float = 1.0, **settings: object) -> Loopback:
    model = Scalar(w)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 1.0, **settings})  # type: ignore[arg-type]
    plan, trainers = Rules(sync), sum(hosts)
    return syncwright.loopback(mean_step, model, optimizer, plan=plan, trainers=trainers, servers=1, hosts=hosts)


def parts(*gradients: Sequence[float]) -> list[tuple]:
    """For each trainer a batch: an example for each number."""
    return [(torch.tensor(each, dtype=torch.float64),) for each in gradients]


def pushed(job: Loopback) -> list[tuple[int, str, float, float]]:
    """Pushes of gradients under way: the trainer, the channel, the weight and the (first) number."""
    found = [(sender.rank, m.header, m.tensor) for sender, _, m in job.network.queue if isinstance(m.header, Push)]
    return [(rank, h.channel, h.weight, t.item()) for rank, h, t in found if h.channel.endswith(".grad")]  # type: ignore[union-attr]


# --- in step -------------------------------------------------------------------------------------------

RAGGED = parts([1.0, 3.0], [8.0], [4.0], [])
"""The mean over the 4 examples is 4."""


@pytest.mark.parametrize("sync", [ParameterServer(), ON_HOST], ids=["flat", "on host"])
def test_parts_of_all_sizes_weigh_as_many_examples(sync: ParameterServer) -> None:
    job = start(sync)
    job.step(RAGGED)
    assert value(job) == 1.0 - 4.0


def test_the_first_trainer_of_each_host_pushes_the_sum() -> None:
    """Shares of 1/4 each: 1/2 and 3/2 come to the server, where they are divided by weights of 4/4."""
    job = start(ON_HOST)
    replay = Replay(job, [gives(0.5), gives(1.5), gives(2.5), gives(3.5)])
    replay.play([Event(k, "pulls", "w") for k in range(4)])
    assert pushed(job) == [(0, "w.grad", 2.0, 0.5), (2, "w.grad", 2.0, 1.5)]
    replay.drain()
    assert value(job) == 1.0 - 2.0


def test_sums_are_sums() -> None:
    job = start(replace(ON_HOST, reduce="sum"))
    job.step(RAGGED)
    assert value(job) == 1.0 - (2.0 + 8.0 + 4.0)


def test_a_host_without_examples_counts_for_nothing() -> None:
    job = start(ON_HOST)
    job.step(parts([], [], [3.0], [5.0, 7.0]))
    assert value(job) == pytest.approx(1.0 - 5.0, abs=1e-15)
    with pytest.raises(BatchError, match="no examples"):
        job.step(parts([], [], [], []))


def test_who_leaves_early_is_not_waited_for() -> None:
    """Trainer 0, which pushed for its host, leaves after a step, then trainer 3, then trainer 1 and with it the host.

    The means are 2.5 of all, 3 of 1, 2, 3, 2.5 of 1 and 2, and 3 of trainer 2.
    """
    job, steps = start(ON_HOST), (1, 3, 4, 2)
    replay = Replay(job, [gives(*[k + 1.0] * count) for k, count in enumerate(steps)])
    for rank, done in ((0, 1), (3, 2), (1, 3)):
        assert [len(each) for each in replay.drain().returned] == [min(done, count) for count in steps]
        job.replicas[rank].client.leave(done)
    assert [len(each) for each in replay.drain().returned] == list(steps)
    assert job.servers[0].held("w").item() == pytest.approx(1.0 - 2.5 - 3.0 - 2.5 - 3.0, abs=1e-14)  # type: ignore[attr-defined]
    assert not job.servers[0].pending
    assert not job.servers[0].refused


def layers() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.optim.Adam(model.parameters(), 0.1)


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def one_device(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, optimizer = layers()
    return [clipped_step(model, optimizer, *batch(k)).item() for k in range(steps)], model.state_dict()


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 3, generator=generator).double(), torch.randn(9, 2, generator=generator).double()


@pytest.mark.parametrize("more", [{}, {"copy_on_host": True}], ids=["merged", "and copied"])
def test_verify_finds_one_device(more: dict) -> None:
    model, optimizer = layers()
    plan = make_plan(Rules(replace(ON_HOST, **more)), captured(), 4, 2, HOSTS)
    first = FirstStep(clipped_step, model, optimizer, {}, plan, None, batch(0))
    found = check_plan(first, captured(), plan, steps=3)
    assert found.differences
    assert not found.beyond


@pytest.mark.parametrize("hosts", [(2, 2), (3, 1), (4,)], ids=str)
@pytest.mark.parametrize(
    "sync",
    [
        ON_HOST,
        replace(ON_HOST, partition=Even(2), bucket_mb=0.0),
        replace(ON_HOST, replicated=True),
    ],
    ids=["joined", "in pieces", "replicated"],
)
def test_equal_to_one_device(sync: ParameterServer, hosts: tuple[int, ...]) -> None:
    """Five steps with Adam and a global clip, parts of 3, 0, 2 and 4 examples."""
    plan = Rules(sync, uncuttable="keep_whole")
    job = syncwright.loopback(clipped_step, *layers(), plan=plan, trainers=4, servers=2, hosts=hosts)
    sizes = (3, 0, 2, 4)
    losses = [float(job.step(list(zip(*(each.split(sizes) for each in batch(k)), strict=True)))) for k in range(5)]
    expected, state = one_device(5)
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, found in job.state_dict()["model"].items():  # type: ignore[union-attr]
        assert (found - state[name]).abs().max() <= 1e-12 * state[name].abs().max(), name


def test_what_travels_is_rounded_once_behind_the_sum() -> None:
    """Shares of 1/2 and 2**-10: bfloat16 holds each of them, but not their sum."""
    job = start(replace(ON_HOST, push="bfloat16"), hosts=(2,))
    job.step(parts([1.0], [2.0**-9]))
    assert value(job) == 0.5
    flat = start(ParameterServer(push="bfloat16"), hosts=(1, 1))
    flat.step(parts([1.0], [2.0**-9]))
    assert value(flat) == 0.5 - 2.0**-10


# --- as pushes arrive ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "expected"), [("02", 0.922), ("20", 0.904)])
def test_a_host_is_as_one_trainer(order: str, expected: float) -> None:
    """The means 0.2 and 0.4 of two hosts, applied as they arrive: the numbers of two trainers."""
    job = start(ARRIVING, lr=0.1, momentum=0.9)
    replay = Replay(job, [gives(0.1), gives(0.3), gives(0.3), gives(0.5)])
    replay.play([Event(k, "pulls", "w") for k in range(4)])
    replay.play([Event(int(k), "pushes", "w") for k in order])
    assert value(job) == pytest.approx(expected, abs=1e-15)


def test_a_host_pushes_the_mean_over_its_examples() -> None:
    """(1 + 1 + 1 + 5) / 4 = 2; the other host's trainer without examples counts for nothing, nor does an empty host."""
    job = start(ARRIVING, hosts=(2, 2, 2))
    job.step(parts([1.0, 1.0, 1.0], [5.0], [], [0.5], [], []))
    assert value(job) == 1.0 - 2.0 - 0.5


def test_several_pushes_of_hosts_are_applied_as_their_mean() -> None:
    """4 of three examples and 8 of one: 5."""
    job = start(replace(ARRIVING, take=2))
    job.step(parts([3.0, 4.0], [5.0], [8.0], []))
    assert value(job) == 1.0 - 5.0


def test_sums_that_arrive_are_sums() -> None:
    job = start(replace(ARRIVING, reduce="sum"))
    job.step(parts([1.0], [2.0], [4.0], [8.0]))
    assert value(job) == 1.0 - 15.0


def test_trainers_of_a_host_are_in_step_and_hosts_are_not() -> None:
    """Host 0 takes two steps while host 1 has taken none."""
    job = start(ARRIVING, w=0.0)
    replay = Replay(job, [gives(1.0, 1.0), gives(3.0, 3.0), gives(10.0), gives(10.0)])
    replay.play([Event(k, "pulls", "w") for k in (0, 1)]).play("0 pushes w")
    assert [len(each) for each in replay.returned] == [1, 1, 0, 0]
    replay.play([Event(k, "pulls", "w") for k in (0, 1)]).play("0 pushes w")
    assert [len(each) for each in replay.returned] == [2, 2, 0, 0]
    replay.play([Event(k, "pulls", "w") for k in (2, 3)]).play("2 pushes w")
    assert value(job) == -2.0 - 2.0 - 10.0


def test_a_schedule_ticks_once_for_a_push_of_each_host() -> None:
    """Rates 1, 1, 1/2, 1/2: of two hosts with two trainers each, two steps."""
    model = Scalar(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = Rules(replace(ARRIVING, clock="global_update"))
    scheduler = StepLR(optimizer, 1, 0.5)
    given = {"plan": plan, "trainers": 4, "servers": 1, "scheduler": scheduler, "hosts": HOSTS}
    job = syncwright.loopback(mean_step, model, optimizer, **given)  # type: ignore[arg-type]
    for _ in range(2):
        job.step(gives(1.0, 1.0, 1.0, 1.0))
    assert value(job) == -3.0


# --- what is refused, and what is agreed on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"staleness": 1}, "clocks count what each trainer has pushed, and one of a host pushes for the others"),
        ({"merge": 2}, "a push that is held back would hold back those of all trainers of its host"),
        ({"compensate": 0.1}, "the gradients of a host's trainers have no one value that was pulled"),
    ],
)
def test_settings_that_cannot_be_together(settings: dict, why: str) -> None:
    with pytest.raises(PlanError, match=re.escape(why)):
        replace(ARRIVING, **settings)


def test_of_exchanges_and_tables_it_is_refused() -> None:
    with pytest.raises(PlanError, match=r"merge_on_host: True, expected no settings but .* what travels in every step"):
        LocalSteps(2, over=ON_HOST)
    table = nn.Embedding(9, 2)
    job = syncwright.loopback(
        *(mean_step, table, torch.optim.SGD(table.parameters(), 0.1)), plan=Rules(ON_HOST), trainers=2, servers=1
    )
    with pytest.raises(
        PlanError, match=r"merge_on_host: True for a table .* as the trainers of a host look up other rows"
    ):
        job.step([(torch.arange(3),), (torch.arange(3),)])


def captured() -> syncwright.Program:
    return syncwright.capture(clipped_step, *layers(), *batch(0))


def test_a_plan_holds_its_hosts() -> None:
    program = captured()
    plan = make_plan(Rules(ON_HOST), program, 4, 2, HOSTS)
    assert plan.hosts == HOSTS
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert make_plan(plan, program, 4, 2, HOSTS) == make_plan(plan, program, 4, 2) == plan
    assert make_plan(Rules(ON_HOST), program, 4, 2).hosts == (4,)
    assert make_plan(Rules(ParameterServer()), program, 4, 2, HOSTS).hosts == ()
    with pytest.raises(PlanError, match="made for hosts with 2, 2 trainers, found 3, 1"):
        make_plan(plan, program, 4, 2, (3, 1))
    with pytest.raises(PlanError, match="nothing says which trainers share a host"):
        make_plan(Rules(ON_HOST), program, 4, 2, ())
    for hosts in ((), (2, 1)):
        with pytest.raises(
            PlanError, match=r"hosts: found \[.*\], expected .* 4 together, as '0.weight' is shared with merge_on_host"
        ):
            replace(plan, hosts=hosts)


def test_a_plan_is_checked_against_a_cluster() -> None:
    program = captured()
    plan = make_plan(Rules(ON_HOST), program, 4, 2, HOSTS)
    variables = list(program.variables.values())
    check(plan, variables, plan.digest, Cluster.of(4, 2, hosts=("a", "b")))
    with pytest.raises(ClusterError, match=r"found the trainers \[0, 1, 2, 3\] on them, expected hosts of 2, 2"):
        check(plan, variables, plan.digest, Cluster.of(4, 2))


def test_roles_compare_their_hosts() -> None:
    program = captured()
    jobs = [lower(program, make_plan(Rules(ON_HOST), program, 4, 2, hosts)) for hosts in ((2, 2), (3, 1), (4,))]
    assert len({job.digest for job in jobs}) == 3
    assert not any(job.survives_losses for job in jobs)


@pytest.mark.parametrize(("trainers", "hosts"), [(1, (1,)), (4, (1, 1, 1, 1))])
def test_hosts_of_one_trainer_have_nothing_to_merge(trainers: int, hosts: tuple[int, ...]) -> None:
    program = captured()
    found, flat = (
        lower(program, make_plan(Rules(sync), program, trainers, 2, hosts)) for sync in (ON_HOST, ParameterServer())
    )
    sent = [[(n.target, n.args[1]) for n in communications(job.trainer["step"])] for job in (found, flat)]
    assert sent[0] == sent[1]
    assert found.survives_losses


def test_a_sum_that_nobody_waits_for_is_no_job() -> None:
    program = captured()
    job = lower(program, make_plan(Rules(ON_HOST), program, 4, 2, HOSTS))
    text = to_text(job.trainer["step"])
    wrong = text.replace("syncwright.wait_on_host.default", "syncwright.wait.default", 1)
    assert wrong != text
    with pytest.raises(causes.BadWait):
        verify_job(replace(job, trainer={**job.trainer, "step": parse(wrong)}))


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
LAUNCHER = {
    "SYNCWRIGHT_ROLE": "server",
    "SYNCWRIGHT_RANK": "0",
    "SYNCWRIGHT_TRAINERS": "4",
    "SYNCWRIGHT_SERVERS": "1",
    "SYNCWRIGHT_STORE": "127.0.0.1:4000",
}


@pytest.mark.parametrize(
    ("environment", "hosts"),
    [
        ({}, (1,)),
        (TORCHRUN, ()),
        ({**TORCHRUN, "MASTER_ADDR": "127.0.0.1"}, (4,)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, (2, 2)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, ()),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3", "SYNCWRIGHT_HOSTS": "3, 1"}, (3, 1)),
        (LAUNCHER, (4,)),
        ({**LAUNCHER, "SYNCWRIGHT_HOSTS": "2,2"}, (2, 2)),
    ],
)
def test_every_role_knows_who_shares_a_host(environment: dict[str, str], hosts: tuple[int, ...]) -> None:
    assert membership(environment).hosts == hosts


@pytest.mark.parametrize("told", ["2", "2,3", "4,0", "two,2", "2,2,", "-1,5"])
def test_hosts_that_do_not_add_up_are_refused(told: str) -> None:
    with pytest.raises(ClusterError, match=rf"SYNCWRIGHT_HOSTS: found '{told}', expected .* 4 together"):
        membership({**LAUNCHER, "SYNCWRIGHT_HOSTS": told})


def test_a_cluster_is_told_its_hosts() -> None:
    found = Cluster.from_environment({"SYNCWRIGHT_TRAINERS": "4", "SYNCWRIGHT_SERVERS": "1", "SYNCWRIGHT_HOSTS": "3,1"})
    assert [(host.trainers, host.servers) for host in found.hosts] == [((0, 1, 2), (0,)), ((3,), ())]


def test_sums_of_one_process_meet_by_their_number() -> None:
    """Trainer 2, the first of its host, leaves with a sum of the others under way: trainer 3 is then the first of two."""
    sums = Sums((2, 3))
    tensors = [torch.tensor([float(2**k)]) for k in range(5)]
    third, fourth = (sums.give("w", k, tensors[k]) for k in (3, 4))
    assert not third.done()
    sums.leave(2)
    assert third.done()
    assert fourth.done()
    assert (third.is_first, fourth.is_first) == (True, False)
    assert [tensor.item() for tensor in tensors] == [1.0, 2.0, 4.0, 24.0, 16.0]
    second, first = (sums.give("w", k, tensors[k]) for k in (1, 0))
    assert first.done()
    assert (first.is_first, second.is_first) == (True, False)
    assert tensors[0].item() == 3.0
