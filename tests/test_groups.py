"""Groups of trainers: reductions over some of them, by host, and parts within a host; against one device, plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given as any_of
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import AllReduce, Local, LocalSteps, Rules, Shard, ops
from syncwright.capture.state import Binding
from syncwright.capture.step import capture_step
from syncwright.checking import check_plan
from syncwright.cut.of_trainer import of_trainer
from syncwright.errors import Disagreement, LoweringError, PlanError
from syncwright.idle import idle
from syncwright.job import Job
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED
from syncwright.passes.average import rows_of_pieces
from syncwright.plan import Cast, ErrorFeedback, Groups, Int8, Plan, PowerSGD, TopK, is_within
from syncwright.plan.groups import fault
from syncwright.planning import make_plan
from syncwright.program import Program
from syncwright.regions import turn
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.loopback import Loopback
from syncwright.schema import argument
from syncwright.text import parse, to_text
from syncwright.verify import causes, verify_job
from syncwright.view.look import look

HOSTS = (2, 2)
BYTE = 2.0**-20
"""As megabytes."""
ALL = AllReduce()
HIERARCHICAL = AllReduce(hierarchical=True)
NODE = AllReduce(over="node")
HYBRID = Shard(3, within="node")
BY_HOST = (NODE, HIERARCHICAL, HYBRID)
Batch = tuple[torch.Tensor, ...]


class Scalar(nn.Module):
    """One weight, w."""

    def __init__(self, w: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x


def mean_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(x).mean()
    loss.backward()
    optimizer.step()
    return loss


class Net(nn.Module):
    """No size of a parameter but one can be divided by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss, norm


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 0.05)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    for p in model.parameters():
        p.requires_grad_(p.dim() == 2)
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)


