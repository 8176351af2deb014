"""Exchanges of trainers that train alone over servers: the same numbers as over all-reduce, and geo's by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from golden_files import check_golden
from test_local_steps import DILOCO, INNER, MIXED, Scale, batches, model_of, run, scaled, step, value
from torch import nn

import syncwright
from syncwright import AllReduce, LocalSteps, ParameterServer, Rules
from syncwright.errors import LoweringError
from syncwright.lower import lower
from syncwright.plan import Even, Geo, Local, Mean, Optimizer, Outer
from syncwright.planning import make_plan
from syncwright.runtime.limits import limits_of
from syncwright.runtime.loopback import Loopback, Network
from syncwright.runtime.messages import PullRows, Push
from syncwright.runtime.replay import Replay
from syncwright.runtime.wire import WireError, encode
from syncwright.text import to_text
from syncwright.view.planned import plan_notes, plan_table
from syncwright.view.programs import program_text

SERVER = ParameterServer()
PIECES = ParameterServer(partition=Even(2))


@pytest.mark.parametrize(
    ("outer", "parts"),
    [(outer, parts) for outer in (Mean(), DILOCO) for parts in ((2, 2), (4, 2, 1), (2, 0))] + [(DILOCO, (3,))],
)
def test_over_servers(outer: Outer, parts: tuple[int, ...]) -> None:
    """As by hand, after every step and at the end; in pieces on two servers."""
    run(Rules(LocalSteps(3, outer, over=PIECES)), parts, servers=2)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("over", [SERVER, PIECES], ids=["whole", "pieces"])
@pytest.mark.parametrize("outer", [Mean(), DILOCO, Optimizer.of("Adam", lr=0.02)], ids=["mean", "diloco", "adam"])
def test_bit_for_bit_as_over_all_reduce(outer: Outer, over: ParameterServer, inner: str) -> None:
    """Three trainers with other numbers of examples: servers add in the order of trainers, as a loopback's all-reduce does."""
    jobs = [trained(Rules(LocalSteps(2, outer, over=by)), (4, 2, 1), inner) for by in (AllReduce(), over)]
    for name, found in jobs[1].replicas[0].values.items():
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(jobs[0].replicas[0].values[name])), name


def trained(plan: Rules, parts: Sequence[int], inner: str, steps: int = 7) -> Loopback:
    model, optimizer = model_of(inner)
    job = syncwright.loopback(step, model, optimizer, plan=plan, trainers=len(parts), servers=2)
    for each in batches(parts, steps):
        job.step(each)
    job.leave()
    assert all(server.done and not server.refused for server in job.servers)
    return job


@pytest.mark.parametrize("parts", [(2, 2), (3, 0, 1)])
def test_a_choice_for_each_variable(parts: tuple[int, ...]) -> None:
    """Beside a variable that servers update in every step: they number steps and exchanges apart."""
    patterns = dict(MIXED.patterns) | {
        "0.bias": LocalSteps(3, DILOCO, start=2, over=SERVER),
        "2.bias": LocalSteps(2, start=4, over=SERVER),
    }
    run(Rules.of(LocalSteps(2, over=SERVER), patterns), parts, servers=2, steps=9)


def test_until_the_start_gradients_are_all_reduced() -> None:
    job = run(Rules(LocalSteps(2, DILOCO, start=3, over=SERVER)), (2, 1), servers=1)
    assert job.job is not None
    assert not job.job.survives_losses
    assert lowered(Rules(LocalSteps(2, over=SERVER))).survives_losses


def lowered(plan: Rules, servers: int = 1) -> syncwright.Job:
    model, optimizer = model_of()
    program = syncwright.capture(step, model, optimizer, *batches((2,), 1)[0][0])
    return lower(program, make_plan(plan, program, 2, servers))


def test_a_state_that_is_loaded_begins_anew() -> None:
    """Servers take the values that are loaded, and an outer optimizer's state as at the start; rounds before are over."""
    found = []
    for over in (AllReduce(), SERVER):
        job = trained_twice(Rules(LocalSteps(2, DILOCO, over=over)))
        found.append([value(job), float(job.state_dict()["model"]["w"])])  # type: ignore[index]
    assert found[0] == found[1]


