"""Tables whose gradients are gathered: exact numbers, equality with one device, rows that stay, and what travels."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import syncwright
from syncwright import AllGather, AllReduce, ParameterServer, Rules, ops
from syncwright.errors import LoweringError, PlanError
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED
from syncwright.plan import Plan, Sharing
from syncwright.planning import make_plan
from syncwright.program import Program
from syncwright.runtime.compiled import CompiledExecutor
from syncwright.runtime.executor import Executor
from syncwright.runtime.gathered import Gathering, merged
from syncwright.runtime.inductor import obstacle
from syncwright.runtime.loopback import Loopback, Network
from syncwright.runtime.segments import Segment, cut
from syncwright.runtime.session import Training
from tests.test_rows import MAKE, ROWS, STILL, Bags, batches, capture, check_equal, on_one_device, parts, step, values

GATHERED = Rules.of(AllReduce(), {"table.*": AllGather()})


def started(model: nn.Module, make: Callable, rules: Rules, trainers: int, servers: int = 0) -> Loopback:
    return syncwright.loopback(
        step, model, make(model), plan=rules, trainers=trainers, servers=servers, check_replicas=not servers
    )


def trained(job: Loopback, given: list[tuple], trainers: int) -> dict[str, torch.Tensor]:
    for each in zip(*parts(given, trainers), strict=True):
        job.step(list(each))
    job.sync()
    return values(job.model, job.optimizer)


class Four(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1)
        nn.init.zeros_(self.table.weight)


def products(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, factors: torch.Tensor):
    """The gradient of row `ids[i]` is `factors[i]`."""
    optimizer.zero_grad()
    loss = (model.table(ids)[:, 0] * factors).sum()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize(
    ("reduce", "gradient"), [("sum", [2, 10, 8, 0]), ("mean", [1, 5, 4, 0]), ("mean_by_touch", [2, 5, 8, 0])]
)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_three_reductions(reduce, gradient, optimizer):
    """A's rows [0, 1] are [2, 4], B's rows [1, 2] are [6, 8]. Adam's first average is a tenth of the gradient."""
    model = Four()
    make = {"SGD": lambda p: torch.optim.SGD(p, lr=1.0), "Adam": torch.optim.Adam}[optimizer](model.parameters())
    job = syncwright.loopback(products, model, make, plan=Rules(AllGather(reduce)), trainers=2, check_replicas=True)
    job.step([(torch.tensor([0, 1]), torch.tensor([2.0, 4.0])), (torch.tensor([1, 2]), torch.tensor([6.0, 8.0]))])
    job.sync()
    if optimizer == "SGD":
        assert model.table.weight.flatten().tolist() == [-g for g in gradient]
    else:
        assert torch.allclose(make.state[model.table.weight]["exp_avg"].flatten() * 10, torch.tensor(gradient).float())


@pytest.mark.parametrize("trainers", [1, 2, 3])
@pytest.mark.parametrize("optimizer", MAKE)
def test_equal_to_one_device(optimizer: str, trainers: int) -> None:
    model = Bags(padding=3)
    expected = on_one_device(deepcopy(model), MAKE[optimizer], batches())
    job = started(model, MAKE[optimizer], GATHERED, trainers)
    check_equal(trained(job, batches(), trainers), expected)
    assert job.job is not None
    assert job.job.plan.sharing("table.weight").rows == ("touched" if optimizer in STILL else "all")
    assert bool(job.job.plan.notes) == (optimizer not in STILL)


@pytest.mark.parametrize("optimizer", MAKE)
def test_equal_to_all_reduce_to_the_bit(optimizer: str) -> None:
    """Of two trainers, whose sums have one order."""
    model = Bags()
    plans = (GATHERED, Rules(AllReduce()))
    first, second = (trained(started(deepcopy(model), MAKE[optimizer], p, 2), batches(), 2) for p in plans)
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_every_mode(mode: str) -> None:
    model = Bags(mode)
    expected = on_one_device(deepcopy(model), MAKE["Adagrad"], batches())
    check_equal(trained(started(model, MAKE["Adagrad"], GATHERED, 2), batches(), 2), expected)