def batches(sizes: Sequence[int], steps: int = 3) -> list[list[Batch]]:
    """For every step a batch for each trainer."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(steps):
        x = torch.randn(sum(sizes), 5, generator=generator).double()
        y = torch.randn(sum(sizes), 3, generator=generator).double()
        found.append(list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True)))
    return found


def job_of(rules: object, hosts: Sequence[int] = HOSTS, make: Callable = sgd, step: Callable = clipped) -> Loopback:
    model, given = Net(), rules if isinstance(rules, Rules | str) else Rules(rules)  # type: ignore[arg-type]
    settings = {"trainers": sum(hosts), "hosts": hosts, "check_replicas": True}
    return syncwright.loopback(step, model, make(model), plan=given, **settings)  # type: ignore[arg-type]


def train(job: Loopback, given: list[list[Batch]]) -> Loopback:
    for parts in given:
        job.step(parts)
    return job


def one_device(given: list[list[Batch]], make: Callable = sgd, step: Callable = clipped) -> dict[str, torch.Tensor]:
    model = Net()
    optimizer = make(model)
    for parts in given:
        step(model, optimizer, *map(torch.cat, zip(*parts, strict=True)))
    return values(model, optimizer)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
    return found


def trained(job: Loopback) -> dict[str, torch.Tensor]:
    job.sync()
    return values(job.model, job.optimizer)  # type: ignore[arg-type]


def check_close(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def program_of(job: Loopback) -> Program:
    assert job.job is not None
    return job.job.trainer["step"]


def calls(program: Program, *targets: Callable) -> list:
    return [node for node in program.graph.nodes if node.target in targets]


# --- which trainers they are ----------------------------------------------------------------------------


def test_groups_have_every_trainer_once():
    even, uneven = Groups(4, (2, 2)), Groups(4, (3, 1))
    assert even.members("node") == ((0, 1), (2, 3))
    assert even.members("across") == ((0, 2), (1, 3))
    assert uneven.members("firsts") == ((0, 3), (1,), (2,))
    assert even.members("1,3") == ((0,), (1, 3), (2,))
    assert even.members("0,3;1,2") == ((0, 3), (1, 2))
    assert even.of(AllReduce(over=[2, 0])) == "0,2"  # type: ignore[arg-type]
    assert even.of(AllReduce(over=[0, 1, 2, 3])) == ""  # type: ignore[arg-type]
    assert (uneven.size("node"), even.size("node")) == (None, 2)
    assert is_within(even.members("node"), even.members(""))
    assert not is_within(even.members("node"), even.members("across"))
    assert even.needed([HIERARCHICAL, NODE, LocalSteps(2, over=HIERARCHICAL), AllReduce(over=[0])]) == [  # type: ignore[arg-type]
        *("node", "across", "0"),
    ]


@any_of(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_every_trainer_is_in_one_group(colours, hosts):
    """Whatever is said of whom: lists of trainers (colour 0 is in none), or hosts."""
    lists = [[k for k, its in enumerate(colours) if its == colour] for colour in (1, 2, 3)]
    over = [each for each in lists if each]
    syncs = [AllReduce(over=over)] if over else []  # type: ignore[arg-type]
    for groups, sync in [
        *((Groups(6), sync) for sync in syncs),
        *((Groups(sum(hosts), tuple(hosts)), s) for s in BY_HOST),
    ]:
        if fault(sync, groups) is not None:
            continue
        for name in (groups.of(sync), *groups.needed([sync])):
            members = groups.members(name)
            assert sorted(k for each in members for k in each) == list(range(groups.trainers))
            assert all(groups.around(name, k) == each for each in members for k in each)
            assert is_within(members, groups.members(""))
        if not over or len(over) > 1 or len(over[0]) < 6:
            assert sync not in syncs or set(map(tuple, over)) <= set(groups.alike(sync))


def test_what_is_alone_or_all_together_needs_none():
    """One host is all trainers, and a hierarchy of hosts of one trainer each is flat."""
    for sync in BY_HOST:
        assert Groups(4, (4,)).of(sync) == ""
    assert Groups(2, (1, 1)).of(HIERARCHICAL) == ""
    job = train(job_of("hybrid", (1, 1)), batches((2, 3), 1))
    assert job.job is not None
    assert "first.weight is all-reduced: hosts have one trainer each" in job.job.plan.notes


def test_a_file_says_them_as_lists():
    lines = [
        "default: {all_reduce: {over: [[0, 1], [2, 3]]}}",
        "variables:",
        "- first.*: {all_reduce: {over: [0, 1], piece_mb: 1}}",
    ]
    rules = Rules.from_yaml("\n".join(lines) + "\n")
    assert rules.default == AllReduce(over=((0, 1), (2, 3)))
    assert Rules.from_yaml(rules.to_yaml()) == rules
    job = train(job_of(rules, step=apart), batches((1, 1, 1, 1), 1))
    assert job.job is not None
    assert Plan.from_yaml(job.job.plan.to_yaml()) == job.job.plan


# --- reduced over some -----------------------------------------------------------------------------------


def scalars(sync: AllReduce, hosts: Sequence[int] = HOSTS, make: Callable | None = None) -> Loopback:
    model = Scalar()
    optimizer = torch.optim.SGD(model.parameters(), 1.0) if make is None else make(model)
    rules, more = Rules(sync), {"trainers": sum(hosts), "hosts": hosts, "check_replicas": True}
    return syncwright.loopback(mean_step, model, optimizer, plan=rules, **more)  # type: ignore[arg-type]


def held(job: Loopback, name: str = "w") -> list[float]:
    return [float(replica.values[name]) for replica in job.replicas]  # type: ignore[arg-type]


PARTS = [(torch.tensor(each, dtype=torch.float64),) for each in ([1.0, 2.0, 3.0], [4.0], [], [10.0])]


@pytest.mark.parametrize(
    ("sync", "means"),
    [
        (ALL, [4.0] * 4),
        (NODE, [2.5, 2.5, 10.0, 10.0]),
        (AllReduce(over=[0, 3]), [4.0, 4.0, None, 4.0]),  # type: ignore[arg-type]
        (AllReduce(over=[[1, 2], [3, 0]]), [4.0] * 4),  # type: ignore[arg-type]
        (AllReduce(over="node", reduce="sum"), [6.0, 6.0, 10.0, 10.0]),
    ],
    ids=str,
)
def test_a_mean_is_of_the_examples_of_a_group(sync, means):
    """1, 2, 3 and 4 of the first host are 2.5 in the mean, 10 of the second 10. A trainer alone and without any keeps what it
    has."""
    job = scalars(sync)
    job.step(PARTS)
    assert held(job) == pytest.approx([1.0 - (mean or 0.0) for mean in means], abs=1e-15)
    job.sync()
    assert job.model.w.item() == held(job)[0], "trainer 0's stands for all"


def test_hosts_of_other_sizes_weigh_their_own():
    job = scalars(NODE, (3, 1))
    job.step(PARTS)
    assert held(job) == pytest.approx([1.0 - 2.5] * 3 + [1.0 - 10.0], abs=1e-15)


@pytest.mark.parametrize("sync", [NODE, Local(), AllReduce(over=[[0, 1]])], ids=str)  # type: ignore[arg-type]
def test_who_has_no_example_keeps_value_and_state(sync):
    """Neither its moments move nor its step count: no gradient has come."""
    job = scalars(sync, make=adam)
    rows = [*PARTS[:2], (torch.empty(0, dtype=torch.float64),), (torch.empty(0, dtype=torch.float64),)]
    job.step(rows)
    for name, moved, still in (("w", 0.95, 1.0), ("w.step", 1.0, 0.0)):
        assert held(job, name) == pytest.approx([moved, moved, still, still])
    assert held(job, "w.exp_avg")[2:] == [0.0, 0.0]
    job.step(list(reversed(rows)))
    assert held(job, "w.step") == [1.0] * 4


@pytest.mark.parametrize(
    ("over", "sizes"), [("node", (3, 2, 4, 1)), ([[0, 2], [1, 3]], (2, 0, 0, 3))], ids=["a host", "others"]
)
def test_each_group_trains_as_one_device(over, sizes):
    """Also clipped by its own norm."""
    job = train(job_of(AllReduce(over=over)), given := batches(sizes))
    for members in job.job.groups[next(iter(job.job.groups))]:  # type: ignore[union-attr]
        expected = one_device([[parts[k] for k in members] for parts in given])
        for trainer in members:
            check_close({name: job.replicas[trainer].values[name] for name in expected}, expected)
    check_close(trained(job), one_device([[parts[k] for k in (0, 1 if over == "node" else 2)] for parts in given]))


def apart(model: Net, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Without what joins variables."""
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_groups_have_buckets_of_their_own():
    rules = Rules.of(ALL, {"first.*": NODE, "second.bias": AllReduce(over=[1, 2])})  # type: ignore[arg-type]
    job = train(job_of(rules, step=apart), batches((1, 1, 1, 1), 1))
    found = {str(argument(node, "group")): node.meta["val"].numel() for node in starts(job)}
    sizes = {"1,2": 3 + 1, "": 21 + 2, "node": 42 + 1}
    assert found == sizes, "each with the weights of its trainers, and the loss of all"