def trained_twice(plan: Rules) -> Loopback:
    job = numbers(plan, [[(1.0,), (3.0,)]] * 3)
    job.load_state_dict(numbers(Rules(AllReduce()), [[(1.0,), (1.0,)]]).state_dict())
    for part in [(1.0, 2.0), (0.5, 1.0), (1.0, 1.5)]:
        job.step([(torch.tensor([x], dtype=torch.float64),) for x in part])
    return job


def numbers(
    plan: object, steps: Sequence[Sequence[Sequence[float]]], lr: float = 0.5, of: Callable = scaled, servers: int = 1
) -> Loopback:
    """A job on `Scale` with servers; each step is, for each trainer, the numbers of its part."""
    model = Scale()
    optimizer = torch.optim.SGD([model.w], lr=lr)
    job = syncwright.loopback(of, model, optimizer, plan=plan, trainers=len(steps[0]), servers=servers)  # type: ignore[arg-type]
    for parts in steps:
        job.step([(torch.tensor(part, dtype=torch.float64),) for part in parts])
    return job


@pytest.mark.parametrize("outer", [DILOCO, Optimizer.of("Adam", lr=0.02)], ids=["diloco", "adam"])
@pytest.mark.parametrize(
    ("saved_over", "loaded_over"),
    [(SERVER, AllReduce()), (AllReduce(), PIECES), (PIECES, SERVER)],
    ids=["down", "up", "whole"],
)
def test_an_outer_optimizer_goes_on_where_it_was_saved(outer: Outer, saved_over: object, loaded_over: object) -> None:
    """Saved after an exchange and loaded under another plan, bit for bit as without; the inner optimizer keeps no state."""
    given = batches((4, 2), 6)
    through, before, after = (
        syncwright.loopback(step, *model_of("sgd"), plan=Rules(LocalSteps(2, outer, over=over)), trainers=2, servers=2)  # type: ignore[arg-type]
        for over in (AllReduce(), saved_over, loaded_over)
    )
    for each in given:
        through.step(each)
    for each in given[:4]:
        before.step(each)
    saved = before.state_dict()
    assert set(saved["outer"]) == set(through.state_dict()["outer"])  # type: ignore[call-overload]
    after.step(given[0])
    after.load_state_dict(saved)
    for each in given[4:]:
        after.step(each)
    for name, expected in through.state_dict()["model"].items():  # type: ignore[attr-defined]
        assert torch.equal(after.state_dict()["model"][name], expected), name  # type: ignore[index]


def test_without_an_outer_state_nothing_is_saved_of_it() -> None:
    assert "outer" not in numbers(Rules(LocalSteps(2, over=SERVER)), [[(1.0,), (3.0,)]]).state_dict()


def test_buffers_go_with_the_exchange() -> None:
    steps = [[(1.0, 3.0), (4.0, 4.0)], [(2.0, 2.0), (6.0, 6.0)]]
    over_servers, replicated = (numbers(Rules(LocalSteps(2, over=over)), steps) for over in (SERVER, AllReduce()))
    for name in ("seen", "count", "average"):
        assert value(over_servers, name) == value(replicated, name)


def test_who_leaves_early_is_not_waited_for() -> None:
    """Trainer 1 ends after one step of a period of two; trainer 0 makes four. Steps move w by -1 and by -3.

    Trainer 0's two steps and trainer 1's one weigh 2/3 and 1/3 in the first exchange: 1 - (2 * 2 + 3) / 3. Then trainer 0 is
    alone.
    """
    model = Scale()
    optimizer = torch.optim.SGD([model.w], lr=1.0)
    job = syncwright.loopback(scaled, model, optimizer, plan=Rules(LocalSteps(2, over=SERVER)), trainers=2, servers=1)
    replay = Replay(job, [[part(1.0)] * 4, [part(3.0)]])
    ending = job.replicas[1].meet_last()
    while next(ending, None) is not None:
        assert replay.next, "trainer 0 comes to the exchange too"
        replay.drain()
    met = 1 - (2 * 2 + 3) / 3
    assert float(job.replicas[1].values["w"]) == pytest.approx(met, abs=1e-15)  # type: ignore[arg-type]
    assert replay.waits[0] is not None
    job.replicas[1].leave()
    replay.drain()
    assert float(job.replicas[0].values["w"]) == pytest.approx(met - 2, abs=1e-15)  # type: ignore[arg-type]
    assert not job.servers[0].done