@pytest.mark.parametrize("optimizer", ["momentum", "decay", "Adam"])
@pytest.mark.parametrize("trainers", [1, 2])
def test_lazy_rows_stay_to_the_bit_and_others_change_as_on_servers(optimizer: str, trainers: int) -> None:
    model = Bags()
    lazy = Rules.of(AllReduce(), {"table.*": AllGather(lazy=True)})
    on_servers = Rules.of(AllReduce(), {"table.*": ParameterServer(lazy=True)})
    before, given = deepcopy(model.table.weight.detach()), [(ids % 11, y) for ids, y in batches()]
    expected = trained(started(deepcopy(model), MAKE[optimizer], on_servers, trainers, 1), given, trainers)
    found = trained(started(model, MAKE[optimizer], lazy, trainers), given, trainers)
    check_equal(found, expected)
    assert torch.equal(found["table.weight"][11:], before[11:])
    assert not torch.equal(found["table.weight"][:11], before[:11])


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(ROWS, 3, sparse=True), nn.Embedding(ROWS, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head((self.table(ids) * self.other(ids.flip(1))).sum(1))


def clipped(model: nn.Module, optimizers: tuple, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for each in optimizers:
        each.zero_grad()
    loss = ((model(ids) - y) ** 2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_([*model.other.parameters(), *model.head.parameters()], 0.05)
    for each in optimizers:
        each.step()
    return loss


def two_optimizers(model: nn.Module) -> tuple:
    others = [*model.other.parameters(), *model.head.parameters()]
    return torch.optim.SparseAdam([model.table.weight], lr=0.1), torch.optim.Adagrad(others, lr=0.1)


CLIPPED = {
    "all gathered": Rules.of(AllReduce(), {"*table.*": AllGather(), "other.*": AllGather()}),
    "beside servers": Rules.of(ParameterServer(), {"table.*": AllGather(), "other.*": AllGather()}),
    "one on a server": Rules.of(AllReduce(), {"table.*": ParameterServer(), "other.*": AllGather()}),
    "no all_reduce": Rules.of(ParameterServer(), {"other.*": AllGather()}),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_by_a_global_norm_and_sparse_adam(name: str) -> None:
    """Beside other ways of sharing: the norm is of all gradients, and SparseAdam's counts of lookups travel."""
    model = Rows()
    alone = deepcopy(model)
    optimizers = two_optimizers(alone)
    for ids, y in batches():
        clipped(alone, optimizers, ids, y)
    job = syncwright.loopback(clipped, model, two_optimizers(model), plan=CLIPPED[name], trainers=2, servers=1)
    for each in zip(*parts(batches(), 2), strict=True):
        job.step(list(each))
    job.sync()
    check_equal(dict(model.state_dict()), dict(alone.state_dict()))


def test_clipping_by_each_trainers_own_norm() -> None:
    """As on servers, where the clipped gradient is what travels."""
    model, given = Rows(), batches()

    def run(sync: AllGather | ParameterServer) -> dict:
        rules = Rules(AllReduce(), (("table.*", sync), ("other.*", sync)), clip="per_trainer")
        mine = deepcopy(model)
        job = syncwright.loopback(clipped, mine, two_optimizers(mine), plan=rules, trainers=2, servers=1)
        for each in zip(*parts(given, 2), strict=True):
            job.step(list(each))
        job.sync()
        return dict(mine.state_dict())

    check_equal(run(AllGather()), run(ParameterServer()))


def test_ragged_parts_and_trainers_without_examples() -> None:
    model = Bags(padding=3)
    given = [(ids[:5], y[:5]) for ids, y in batches()]
    expected = on_one_device(deepcopy(model), MAKE["Adagrad"], given)
    job = started(model, MAKE["Adagrad"], GATHERED, 3)
    for ids, y in given:
        job.step([(ids[:4], y[:4]), (ids[4:], y[4:]), (ids[5:], y[5:])])
    job.sync()
    check_equal(values(model, job.optimizer), expected)


def test_a_step_that_touches_no_row() -> None:
    model = Bags(padding=3)
    before = deepcopy(model.table.weight.detach())
    job = started(model, MAKE["SGD"], GATHERED, 2)
    job.step([(torch.full((2, 3), 3), torch.ones(2, 1))] * 2)
    job.sync()
    assert torch.equal(model.table.weight, before)


def test_evaluation_and_a_saved_state() -> None:
    """Both see whole tables; what was saved is not changed by later steps, and is taken under another plan."""
    model, given = Bags(), batches(count=6)
    job = started(model, MAKE["Adagrad"], GATHERED, 2)
    trained(job, given[:3], 2)
    saved = deepcopy(job.state_dict())
    scores = job.evaluate(lambda model, ids, y: model(ids), given[3:4])
    assert torch.allclose(scores, deepcopy(model)(given[3][0]), atol=1e-6)  # type: ignore[arg-type]
    first = trained(job, given[3:], 2)
    other = started(Bags(), MAKE["Adagrad"], Rules(ParameterServer()), 2, 2)
    other.open(given[0])
    other.load_state_dict(saved)
    check_equal(trained(other, given[3:], 2), first)


def test_any_batch_size_from_one_capture() -> None:
    model, given = Bags(), batches()
    expected = on_one_device(deepcopy(model), MAKE["SGD"], given)
    shapes = ({0: "n"}, {0: "n"})
    job = syncwright.loopback(
        step, model, MAKE["SGD"](model), plan=GATHERED, trainers=2, dynamic_shapes=shapes, check_replicas=True
    )
    for turn, (ids, y) in enumerate(given):
        at = 2 + turn % 3
        job.step([(ids[:at], y[:at]), (ids[at:], y[at:])])
    job.sync()
    check_equal(values(model, job.optimizer), expected)


@pytest.mark.parametrize("optimizer", ["RowWiseAdagrad", "Adam"])
def test_compiled_equals_interpreted(optimizer: str) -> None:
    """Whatever number of rows there are: the operations on them run as they are, the others are compiled once."""
    if (why := obstacle()) is not None:
        pytest.skip(why)
    model, given = Bags(), batches()
    expected = trained(started(deepcopy(model), MAKE[optimizer], GATHERED, 2), given, 2)

    def plan(program: Program) -> Plan:
        return make_plan(GATHERED, program, 2, 0)

    given_by_user = Training(step, model, MAKE[optimizer](model), None, None, plan, compile=True)
    check_equal(trained(Loopback(given_by_user, 2), given, 2), expected)


def test_rows_are_in_no_compiled_segment_and_are_written_in_place() -> None:
    program = capture(model := Bags(), MAKE["RowWiseAdagrad"](model))
    plan = make_plan(GATHERED, program, 2, 0)
    lowered = lower(program, plan, passes=COMPILED).trainer["step"]
    inside = [n for item in cut(lowered).items if isinstance(item, Segment) for n in item.nodes]
    loose = {n for n in lowered.graph.nodes if n.op == "call_function" and n.meta["val"] is not None}
    loose = {n for n in loose if "wait_rows" in str(n.target)}
    stack = list(loose)
    while stack:
        stack += [user for user in stack.pop().users if user not in loose and user.op != "output"]
        loose |= set(stack)
    assert inside
    assert not loose & set(inside)
    writes = [n for n in lowered.graph.nodes if n.target is ops.put_rows]
    assert len(writes) == 2


def test_replicas_write_into_their_tables() -> None:
    """A step costs no pass over the table: it stays the tensor that it was."""
    model = Bags()
    job = started(model, MAKE["Adagrad"], GATHERED, 2)
    trained(job, batches(count=1), 2)
    before = {
        name: value.data_ptr() for name, value in job.replicas[1].values.items() if "table" in name and value.dim()
    }
    trained(job, batches(count=1), 2)
    assert {name: job.replicas[1].values[name].data_ptr() for name in before} == before
    assert len(before) == 2


def test_what_travels() -> None:
    program = capture(model := Bags(), MAKE["SGD"](model))
    sent = [n.target for n in communications(lower(program, make_plan(GATHERED, program, 2, 0)).trainer["step"])]
    assert sent.count(ops.gather_rows) == sent.count(ops.wait_rows) == 1
    assert sent.count(ops.all_reduce) == 1
    assert not communications(lower(program, make_plan(GATHERED, program, 1, 0)).trainer["step"])


ROW_SETS = st.lists(st.sets(st.integers(0, 30), max_size=12), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(ROW_SETS, min_size=1, max_size=4), st.sampled_from(["sum", "mean_by_touch"]), st.sampled_from([(), (2,)])
)
def test_gathering_is_right_for_any_numbers_of_rows(steps, merge, shape) -> None:
    """Also where a trainer has more than the step before had room for, and where one has none."""
    network = Network(3)
    ends = [network.transport(rank) for rank in range(3)]
    gatherings = [Gathering("w.grad", end.gather) for end in ends]
    for sets in steps:
        given = [(torch.tensor(sorted(ids), dtype=torch.int64), torch.randn(len(ids), *shape)) for ids in sets]
        for gathering, (ids, rows) in zip(gatherings, given, strict=True):
            gathering.start(ids, rows)
        found = [gathering.finish(merge) for gathering in gatherings]
        while any(each is None for each in found):
            found = [g.finish(merge) if f is None else f for g, f in zip(gatherings, found, strict=True)]
        expected, touched = torch.zeros(31, *shape), torch.zeros(31)
        for ids, rows in given:
            expected[ids] += rows
            touched[ids] += 1
        if merge == "mean_by_touch":
            expected = expected / touched.clamp(min=1).view(-1, *[1] * len(shape))
        for ids, rows in found:  # type: ignore[misc]
            assert ids.tolist() == list(dict.fromkeys(id for each in sets for id in sorted(each)))
            assert torch.allclose(rows, expected[ids])
            assert torch.equal(rows, found[0][1])  # type: ignore[index]


def test_a_mean_by_touch_of_halves_does_not_overflow() -> None:
    ids, rows = torch.tensor([0]), torch.tensor([40000.0], dtype=torch.float16)
    assert merged([(ids, rows), (ids, rows)], "mean_by_touch")[1].tolist() == [40000.0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).sum(1).sum(1, keepdim=True) + self.table.weight.pow(2).mean()


def test_refusals() -> None:
    program = capture(model := Bags(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(
        PlanError, match=r"'head.weight': found all_gather, expected it for tables that the step reads by"
    ):
        make_plan(Rules(AllGather()), program, 2, 0)
    tied = capture(other := Tied(), torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(PlanError, match=r"'table.weight': found all_gather, .* every row of the gradient counts"):
        make_plan(Rules(AllGather()), tied, 2, 0)
    by_hand = Plan("", 2, 0, None, (Sharing("table.weight", AllGather(), (ROWS,), rows="all"),))
    with pytest.raises(LoweringError, match=r"'table.weight' is shared by all_gather, but the step reads it otherwise"):
        lower(tied, by_hand)
    with pytest.raises(PlanError, match=r"found all_gather without rows, expected rows: touched or rows: all"):
        Sharing("table.weight", AllGather(), (ROWS,))
    whole = capture(model := Bags(), torch.optim.Adafactor(model.parameters()))
    with pytest.raises(PlanError, match=r"found lazy: True, expected it for row-wise updates only"):
        make_plan(Rules.of(AllReduce(), {"table.*": AllGather(lazy=True)}), whole, 2, 0)


def test_executors_leave_a_table_that_is_read_later() -> None:
    """A read behind the write, or one that is no copy of rows, keeps the old value."""
    program = capture(model := Bags(), MAKE["SGD"](model))
    lowered = lower(program, make_plan(GATHERED, program, 2, 0)).trainer["step"].edit()
    table = lowered.placeholders["table.weight"]
    with lowered.graph.inserting_before(lowered.output):
        late = lowered.graph.call_function(torch.ops.aten.sum.default, (table,))
    late.meta["val"] = lowered.results["loss"].meta["val"]
    lowered.output.args = ({**lowered.results, "loss": late},)
    given = {"batch.0": batches()[0][0], "batch.1": batches()[0][1], "batch.weight": 1.0, "optimizer.0.lr": 0.1}
    for make in (Executor, CompiledExecutor):
        held = {name: value.detach().clone() for name, value in model.state_dict().items()}
        run = make(lowered).run({**held, **given}, _Alone())
        with torch.no_grad(), pytest.raises(StopIteration) as end:
            next(run)
        assert torch.equal(end.value.value["loss"], model.table.weight.sum())
        assert not torch.equal(end.value.value["table.weight"], held["table.weight"])
        assert torch.equal(held["table.weight"], model.table.weight)


class _Alone:
    """A port for a trainer whose peers do as it does."""

    def __init__(self) -> None:
        self.started: dict[str, object] = {}

    def ahead(self, node: str) -> None:
        return None

    def start(self, channel: str, tensor: torch.Tensor) -> None:
        self.started[channel] = tensor * 2

    def finish(self, channel: str) -> object:
        return self.started[channel]

    def start_rows(self, channel: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.started[channel] = merged([(ids, rows)] * 2, "sum")

    def finish_rows(self, channel: str, merge: str) -> object:
        return self.started[channel]