def starts(job: Loopback) -> list:
    return calls(program_of(job), ops.all_reduce)


def test_a_state_is_trainer_0s_and_goes_to_all():
    job = train(job_of(NODE), batches((1, 2, 3, 4)))
    assert not torch.equal(job.replicas[0].values["first.bias"], job.replicas[2].values["first.bias"])  # type: ignore[arg-type]
    state = job.state_dict()
    assert torch.equal(state["model"]["first.bias"], job.replicas[0].values["first.bias"])  # type: ignore[index, arg-type]
    job.load_state_dict(state)
    assert torch.equal(job.replicas[0].values["first.bias"], job.replicas[2].values["first.bias"])  # type: ignore[arg-type]


def test_replicas_are_compared_in_their_group():
    job = train(job_of(NODE), batches((1, 2, 3, 4), 1))
    job.replicas[3].values["first.bias"] += 1.0  # type: ignore[operator]
    message = "'first.bias' is not the same on all trainers of its group after step 1: trainer 3 has other bits than trainer 2"
    with pytest.raises(Disagreement, match=message):
        train(job, batches((1, 2, 3, 4), 1))


# --- by host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sync", "hosts"),
    [
        (HIERARCHICAL, (1, 2)),
        (replace(HIERARCHICAL, bucket_mb=0.0), (2, 2)),
        (replace(HIERARCHICAL, bucket_mb=0.0), (3, 1)),
        (replace(HIERARCHICAL, bucket_mb=100 * BYTE, piece_mb=40 * BYTE), (2, 2)),
    ],
    ids=["one bucket", "each alone", "on uneven hosts", "in pieces"],
)
def test_a_hierarchy_is_the_flat_sum(sync, hosts):
    sizes = (3, 0, 4, 1)[: sum(hosts)]
    job = train(job_of(sync, hosts), given := batches(sizes))
    check_close(trained(job), one_device(given))
    groups = {str(argument(node, "group")) for node in communications(program_of(job))} - {"", "None"}
    assert groups == {"node", "across" if hosts == (2, 2) else "firsts"}


