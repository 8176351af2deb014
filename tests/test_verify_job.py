"""Every rule of a whole job, broken once, with its exact message; and what lowering makes, which is legal."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from golden_files import check_golden
from test_verify import messages_of
from torch import nn

import syncwright
from syncwright import AllReduce, ParameterServer, Rules
from syncwright import verify as rules
from syncwright.job import Job
from syncwright.lower import lower
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.program import Variable
from syncwright.text import parse, to_text
from syncwright.verify import verify_job


def train(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (model(x) - y).pow(2).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@functools.cache
def legal() -> Job:
    """A weight cut over two servers, a bias reduced among two trainers, and the norm that joins them."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    program = syncwright.capture(train, model, optimizer, torch.ones(4, 3), torch.ones(4, 2))
    chosen = Rules.of(AllReduce(), {"weight": ParameterServer(partition=Even(2))})
    return lower(program, make_plan(chosen, program, trainers=2, servers=2))


def changed(**parts) -> Job:
    return dataclasses.replace(legal(), **parts)


def edited(text: str, old: str, new: str) -> str:
    assert old in text, f"{old!r} is not in\n{text}"
    return text.replace(old, new)


def trainer_with(*edits: tuple[str, str], phases: tuple[str, ...] = ("step", "idle")) -> Job:
    """The job with words of the trainer's programs replaced."""
    programs = dict(legal().trainer)
    for phase in phases:
        text = to_text(programs[phase])
        for old, new in edits:
            text = edited(text, old, new)
        programs[phase] = parse(text)
    return changed(trainer=programs)


def server_with(rank: int, **parts) -> Job:
    servers = list(legal().servers)
    servers[rank] = dataclasses.replace(servers[rank], **parts)
    return changed(servers=tuple(servers))


def without(mapping, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


def with_channel(name: str, **parts) -> Job:
    channel = dataclasses.replace(legal().channels[name], **parts)
    return changed(channels={**legal().channels, name: channel})


def of_another_shape(name: str) -> Variable:
    return dataclasses.replace(legal().channels[name].variable, shape=(7,))


def circle() -> Job:
    """The norm's part of server 1 is made from the clip coefficient, which is made from it."""
    first, second = legal().servers
    update, part = second.programs
    text = to_text(part)
    text = edited(text, "\n\n%v", '\nglobal "global.clamp": f32[]\n\n%c: f32[] = read "global.clamp"\n%v')
    text = edited(text, "(%v_weight_grad, 2.0)", "(%scaled, 2.0)")
    scaled = "%scaled: f32[1,3] = aten.mul.Tensor(%v_weight_grad, %c)\n"
    text = edited(text, "%linalg_vector_norm: ", scaled + "%linalg_vector_norm: ")
    return changed(servers=(first, dataclasses.replace(second, programs=(update, parse(text)))))


WAIT = 'f32[4] = syncwright.wait.default(%all_reduce_default_3, "bucket.0")'
PULL = '= syncwright.pull.default([%push_default_2, %push_default_1], "global.clamp", [], f32)'
LATE = (
    ("%pull_default_2: f32[] " + PULL + "\n", ""),
    (
        "%linalg_vector_norm_1:",
        f"%pull_default_2: f32[] {PULL.replace('%push_default_2, ', '')}\n%linalg_vector_norm_1:",
    ),
)

BROKEN = [
    (rules.NoSuchServer, lambda: with_channel("weight.grad[0]", server=2)),
    (rules.NoSuchServer, lambda: changed(owners={**legal().owners, "global.clamp": 5})),
    (rules.NoSuchServer, lambda: server_with(0, exports={"global.clamp": (1, 3)})),
    (rules.UnknownChannel, lambda: changed(channels=without(legal().channels, "weight.grad[1]"))),
    (rules.WrongPush, lambda: with_channel("weight.grad[0]", variable=of_another_shape("weight.grad[0]"))),
    (rules.PushedTwice, lambda: trainer_with(('"weight.grad[1]"', '"weight.grad[0]"'))),
    (
        rules.NeverPushed,
        lambda: changed(channels={**legal().channels, "more": legal().channels["weight.grad[0]"]}),
    ),
    (rules.ReducedTwice, lambda: trainer_with(
        ("%wait_default_3:", '%again: f32[] = syncwright.all_reduce.default(%neg_1, "bucket.0")\n%wait_default_3:'),
        ("%wait_default_3:", '%w: f32[] = syncwright.wait.default(%again, "bucket.0")\n%wait_default_3:'),
        ("%all_reduce_default_3:", "%neg_1: f32[] = aten.zeros.default([])\n%all_reduce_default_3:"),
    )),
    (rules.BadWait, lambda: trainer_with(
        ("%wait_default_3:", f"%twice: {WAIT}\n%wait_default_3:")
    )),
    (rules.BadWait, lambda: trainer_with(
        ("%div_tensor:", '%w: f32[] = syncwright.wait.default(%view_default, "bucket.1")\n%div_tensor:')
    )),
    (rules.OtherSequence, lambda: trainer_with(('"bucket.0"', '"bucket.1"'), phases=("idle",))),
    (rules.HeldTwice, lambda: server_with(1, holds=(*legal().servers[1].holds, legal().servers[0].holds[1]))),
    (rules.WrittenTwice, lambda: server_with(1, programs=legal().servers[1].programs * 2)),
    (rules.WrittenTwice, lambda: server_with(
        1, holds=(*legal().servers[1].holds, legal().trainer["step"].variables["bias"])
    )),
    (rules.UnfedRead, lambda: server_with(0, exports={})),
    (rules.UnfedRead, lambda: server_with(1, programs=legal().servers[1].programs[:1])),
    (rules.UnfedRead, lambda: with_channel("weight.grad[1]", hypers=())),
    (rules.PulledFromNobody, lambda: changed(owners=without(legal().owners, "weight[1]"))),
    (rules.PulledFromNobody, lambda: changed(owners={**legal().owners, "weight[1]": 0})),
    (rules.WrongPull, lambda: trainer_with(
        ('%pull_default_2: f32[] ', '%pull_default_2: f64[] '), ('"global.clamp", [], f32', '"global.clamp", [], f64')
    )),
    (rules.PulledTooEarly, lambda: trainer_with(("[%push_default_2, %push_default_1]", "[]"))),
    (rules.Deadlock, lambda: trainer_with(*LATE)),
    (rules.Deadlock, circle),
]  # fmt: skip


def test_golden_broken_jobs():
    check_golden("verify/jobs", messages_of(BROKEN, lambda make: verify_job(make())))


def test_every_cause_has_a_test():
    causes = {c for c in vars(rules).values() if isinstance(c, type) and issubclass(c, rules.IllegalJob)}
    assert causes - {rules.IllegalJob} == {error for error, _ in BROKEN}


def test_what_lowering_makes_is_legal():
    verify_job(legal())
    verify_job(trainer_with())


def test_a_pass_at_fault_is_named():
    from syncwright.passes import tidy

    def forgetful(program, plan):
        program = tidy(program, plan)
        for node in program.graph.nodes:
            node.meta.clear()
        return program

    program = syncwright.capture(train, *model_and_optimizer(), torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(rules.BrokenByPass, match=r"^after pass forgetful: "):
        lower(program, make_plan("all_reduce", program, 1, 0), passes=(forgetful,))


def model_and_optimizer():
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)