def test_the_others_go_on_without_a_trainer_that_is_lost() -> None:
    """Its examples count in no exchange that was not complete: trainer 0 goes on from its own value."""
    model = Scale()
    optimizer = torch.optim.SGD([model.w], lr=1.0)
    job = syncwright.loopback(scaled, model, optimizer, plan=Rules(LocalSteps(2, over=SERVER)), trainers=3, servers=1)
    replay = Replay(job, [[part(1.0)] * 4, [part(3.0)] * 2, [part(5.0)] * 2]).drain()
    met = 1 - (2 + 6 + 10) / 3
    assert value(job) == [met - 2, met, met]
    for lost in (1, 2):
        for to, message in job.servers[0].lose(lost):
            job.replicas[to.rank].take(to, message)
    replay.drain()
    assert value(job)[0] == met - 2
    assert job.servers[0].live == [0]
    assert job.servers[0].lost == {1, 2}


def part(x: float) -> tuple[torch.Tensor]:
    return (torch.tensor([x], dtype=torch.float64),)


# --- geo ------------------------------------------------------------------------------------------------

GEO = Rules(LocalSteps(1, Geo(), over=SERVER))


def geo_job(plan: Rules = GEO, trainers: int = 2) -> Loopback:
    """w is 1.0, lr 1: a batch of x moves it by -x."""
    model = Scale()
    optimizer = torch.optim.SGD([model.w], lr=1.0)
    return syncwright.loopback(scaled, model, optimizer, plan=plan, trainers=trainers, servers=1)


def test_geo_in_numbers() -> None:
    """Locals 1.6 and 0.8: trainer 0 pushes +0.3 (server 1.3, local 1.6), trainer 1 pushes -0.1 (server 1.2, local 1.1)."""
    job = geo_job()
    replay = Replay(job, [[part(-0.6)], [part(0.2)]])
    replay.play("0 pushes w \n 0 pulls w")
    assert (at_server(job), value(job)[0]) == (pytest.approx(1.3, abs=1e-15), pytest.approx(1.6, abs=1e-15))
    replay.play("1 pushes w \n 1 pulls w")
    assert (at_server(job), value(job)[1]) == (pytest.approx(1.2, abs=1e-15), pytest.approx(1.1, abs=1e-15))


def at_server(job: Loopback) -> float:
    return float(job.servers[0].held("w"))  # type: ignore[arg-type]


def test_geo_takes_in_what_others_have_added_meanwhile() -> None:
    """Trainer 1's push comes between trainer 0's push and pull: trainer 0 goes on from 1.5, and base is 1.2.

    It moves by 1: what it has and the server has not is 1.3, of which half is added.
    """
    job = geo_job()
    replay = Replay(job, [[part(-0.6), part(-1.0)], [part(0.2)]])
    replay.play("0 pushes w \n 1 pushes w \n 0 pulls w")
    assert at_server(job) == pytest.approx(1.2, abs=1e-15)
    assert job.replicas[0].outers[0].shared["w"] == pytest.approx(1.2, abs=1e-15)
    replay.play("0 pushes w \n 0 pulls w")
    assert at_server(job) == pytest.approx(1.85, abs=1e-15)
    assert value(job)[0] == pytest.approx(2.5, abs=1e-15)
    assert float(job.state_dict()["model"]["w"]) == pytest.approx(1.85, abs=1e-15)  # type: ignore[index]


def test_geo_waits_for_nobody_and_all_end_alike() -> None:
    """Trainer 0 makes three steps before trainer 1 makes one, and adds half of -2, then half of -2; trainer 1 half of -4."""
    job = geo_job(Rules(LocalSteps(2, Geo(), over=SERVER)))
    replay = Replay(job, [[part(1.0)] * 3, [part(4.0)]])
    replay.play("0 pushes w \n 0 pulls w")
    assert (at_server(job), value(job)) == (0.0, [-2.0, -3.0])
    job.leave()
    job.sync()
    assert float(job.model.w.detach()) == 1 - 1 - 1 - 2
    assert job.servers[0].done


def test_geo_on_one_trainer_exchanges_nothing() -> None:
    model, optimizer = model_of()
    program = syncwright.capture(step, model, optimizer, *batches((2,), 1)[0][0])
    assert lower(program, make_plan(GEO, program, 1, 1)).exchanges == ()