@pytest.mark.parametrize(
    ("compress", "hosts"), [(ErrorFeedback(Cast("float16")), (2, 1)), (PowerSGD(1), (2, 2))], ids=["cast", "factors"]
)
def test_a_hierarchy_of_compressed_gradients(compress, hosts):
    """As the flat one, but for the order of sums of narrow numbers."""
    given = batches((3, 2, 2, 1)[: sum(hosts)])
    flat = train(job_of(AllReduce(compress=compress), hosts, step=apart), given)
    job = train(job_of(replace(HIERARCHICAL, compress=compress), hosts, step=apart), given)
    check_close(trained(job), trained(flat), 1e-12 if isinstance(compress, PowerSGD) else 0.1)


def test_phases_do_not_all_begin_at_the_wait():
    """Behind the start of the next bucket, hosts begin what they do with the one before."""
    job = train(job_of(replace(HIERARCHICAL, bucket_mb=0.0)), batches((1, 1, 1, 1), 1))
    names = [str(node.args[1]) for node in communications(program_of(job)) if node.target in ops.SENDS]
    phases = ["bucket.{}", "bucket.{} across", "bucket.{} back"]
    first, second, third, fourth = ([names.index(phase.format(k)) for phase in phases] for k in range(4))
    assert second[0] < first[1] < third[0] < first[2] < fourth[0]
    assert third[0] < second[1] < fourth[0]
    backward = program_of(job).graph.nodes
    last = max(n for n in backward if n.target is torch.ops.aten.sum.dim_IntList)
    across = next(n for n in backward if n.target is ops.all_reduce and n.args[1] == "bucket.0 across")
    assert across < last, "while backward runs"


@pytest.mark.parametrize("hosts", [(2, 2), (3, 1)], ids=str)
def test_where_backward_begins_is_seen_through_phases(hosts):
    """The loss is made of none of the gradients that lie in its bucket."""
    program = captured()
    turns = [
        turn(lower(program, make_plan(Rules(sync), program, 4, 0, hosts)).trainer["step"])
        for sync in (ALL, HIERARCHICAL)
    ]
    assert turns[0] is not None
    assert turns[1] is not None
    assert turns[0].name == turns[1].name


def test_verify_finds_one_device():
    rules = Rules.of(HIERARCHICAL, {"first.*": HYBRID})
    program = captured()
    plan = make_plan(rules, program, 4, 0, HOSTS)
    model = Net()
    batch = tuple(torch.cat(each) for each in zip(*batches((2, 2, 2, 2), 1)[0], strict=True))
    found = check_plan(FirstStep(clipped, model, sgd(model), {}, plan, None, batch), program, plan, steps=2)
    assert found.differences
    assert not found.beyond
    plan = make_plan(Rules(NODE), program, 4, 0, HOSTS)
    with pytest.raises(PlanError, match="found all_reduce over: node, expected a sharing that keeps trainers equal"):
        check_plan(FirstStep(clipped, model, sgd(model), {}, plan, None, batch), program, plan, steps=1)


def captured(step: Callable = clipped, make: Callable = sgd) -> Program:
    model = Net()
    optimizer = make(model)
    return capture_step(step, Binding(model, optimizer), optimizer, batches((2,), 1)[0][0]).program


