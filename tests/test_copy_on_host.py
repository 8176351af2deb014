"""Values that one trainer of each host pulls for all: the numbers of the flat job, with one pull for each host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_asynchronous import gives, mean_step, value
from test_merge_on_host import batch, captured, clipped_step, layers, start
from torch import nn

import syncwright
from syncwright import ParameterServer, Program, Rules, ops
from syncwright.errors import PlanError
from syncwright.lower import communications, lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.runtime.on_host import Copies
from syncwright.runtime.replay import Replay
from syncwright.runtime.segments import Segment, cut
from syncwright.schema import argument
from syncwright.text import parse, to_text
from syncwright.verify import causes, verify_job

COPIED = ParameterServer(copy_on_host=True)
ARRIVING = ParameterServer(mode="async", copy_on_host=True)
JOINT = replace(COPIED, merge_on_host=True)


def asking(replay: Replay) -> list[int]:
    """Who asks for w next."""
    return [event.trainer for event, _ in replay.next if (event.act, event.variable) == ("pulls", "w")]


def test_the_first_trainer_of_each_host_asks() -> None:
    job = start(COPIED)
    replay = Replay(job, [gives(1.0, 1.0)] * 4)
    assert asking(replay) == [0, 2]
    replay.play("0 pulls w")
    assert replay.waits[1] is None or replay.waits[1].channel != "w", "trainer 1 has gone on with the value"
    assert replay.waits[2] is not None
    assert replay.waits[2].channel == "w"
    replay.drain()
    assert value(job) == 1.0 - 2.0


def run(sync: ParameterServer, hosts: Sequence[int], sizes: Sequence[int]) -> tuple[list, dict]:
    """Five steps with Adam and a global clip, with parts of these sizes; in the last, they are swapped round."""
    plan = Rules(sync, uncuttable="keep_whole")
    job = syncwright.loopback(clipped_step, *layers(), plan=plan, trainers=4, servers=2, hosts=hosts)
    losses = []
    for k in range(5):
        parts = [each.split(sizes[::-1] if k == 4 else sizes) for each in batch(k)]
        losses.append(job.step(list(zip(*parts, strict=True))))
    return losses, job.state_dict()["model"]  # type: ignore[return-value]


@pytest.mark.parametrize("hosts", [(2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"partition": Even(2), "bucket_mb": 0.0}, {"pull": "bfloat16"}, {"staged": True}],
    ids=["joined", "in pieces", "bfloat16", "staged"],
)
def test_equal_to_the_flat_job_to_the_bit(settings: dict, hosts: tuple[int, ...]) -> None:
    """The first trainer of a host has no examples: it pulls for the others."""
    found = run(replace(COPIED, **settings), hosts, (0, 4, 3, 2))
    expected = run(ParameterServer(**settings), hosts, (0, 4, 3, 2))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_copied_and_merged_it_is_one_device() -> None:
    losses, state = run(JOINT, (2, 2), (3, 0, 2, 4))
    model, optimizer = layers()
    expected = [clipped_step(model, optimizer, *batch(k)).item() for k in range(5)]
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-12)
    for name, wanted in model.state_dict().items():
        assert (state[name] - wanted).abs().max() <= 1e-12 * wanted.abs().max(), name


def test_a_host_has_one_value_while_another_moves_on() -> None:
    """Trainer 0 has pulled 1 before host 1 pushes 4: trainer 1 goes on with 1 as well, host 1's next step with 1 - 4 and less."""
    job = start(ARRIVING)
    replay = Replay(job, [gives(1.0)] * 2 + [gives(4.0, 1.0), gives(0.5)])
    replay.play("0 pulls w \n 2 pulls w \n 2 pushes w \n 0 pushes w")
    replay.drain()
    assert [loss.item() for loss in (*replay.returned[0], *replay.returned[1])] == [1.0, 1.0]
    assert replay.returned[3][0].item() == 0.5
    assert value(job) == 1.0 - 1.0 - 1.0 - 4.0 - 1.0 - 0.5


@pytest.mark.parametrize("sync", [COPIED, JOINT], ids=["copied", "and merged"])
def test_when_the_first_leaves_the_next_asks(sync: ParameterServer) -> None:
    """Trainer 0 leaves after a step, then trainer 1, then trainer 2: means 2.5, 3, 3.5, 4."""
    job, steps = start(sync), (1, 2, 3, 4)
    replay = Replay(job, [gives(*[k + 1.0] * count) for k, count in enumerate(steps)])
    for rank in range(3):
        assert [len(each) for each in replay.drain().returned] == [min(rank + 1, count) for count in steps]
        job.replicas[rank].client.leave(rank + 1)
    assert [len(each) for each in replay.drain().returned] == list(steps)
    found = [loss.item() for loss in replay.returned[3]]
    assert found == pytest.approx([2.5, -1.5 * 3.0, -4.5 * 3.5, -8.0 * 4.0], abs=1e-13)
    assert job.servers[0].held("w").item() == pytest.approx(-12.0, abs=1e-13)  # type: ignore[attr-defined]


def test_an_evaluation_asks_for_itself() -> None:
    job = start(COPIED)
    job.step(gives(1.0, 1.0, 1.0, 1.0))
    x = torch.arange(6, dtype=torch.float64)
    assert job.evaluate(lambda model, x: model(x), [(x,)]).tolist() == [0.0] * 6  # type: ignore[attr-defined]


# --- what is refused, and what is agreed on ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"mode": "async", "compensate": 0.1}, "a server does not know which value a trainer has that did not pull it"),
        ({"mode": "async", "merge": 2}, "steps then read the value that has come last to each trainer"),
        ({"replicated": True}, "each trainer brings its copy up to date when its own step ends"),
    ],
)
def test_settings_that_cannot_be_together(settings: dict, why: str) -> None:
    with pytest.raises(PlanError, match=re.escape(why)):
        replace(COPIED, **settings)