def test_buffers_stay_local_under_geo() -> None:
    job = geo_job()
    job.step([part(1.0), part(3.0)])
    assert value(job, "seen") == [1.0, 3.0]
    assert job.job is not None
    assert dict(job.job.plan.buffers) == {"seen": "local", "count": "local"}
    assert job.job.plan.notes[0].startswith("seen stays local: all updates are asynchronous")


class Table(nn.Module):
    """A table of 8 rows of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(8, 2)
        nn.init.ones_(self.rows.weight)
        self.double()


def looked_up(model: Table, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """Each lookup of a row moves it by -lr."""
    optimizer.zero_grad()
    loss = model.rows(ids).sum()
    loss.backward()
    optimizer.step()
    return loss


def table_job(over: ParameterServer, every: int = 2) -> Loopback:
    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plan = Rules(LocalSteps(every, Geo(), over=over))
    return syncwright.loopback(looked_up, model, optimizer, plan=plan, trainers=2, servers=2)


def looking_up(*ids: int) -> tuple[torch.Tensor]:
    return (torch.tensor(ids),)


def column(table: object) -> list[float]:
    assert isinstance(table, torch.Tensor)
    assert torch.equal(table[:, 0], table[:, 1])
    return table[:, 0].tolist()


@pytest.mark.parametrize("over", [SERVER, PIECES], ids=["whole", "pieces"])
def test_geo_of_tables_sends_the_rows_that_were_touched(over: ParameterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer 0 moves rows 1 and 2 by -1 each, trainer 1 row 2 by -1, row 3 by -1.5 and row 7 by -0.5; N is 2."""
    sent, post = [], Network.post

    def noted(self: Network, sender, to, message) -> None:
        match message.header:
            case PullRows():
                sent.append((sender.rank, message.tensor.tolist()))
            case Push() as push:
                sent.append((sender.rank, push.channel, len(message.tensor)))
        post(self, sender, to, message)

    monkeypatch.setattr(Network, "post", noted)
    job = table_job(over)
    job.step([looking_up(1, 2), looking_up(2, 3, 3)])
    assert not sent
    job.step([looking_up(1, 2), looking_up(2, 3, 7)])
    asked = {
        rank: sorted(id for who, *ids in sent if who == rank and len(ids) == 1 for id in ids[0]) for rank in (0, 1)
    }
    assert asked == {0: [1, 2], 1: [2, 3, 7]}
    assert sum(each[2] for each in sent if len(each) == 3) == 5
    assert column(job.replicas[0].values["rows.weight"]) == [1, 0, 0, 1, 1, 1, 1, 1]
    assert column(job.replicas[1].values["rows.weight"]) == [1, 1, 0, -0.5, 1, 1, 1, 0.5]
    assert column(job.state_dict()["model"]["rows.weight"]) == [1, 0.5, 0, 0.25, 1, 1, 1, 0.75]  # type: ignore[index]


def test_what_others_have_added_to_a_row_comes_when_a_trainer_touches_it() -> None:
    """Rows that it has touched before stay at home, though the servers' are others."""
    job = table_job(SERVER, every=1)
    job.step([looking_up(1, 2), looking_up(2, 3)])
    assert column(job.replicas[0].values["rows.weight"]) == [1, 0.5, 0.5, 1, 1, 1, 1, 1]
    job.step([looking_up(2), looking_up(3)])
    assert column(job.replicas[0].values["rows.weight"])[2] == 0.5 - 0.5 - 0.25
    assert column(job.servers[0].held("rows.weight")) == [1, 0.75, 0.125, 0.375, 1, 1, 1, 1]
    job.leave()
    job.sync()
    assert column(job.model.rows.weight.detach()) == [1, 0.75, 0.125, 0.375, 1, 1, 1, 1]


def test_a_trainer_that_has_touched_no_row_sends_nothing() -> None:
    job = table_job(SERVER, every=1)
    replay = Replay(job, [[looking_up(1)], [(torch.zeros(0, dtype=torch.int64),)]])
    assert [str(event) for event, _ in replay.next] == ["0 pulls rows.weight"]
    assert replay.returned[1] != []