def test_a_script_is_looked_at_as_on_its_hosts(monkeypatch):
    monkeypatch.setenv("SYNCWRIGHT_HOSTS", "2,2")
    found = look(str(Path(__file__).parent / "scripts" / "groups.py"), ["unused"], trainers=4)
    assert found.plan.hosts == (2, 2)


def test_exchanges_go_by_host():
    given = batches((1, 2, 3, 1), 4)
    flat = train(job_of(LocalSteps(2), step=apart), given)
    job = train(job_of(LocalSteps(2, over=HIERARCHICAL), step=apart), given)
    exchange = job.job.exchanges[0].job  # type: ignore[union-attr]
    assert {str(argument(n, "group")) for n in communications(exchange.trainer["step"]) if n.target in ops.SENDS} == {
        *("node", "across"),
    }
    check_close(trained(job), trained(flat))


# --- in parts, within a host ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sync", "sizes"),
    [
        (Shard(1, within="node"), (2, 0, 0, 3)),
        (Shard(2, 100 * BYTE, within="node"), (3, 2, 4, 1)),
        (HYBRID, (3, 2, 4, 1)),
        (Shard(3, 0.0, 0, True, within="node"), (2, 0, 0, 3)),
    ],
    ids=["1", "2", "3", "3, kept"],
)
def test_parts_within_a_host_are_one_device(sync, sizes):
    """Sizes are padded, some trainers have no examples, and the norm that clips is that of all parts."""
    make = adam if sync == HYBRID else sgd
    job = train(job_of(sync, make=make), given := batches(sizes))
    check_close(trained(job), one_device(given, make))