def test_of_tables_it_is_refused() -> None:
    table = nn.Embedding(9, 2)
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    given = {"plan": Rules(COPIED), "trainers": 2, "servers": 1}
    job = syncwright.loopback(mean_step, table, optimizer, **given)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"copy_on_host: True for a table .* the trainers of a host look up other rows"):
        job.step([(torch.arange(3),), (torch.arange(3),)])


def test_roles_compare_what_is_copied() -> None:
    program = captured()
    plans = [make_plan(Rules(s), program, 4, 2, (2, 2)) for s in (ParameterServer(), COPIED, JOINT)]
    jobs = [lower(program, plan) for plan in plans]
    assert len({job.digest for job in jobs}) == 3
    assert [job.survives_losses for job in jobs] == [True, False, False]
    assert jobs[0].copied == set()
    assert jobs[1].copied == jobs[1].held.keys() & {str(n.args[1]) for n in communications(jobs[0].trainer["step"])}
    alone = lower(program, make_plan(Rules(COPIED), program, 4, 2, (1, 1, 1, 1)))
    assert alone.copied == set()


def test_every_program_of_a_trainer_copies_the_same() -> None:
    program = captured()
    job = lower(program, make_plan(Rules(COPIED), program, 4, 2, (2, 2)))
    wrong = parse(to_text(job.trainer["idle"]).replace(', "step", True)', ")"))
    with pytest.raises(causes.OtherSequence, match="idle: pulls for a whole host: found none"):
        verify_job(replace(job, trainer={**job.trainer, "idle": wrong}))


def two_phases(model: nn.Module, optimizers: tuple, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The second part is read when gradients of the first are on their way."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    model[0](x).square().mean().backward()  # type: ignore[index, operator]
    loss = (model[1](torch.tanh(x @ torch.ones(3, 4, dtype=x.dtype))) - y).square().mean()  # type: ignore[index, operator]
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss


def joint(program: Program) -> list[tuple[object, str]]:
    """What trainers of a host do together: each waits there for the others, the first time."""
    wanted = [n for n in communications(program) if n.target is ops.sum_on_host or argument(n, "on_host")]
    return [(node.target, str(node.args[1])) for node in wanted]


@pytest.mark.parametrize("passes", [PIPELINE, COMPILED], ids=["interpreted", "compiled"])
def test_trainers_of_a_host_do_all_in_one_order(passes: tuple) -> None:
    """Also one that is compiled, and one without examples."""
    model = nn.ModuleList([nn.Linear(3, 4, bias=False), nn.Linear(4, 2)]).double()
    optimizers = tuple(torch.optim.SGD(each.parameters(), 0.1) for each in model)
    program = syncwright.capture(two_phases, model, optimizers, *batch(0))
    plan = make_plan(Rules(replace(JOINT, bucket_mb=0.0)), program, 4, 2, (2, 2))
    job = lower(program, plan, passes=passes)
    order = joint(job.trainer["step"])
    sums, copies = ([name for target, name in order if target is each] for each in (ops.sum_on_host, ops.pull))
    assert len(sums) == 4
    assert len(copies) == 3
    assert order.index((ops.pull, "1.weight")) > order.index((ops.sum_on_host, "0.weight.grad on host"))
    assert joint(job.trainer["idle"]) == order
    items = [item for item in cut(job.trainer["step"]).items if not isinstance(item, Segment)]
    assert [(n.target, n.args[1]) for n in items if (n.target, n.args[1]) in order] == order


BESIDE_A_SUM = """program

input  "x": f32[2]
output "y": f32[2]

%v_x: f32[2] = read "x"

%a: f32[2] = aten.mul.Tensor(%v_x, %v_x)
%s: f32[2] = syncwright.sum_on_host.default(%a, "a on host")
%b: f32[2] = aten.add.Tensor(%v_x, %a)
%p: f32[2] = syncwright.pull.default([], "w", [2], f32, "step", True)
%c: f32[2] = aten.add.Tensor(%b, %p)
%t: f32[2] = syncwright.wait_on_host.default(%s, "a on host")
%d: f32[2] = aten.add.Tensor(%c, %t)

write "y" = %d
"""


@pytest.mark.parametrize(
    ("text", "order"),
    [(BESIDE_A_SUM, [["a", "b"], "s", "p"]), (BESIDE_A_SUM.replace(', "step", True', ""), ["p", ["a", "b", "c"], "s"])],
    ids=["for a host", "for itself"],
)
def test_a_compiled_pull_for_a_host_does_not_overtake_a_sum(text: str, order: list) -> None:
    items = cut(parse(text)).items
    found = [[n.name for n in item.nodes] if isinstance(item, Segment) else item.name for item in items]
    assert found[: len(order)] == order


def test_values_of_one_process_are_given_in_order() -> None:
    """Of hosts of two and three, trainers 2, 3, 4 take their first value; trainer 2 leaves when trainer 3 has the second."""
    copies, values = Copies((2, 3)), [torch.tensor(float(k)) for k in range(4)]
    assert [copies.is_first(k) for k in range(5)] == [True, False, True, False, False]
    copies.give(2, values[0])
    assert copies.take(3) is values[0]
    assert copies.take(3) is None
    copies.give(2, values[1])
    assert copies.take(3) is values[1]
    copies.leave(2)
    assert copies.is_first(3)
    assert not copies.is_first(4)
    assert [copies.take(4), copies.take(4), copies.take(4)] == [*values[:2], None]
    copies.give(3, values[2])
    assert copies.take(4) is values[2]
    assert copies.take(1) is None