def test_tables_by_geo_beside_variables_in_step() -> None:
    """Dense variables are all-reduced, tables added now and then: a mixture as Parallax's."""

    class Both(Table):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def both(model: Both, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.rows(ids).sum() + (model.w * len(ids)).sum()
        loss.backward()
        optimizer.step()
        return loss

    model = Both()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plan = Rules.of(AllReduce(), {"rows.weight": LocalSteps(2, Geo(), over=SERVER)})
    job = syncwright.loopback(both, model, optimizer, plan=plan, trainers=2, servers=1, check_replicas=True)
    for _ in range(2):
        job.step([looking_up(1, 2), looking_up(2, 3)])
    assert [r.values["w"].tolist() for r in job.replicas] == [[-1.0, -1.0]] * 2  # type: ignore[attr-defined]
    assert column(job.state_dict()["model"]["rows.weight"]) == [1, 0.5, 0, 0.5, 1, 1, 1, 1]  # type: ignore[index]


@pytest.mark.parametrize("sync", [LocalSteps(2, DILOCO, over=PIECES), LocalSteps(2, Geo(), over=PIECES)])
def test_every_message_of_a_job_is_what_its_receiver_accepts(sync: LocalSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of saving and loading; of no other job."""
    posted, post = set(), Network.post

    def checked(self: Network, sender, to, message) -> None:
        assert job.job is not None
        limits = limits_of(job.job, to)
        frames = [bytes(frame) for frame in encode(message)]
        assert limits.read(frames).job == message.job
        limits.check(sender, message.header, message.job)
        with pytest.raises(WireError, match="of job 2; this one has 2"):
            limits.read([bytes(frame) for frame in encode(replace(message, job=2))])
        posted.add((message.job, type(message.header).__name__))
        post(self, sender, to, message)

    monkeypatch.setattr(Network, "post", checked)
    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    job = syncwright.loopback(looked_up, model, optimizer, plan=Rules(sync), trainers=2, servers=2)
    for ids in ((1, 2), (2, 3), (7,)):
        job.step([looking_up(*ids), looking_up(3)])
    job.load_state_dict(job.state_dict())
    job.step([looking_up(1), looking_up(3)])
    job.leave()
    assert {(1, "Push"), (1, "Value"), (1, "Leave"), (0, "Leave")} <= posted


# --- what is refused, and what people see ----------------------------------------------------------------


def test_an_outer_update_that_needs_the_whole_tensor_is_not_cut() -> None:
    plan = Rules(LocalSteps(2, Optimizer("Adafactor"), over=PIECES))
    with pytest.raises(
        LoweringError, match=r"'0\.weight' is cut into 2 pieces, but the update of the outer optimizer Adaf"
    ):
        lowered(plan, servers=2)


def test_what_people_see() -> None:
    """2.bias has 8 bytes: in 4 steps they are pushed once and pulled twice, the second time from what has come already."""
    model, optimizer = model_of()
    program = syncwright.capture(step, model, optimizer, *batches((2,), 1)[0][0])
    plan = make_plan(Rules.of(Local(), {"2.bias": LocalSteps(4, Geo(), over=SERVER)}), program, 2, 1)
    job = lower(program, plan)
    assert "syncwright.push" in program_text("exchange:0", program, job)
    assert (
        plan_notes(program, plan, job)[-1] == "a step of one trainer: no communication; every 4 steps: 1 push, 1 pull"
    )
    row = next(row for row in plan_table(program, plan, job).rows if row[0] == "2.bias")
    assert row[4:] == ("local_steps, every 4", "server 0", "2 B", "2 B")


def test_golden_exchanges() -> None:
    model = Scale()
    program = syncwright.capture(scaled, model, torch.optim.SGD([model.w], lr=0.5), torch.ones(2, dtype=torch.float64))
    for name, outer in {"diloco_served": DILOCO, "geo": Geo()}.items():
        job = lower(program, make_plan(Rules(LocalSteps(2, outer, over=SERVER)), program, 2, 1))
        check(name, job)
    table = Table()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.5)
    program = syncwright.capture(looked_up, table, optimizer, torch.tensor([1, 2, 3]))
    check("geo_of_rows", lower(program, make_plan(Rules(LocalSteps(2, Geo(), over=SERVER)), program, 2, 1)))


def check(name: str, job: syncwright.Job) -> None:
    (exchange,) = job.exchanges
    check_golden(f"exchanges/{name}/trainer", to_text(exchange.job.trainer["step"]))
    check_golden(f"exchanges/{name}/server", "".join(to_text(program) for program in exchange.job.servers[0].programs))