def test_owners_of_a_part_send_nothing_else_to_other_hosts():
    """SEMANTICS 7: across hosts a trainer reduces 1/s of the bytes of a gradient, s trainers to a host. Inside them it gives, for
    forward and backward, its part of the parameter, and gets its own of the gradient."""
    sent: dict[tuple[str, str], int] = {}
    job = job_of(replace(HYBRID, bucket_mb=0.0), (3, 3), step=apart)
    joined = job.network._join

    def count(at, mine, meet):
        kind = meet.func.__name__ if hasattr(meet, "func") else meet.__name__
        if at[2] == 1 and at[1]:  # trainer 1
            sent[at[1], kind] = sent.get((at[1], kind), 0) + mine[1].nbytes
        return joined(at, mine, meet)

    job.network._join = count  # type: ignore[method-assign]
    train(job, batches((1, 1, 1, 1, 1, 1), 1))
    parts = [-(-each.numel() // 3) * 8 for each in Net().parameters()]
    assert sent["across", "_sum"] == sum(parts)
    assert sent["node", "_scatter"] == 3 * sum(parts)
    gathered = [-(-nbytes // 64) * 64 for nbytes in parts]
    assert sent["node", "_stack"] == sum(gathered) + gathered[2], (
        "at multiples of 64 bytes; backward reads the second weight"
    )
    assert len(sent) == 3


def test_each_host_has_all_of_it():
    job = train(job_of(HYBRID), batches((1, 1, 1, 1), 1))
    for name in ("first.weight[own]", "first.weight.momentum_buffer[own]"):
        parts = [replica.values[name] for replica in job.replicas]
        assert [part.numel() for part in parts] == [18] * 4  # type: ignore[union-attr]
        assert torch.equal(parts[0], parts[2])  # type: ignore[arg-type]
        assert torch.equal(parts[1], parts[3])  # type: ignore[arg-type]
    assert "first.weight" not in job.replicas[0].values
    text = to_text(program_of(job))
    assert 'param  "first.weight[own]": f64[18] own "first.weight" [7,5] among 2 in "node"' in text
    assert to_text(parse(text)) == text


@pytest.mark.parametrize("stage", [1, 3])
def test_what_cannot_be_cut_each_host_keeps(stage):
    job = train(job_of(Shard(stage, within="node"), make=muon), given := batches((3, 2, 4, 1)))
    plan = job.job.plan  # type: ignore[union-attr]
    assert [s.keeper for s in plan.sharings] == [0, None, 1, None]
    assert "second.weight is kept whole by trainer 1 of each host: its update needs the whole tensor" in plan.notes
    has = "second.weight.momentum_buffer[own]"
    assert [has in replica.values for replica in job.replicas] == [False, True, False, True]
    check_close(trained(job), one_device(given, muon), 1e-9)
    alone = [len(communications(of_trainer(program_of(job), trainer))) for trainer in range(4)]
    assert len(set(alone)) == 1
    with pytest.raises(PlanError, match=r"'second.weight': found keeper 3, expected one of a host's 2 trainers"):
        Plan.from_yaml(plan.to_yaml().replace("keeper: 1", "keeper: 3"))


def test_states_go_from_and_to_other_plans():
    given = batches((3, 2, 4, 1), 4)
    first, second, third = job_of(HYBRID), job_of(ALL, (4,)), job_of(Shard(1, within="node"))
    train(first, given[:2])
    train(second, given[:1])
    second.load_state_dict(first.state_dict())
    train(second, given[2:3])
    train(third, given[:1])
    third.load_state_dict(second.state_dict())
    check_close(trained(train(third, given[3:])), one_device(given))


def test_evaluation_and_deferred_ones():
    given = batches((3, 2, 4, 1), 1)
    expected = train(job_of(HYBRID), given)
    with syncwright.deferred(above=4):
        model = Net()
    settings = {"plan": "hybrid", "trainers": 4, "hosts": HOSTS}
    job = train(syncwright.loopback(clipped, model, sgd(model), **settings), given)  # type: ignore[arg-type]
    x = torch.cat([part[0] for part in given[0]])
    found = job.evaluate(lambda model, x: model(x), [(x[:7],), (x[7:8],)])
    expected.sync()
    torch.testing.assert_close(found, expected.model(x[:8]).detach())
    check_close(job.state_dict(deferred=True)["model"], dict(expected.model.state_dict()), 0.0)  # type: ignore[arg-type]


def test_a_loss_that_is_scaled_is_one_device():
    """The second step is skipped on all trainers, as one of them has an infinite gradient."""
    given = batches((1, 1, 1, 1))
    given[1][2][1][0] = float("inf")

    def run(of: Callable) -> tuple[dict, float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)

        def step(model, optimizer, x, y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            return loss

        return of(step), scaler.get_scale()

    found, scale = run(lambda step: trained(train(job_of(HYBRID, step=step), given)))
    expected, its = run(lambda step: one_device(given, step=step))
    check_close(found, expected)
    assert scale == its == 16.0


def test_narrow_gradients_travel_narrow():
    job = train(job_of(replace(HYBRID, compress=Cast("bfloat16"))), given := batches((3, 2, 4, 1)))
    across = [n for n in starts(job) if argument(n, "group") == "across"]
    assert {node.meta["val"].dtype for node in across} == {torch.bfloat16}
    check_close(trained(job), one_device(given), 0.01)


# --- in pieces -------------------------------------------------------------------------------------------


def test_a_gradient_is_cut_along_its_rows():
    assert rows_of_pieces(torch.empty(10, 4), 64 * BYTE) == [4, 3, 3]
    assert rows_of_pieces(torch.empty(10, 4), 160 * BYTE) == [10]
    assert rows_of_pieces(torch.empty(3, 4), BYTE) == [1, 1, 1]
    assert rows_of_pieces(torch.empty(()), 0.0) == [1]


def test_pieces_spread_over_buckets():
    """first.weight has 7 rows of 40 bytes, second.weight 3 of 56, biases 56 and 24: of at most 120 bytes these are pieces of 3, 2
    and 2 rows, and of 2 and 1. Backward comes to the second layer first."""
    given = batches((3, 2))
    job = train(job_of(AllReduce(120 * BYTE, piece_mb=120 * BYTE), (2,)), given)
    sizes = [node.meta["val"].nbytes for node in starts(job)]
    assert sizes == [24 + 16, 112, 56 + 56, 120, 80, 80, 8], "beside the weights and the loss, and the norm behind all"
    check_close(trained(job), one_device(given))


def test_a_strategy_of_pieces():
    given = batches((3, 2))
    job = train(job_of("partitioned_all_reduce", (2,)), given)
    check_close(trained(job), one_device(given))
    assert job.job.plan.sharings[0].sync == AllReduce(piece_mb=4.0)  # type: ignore[union-attr]


# --- what cannot be meant ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"over": []}, r"AllReduce.over: found \[\], expected trainers \(\[0, 1\]\) or groups of them"),
        ({"over": [0, [1]]}, r"found \[0, \[1\]\], expected trainers"),
        ({"over": [[0, 1], [1, 2]]}, r"found trainer 1 more than once in \[\[0, 1\], \[1, 2\]\]"),
        ({"over": [-1]}, r"AllReduce.over: found \(-1,\), expected"),
        ({"over": "host"}, r"AllReduce.over: found 'host', expected one of all, node or"),
        ({"over": "node", "hierarchical": True}, "found hierarchical: true with over: node"),
        ({"over": "node", "compress": TopK(0.1)}, "found over: node with compress: top_k"),
        ({"hierarchical": True, "compress": Int8()}, "found hierarchical: true with compress: int8"),
        ({"piece_mb": 1.0, "compress": PowerSGD(1)}, "found piece_mb: 1 with compress: power_sgd"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        AllReduce(**settings)


@pytest.mark.parametrize(
    ("sync", "hosts", "message"),
    [
        (AllReduce(over=[0, 5]), (2, 2), "'first.weight': found over with trainer 5, expected some of the 4 trainers"),  # type: ignore[arg-type]
        (HYBRID, (3, 1), "'first.weight': found within: node on hosts of 3, 1 trainers, expected as many on each"),
        (HYBRID, (), "'first.weight': found within: node, but nothing says which trainers share a host"),
        (NODE, (), "'first.weight': found over: node, but nothing says which trainers"),
        (HIERARCHICAL, (), "'first.weight': found hierarchical, but nothing says which trainers"),
    ],
    ids=str,
)
def test_trainers_and_hosts_that_there_are_not_are_refused(sync, hosts, message):
    with pytest.raises(PlanError, match=message):
        make_plan(Rules(sync), captured(), 4, 0, hosts)


def test_what_differs_between_groups_does_not_reach_what_is_equal():
    """A norm of gradients that some trainers share would have others drift apart; what is equal on all may be read by each."""
    program = captured()
    rules = Rules.of(ALL, {"first.*": NODE})
    message = "'first.bias' is reduced over: node, but its gradient takes part in a global value .* 'second.bias'"
    with pytest.raises(LoweringError, match=message):
        lower(program, make_plan(rules, program, 4, 0, HOSTS))
    with pytest.raises(
        PlanError, match=r"'first.weight': found it reduced over some trainers with sync_batch_norm: true"
    ):
        make_plan(Rules(NODE, sync_batch_norm=True), program, 4, 0, HOSTS)
    with pytest.raises(PlanError, match=r"LocalSteps.over: found all_reduce with over: node"):
        LocalSteps(2, over=NODE)


def test_a_job_whose_groups_do_not_fit_is_not_legal():
    program = captured(apart)
    job = lower(program, make_plan(Rules(HYBRID), program, 4, 0, HOSTS))

    def check(old: str, new: str, message: str) -> None:
        text = to_text(job.trainer["step"])
        assert old in text
        step = parse(text.replace(old, new))
        changed: Job = replace(job, trainer={"step": step, "idle": idle(step)})
        with pytest.raises(causes.BadGroup, match=message):
            verify_job(changed)

    check('"across")', '"1,2")', 'the group "1,2"')
    check('"parts.0", 2, "node")', '"parts.0", 4, "node")', "parts for 4 trainers")


def test_compiled_programs_reduce_by_node_too():
    program = captured()
    for rules in (Rules(HYBRID), Rules(HIERARCHICAL), Rules(NODE)):
        plan = make_plan(rules, program, 4, 0, HOSTS)
        one, other = lower(program, plan), lower(program, plan, passes=COMPILED)
        names = [
            [(str(n.target), n.args[1], argument(n, "group")) for n in communications(job.trainer["step"])]
            for job in (one, other)
        ]
        assert names[0] == names[1]
        assert any(name.startswith("flat.") for name in other.trainer["step"].variables)
