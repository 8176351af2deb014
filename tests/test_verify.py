"""Every rule of the verifier, broken once, with its exact message; and legal programs, which pass."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import handmade
import pytest
import torch
from golden_files import check_golden
from torch.fx import Node

from syncwright import verify as rules
from syncwright.program import Guard, Program, Role, Variable, new_placeholder
from syncwright.text import parse
from syncwright.verify import verify, verify_after, verify_inputs_unchanged, verify_server

aten = torch.ops.aten


def program_of(*lines: str) -> Program:
    return parse("\n".join(["program", *lines]))


def tiny_with(*lines: str, variables: tuple[str, ...] = ()) -> Program:
    """A parameter, an lr, then `lines`."""
    return program_of(
        'param "w": f32[2]', 'hyper "lr": host float', *variables,
        '%w: f32[2] = read "w"', '%lr: host float = read "lr"', *lines,
    )  # fmt: skip


def changed(change: Callable[[Program, Node], object]) -> Program:
    """w = w + w with something broken by `change(program, its one call)`."""
    program = handmade.tiny()
    change(program, next(n for n in program.graph.nodes if n.op == "call_function"))
    return program


def append_read(program: Program, node: Node) -> None:
    with program.graph.inserting_before(node.next):
        new_placeholder(program.graph, Variable("u", Role.PARAM, (2,), torch.float32), node.meta["val"])
    program.variables["u"] = Variable("u", Role.PARAM, (2,), torch.float32)


def output_elsewhere(program: Program, node: Node) -> None:
    node.append(program.output)
    with program.graph.inserting_after(program.output):
        handmade.call(program.graph, aten.neg.default, node.meta["val"], node)


BROKEN = [
    (rules.BadOutput, lambda: changed(lambda p, n: p.graph.erase_node(p.output))),
    (rules.BadOutput, lambda: changed(output_elsewhere)),
    (rules.BadOutput, lambda: changed(lambda p, n: setattr(p.output, "args", ((n,),)))),
    (rules.BadOutput, lambda: changed(lambda p, n: setattr(p.output, "args", ({"w": 1.0},)))),
    (rules.UsedTooEarly, lambda: changed(lambda p, n: p.placeholders["w"].prepend(n))),
    (
        rules.UsedTooEarly,
        lambda: changed(lambda p, n: n.replace_input_with(p.placeholders["w"], handmade.tiny().placeholders["w"])),
    ),
    (rules.BrokenGraph, lambda: changed(lambda p, n: setattr(n, "name", "v_w"))),
    (rules.MissingValue, lambda: changed(lambda p, n: n.meta.clear())),
    (rules.UnknownVariable, lambda: changed(lambda p, n: p.placeholders["w"].meta.pop("variable"))),
    (rules.UnknownVariable, lambda: tiny_with('%u: f32[2] = read "u"')),
    (rules.UnknownVariable, lambda: tiny_with('write "u" = %w')),
    (
        rules.UnknownVariable,
        lambda: dataclasses.replace(handmade.tiny(), guards=(Guard("m > 0", ("m",), ("momentum",)),)),
    ),
    (
        rules.UnknownVariable,
        lambda: changed(lambda p, n: p.variables.update(w=dataclasses.replace(p.variables["w"], name="v"))),
    ),
    (rules.ReadTwice, lambda: tiny_with('%again: f32[2] = read "w"')),
    (rules.ReadTooLate, lambda: changed(append_read)),
    (rules.UnreadableRole, lambda: program_of('output "loss": f32[]', '%loss: f32[] = read "loss"')),
    (rules.WrongRead, lambda: program_of('param "w": f32[2]', '%w: f32[3] = read "w"')),
    (rules.WrongRead, lambda: program_of('hyper "lr": host float', '%lr: f64[] = read "lr"')),
    (
        rules.WrongResult,
        lambda: tiny_with("%x: bf16[2] = aten._to_copy.default(%w, dtype=bf16)", 'write "w" = %x'),
    ),
    (rules.WrongResult, lambda: tiny_with('write "w" = %lr')),
    (rules.WrongResult, lambda: tiny_with("%p: (f32[], i64[]) = aten.max.dim(%w, 0)", 'write "w" = %p')),
    (rules.UnknownOp, lambda: changed(lambda p, n: setattr(n, "target", torch.add))),
    (rules.UnknownOp, lambda: changed(lambda p, n: setattr(n, "target", torch.ops.quantized.add.default))),
    (rules.UnknownOp, lambda: changed(lambda p, n: setattr(n, "op", "call_method"))),
    (rules.MutatingOp, lambda: tiny_with("%x: f32[2] = aten.add_.Tensor(%w, %w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.maximum.default(%w, %lr)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.maximum.default(%w, 1.0)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.mul.Scalar(%w, %w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[4] = aten.cat.default([%w, %lr])")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.maximum.default(%w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.maximum.default(%w, %w, out=%w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[2] = aten.maximum.default(%w, %w, %w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: host float = operator.mul(%lr, %w)")),
    (rules.WrongArgument, lambda: tiny_with("%x: f32[] = operator.getitem(%w, 0)")),
]


SERVED = (
    'param "w": f32[2] kept [on server 0]', 'param "v": f32[2]', 'hyper "lr": host float', 'global "n": f32[]',
    'grad "w.grad": f32[2] of "w" kept [on server 0]',
)  # fmt: skip
HERE = '%w: f32[2] = read "w" at owners "w"'
PUSH = '%g: f32[2] = syncwright.push.merged(%v, "w.grad", "mean") at owners "w"'
NORM = '%n: f32[] = aten.linalg_vector_norm.default(%g, 2.0) at owners "w"'


def whole_with(*lines: str) -> Program:
    """A whole program: server 0 keeps w, trainers keep v."""
    return program_of(*SERVED, '%v: f32[2] = read "v"', '%lr: host float = read "lr" at everyone', *lines)


MISPLACED = [
    (rules.ReadElsewhere, lambda: whole_with('%w: f32[2] = read "w"', PUSH)),
    (rules.ReadElsewhere, lambda: program_of(*SERVED, '%v: f32[2] = read "v" at everyone')),
    (rules.ReadElsewhere, lambda: whole_with(HERE, "%x: f32[2] = aten.neg.default(%w)")),
    (rules.ReadElsewhere, lambda: whole_with(HERE, '%x: f32[2] = aten.mul.Tensor(%w, %v) at owners "w"')),
    (rules.ReadElsewhere, lambda: whole_with(HERE, "%x: f32[2] = aten.neg.default(%v) at everyone")),
    (rules.WrittenElsewhere, lambda: whole_with(HERE, 'write "w" = %v')),
    (rules.WrittenElsewhere, lambda: whole_with(HERE, 'write "v" = %w')),
    (rules.UnknownOwners, lambda: whole_with('%x: f32[2] = syncwright.push.merged(%v, "n", "sum") at owners "v"')),
    (rules.UnknownVariable, lambda: whole_with(PUSH.replace('"w.grad"', '"u"'))),
    (rules.WrongCrossing, lambda: whole_with(HERE, PUSH.replace("%v", "%w"))),
    (rules.WrongCrossing, lambda: whole_with('%p: f32[2] = syncwright.pull.value(%v, "v")', PUSH)),
    (rules.WrongCrossing, lambda: whole_with(PUSH, NORM, '%s: f32[] = syncwright.send.default(%n, "n")')),
    (
        rules.WrongCrossing,
        lambda: whole_with(PUSH, NORM, '%s: f32[2] = syncwright.gather.default(%n, "n", 2) at server 0'),
    ),
]


def test_golden_misplaced():
    check_golden("verify/places", messages_of(MISPLACED, lambda make: verify(make())))


def test_a_legal_whole_program():
    verify(whole_with(
        HERE, '%p: f32[2] = syncwright.pull.value(%w, "w")', "%y: f32[2] = aten.mul.Tensor(%p, %v)",
        PUSH.replace("%v", "%y"), NORM, '%s: f32[] = syncwright.send.default(%n, "n") at server 1',
        '%b: f32[] = syncwright.send.default(%s, "n") at owners "w"', '%c: f32[2] = aten.mul.Tensor(%g, %b) at owners "w"',
        '%d: f32[2] = aten.mul.Tensor(%c, %lr) at owners "w"', 'write "w" = %d', 'write "v" = %y',
    ))  # fmt: skip


def messages_of(cases: list, check: Callable) -> str:
    """The message of every case, under the name of the error that it must raise."""
    lines = []
    for error, case in cases:
        with pytest.raises(error) as caught:
            check(case)
        assert type(caught.value) is error
        lines.append(f"{error.__name__}\n    {caught.value}\n")
    return "\n".join(lines)


def test_golden_broken_programs():
    check_golden("verify/programs", messages_of(BROKEN, lambda make: verify(make())))


def test_every_cause_has_a_test():
    tested = {error for error, _ in [*BROKEN, *MISPLACED, *BROKEN_SERVERS]}
    tested |= {rules.InputChanged, rules.RandomOpsChanged, rules.BrokenByPass}
    above = {rules.BrokenRule, rules.NotForServers, rules.Misplaced}
    causes = {c for c in vars(rules).values() if isinstance(c, type) and issubclass(c, Exception)}
    of_jobs = {cause for cause in causes if issubclass(cause, rules.IllegalJob)}  # see test_verify_job
    assert causes - of_jobs == tested | above


def test_causes_keep_their_parts_when_pickled():
    error = pickle.loads(pickle.dumps(rules.ReadTwice("%a", "b", "c", "d")))
    assert (error.about, error.found, error.expected, error.remedy) == ("%a", "b", "c", "d")
    assert str(error) == "%a: found b, expected c; d"


def test_legal_programs_pass():
    program, values = handmade.momentum_step()
    verify(program)
    verify(handmade.tiny())
    verify_inputs_unchanged(program, values)
    verify(tiny_with(
        "%best: (f32[], i64[]) = aten.max.dim(%w, 0)", "%top: f32[] = operator.getitem(%best, 0)",
        "%scaled: f32[2] = aten.mul.Tensor(%w, %lr)", "%half: f32[2] = aten.mul.Tensor(%w, 0.5)",
        "%picked: f32[2] = aten.index.Tensor(%w, [None])",
        "%total: f32[2] = aten.add.Tensor(%w, %w, alpha=%lr)", 'write "w" = %scaled',
    ))  # fmt: skip


def test_host_numbers_among_inputs_and_outputs():
    verify(program_of(
        'input "scale": f64[]', 'output "steps": i64[]', '%scale: host float = read "scale"',
        "%n: host int = math.trunc(%scale)", 'write "steps" = %n',
    ))  # fmt: skip


def test_ops_that_may_write_are_named_by_the_caller():
    program = tiny_with("%x: f32[2] = aten.add_.Tensor(%w, %w)", 'write "w" = %x')
    verify(program, may_write=lambda node: node.target is aten.add_.Tensor)


# Runs.


def test_a_silent_write_is_found():
    """aten.native_batch_norm updates the running mean, and its schema does not say so."""
    names = ("weight", "bias", "mean", "var")
    program = program_of(
        'input "x": f32[4,2]', *(f'buffer "{n}": f32[2]' for n in names),
        '%x: f32[4,2] = read "x"', *(f'%{n}: f32[2] = read "{n}"' for n in names),
        "%neg: f32[4,2] = aten.neg.default(%x)",
        "%norm: (f32[4,2], f32[2], f32[2]) = aten.native_batch_norm.default("
        "%neg, %weight, %bias, %mean, %var, True, 0.1, 1e-05)",
        "%abs_1: f32[4,2] = aten.abs.default(%x)",
    )  # fmt: skip
    verify(program)
    values = {"x": torch.randn(4, 2), **{name: torch.ones(2) for name in names}}
    kept = {name: value.clone() for name, value in values.items()}
    with pytest.raises(rules.InputChanged) as caught:
        verify_inputs_unchanged(program, values)
    assert str(caught.value) == (
        '"mean", "var": found it changed by %norm (aten.native_batch_norm.default), expected inputs as they '
        "were given; replace the op by one that returns the new value"
    )
    assert all(torch.equal(values[name], kept[name]) for name in values), "the caller's values are copied"


def test_unchanged_is_judged_by_bits_and_leaves_the_generator():
    program = tiny_with("%r: f32[2] = aten.rand_like.default(%w)")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    verify_inputs_unchanged(program, {"w": torch.tensor([float("nan"), -0.0]), "lr": float("nan")})
    assert torch.equal(torch.get_rng_state(), before)


# Passes.


def test_the_pass_is_named_and_its_cause_kept():
    before = tiny_with("%x: f32[2] = aten.mul.Tensor(%w, %lr)", 'write "w" = %x')
    after = tiny_with("%x: f32[2] = aten.mul.Scalar(%w, %w)", 'write "w" = %x')
    verify_after("scale", before, before)
    with pytest.raises(rules.BrokenByPass) as caught:
        verify_after("scale", before, after)
    assert str(caught.value) == (
        "after pass scale: %x: found %w of type f32[2] as the argument other of aten.mul.Scalar, expected a "
        "host number; convert it, or use another overload"
    )
    assert type(caught.value.__cause__) is rules.WrongArgument
    assert "-%x: f32[2] = aten.mul.Tensor(%w, %lr)\n+%x: f32[2] = aten.mul.Scalar(%w, %w)" in caught.value.__notes__[0]


def test_an_older_fault_is_not_blamed_on_the_pass_alone():
    broken = tiny_with('write "u" = %w')
    with pytest.raises(rules.BrokenByPass, match=r"^after pass p: .* \(the program was illegal before this pass\)$"):
        verify_after("p", broken, broken)


def test_random_ops_stay():
    draw = "%r: f32[2] = aten.rand_like.default(%w)"
    twice = tiny_with(draw, draw.replace("%r", "%s"))
    with pytest.raises(rules.BrokenByPass) as caught:
        verify_after("merge", twice, tiny_with(draw))
    assert isinstance(caught.value.__cause__, rules.RandomOpsChanged)
    assert str(caught.value.__cause__) == (
        "random ops: found [aten.rand_like.default], expected [aten.rand_like.default, "
        "aten.rand_like.default] as before; keep each of them, once, in order"
    )


@pytest.mark.parametrize(("probability", "random"), [("", False), (", 0.0", False), (", 0.1", True)])
def test_attention_is_random_only_with_dropout(probability, random):
    op = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    program = program_of(
        'param "q": f32[1,1,4,8]', '%q: f32[1,1,4,8] = read "q"', f"%a: None = {op}(%q, %q, %q{probability})"
    )
    assert [rules.draws_random(node) for node in program.graph.nodes] == [False, random, False]


# Servers.


def server_with(*lines: str) -> Program:
    """A server's program with a gradient, a parameter and its state, then `lines`."""
    return program_of(
        *(
            'grad "w.grad": f32[2] of "w"',
            'param "w": f32[2]',
            'state "w.m": f32[2] of "w"',
            'param "u": f32[2]',
        ),
        *('grad "u.grad": f32[2] of "u"', 'state "u.m": f32[2] of "u"', 'hyper "lr": host float'),
        *('input "x": f32[2]', 'output "loss": f32[2]', 'global "norm": f32[]'),
        *('%g: f32[2] = read "w.grad"', '%w: f32[2] = read "w"', '%m: f32[2] = read "w.m"'),
        *lines,
    )


BROKEN_SERVERS = [
    (rules.ServerReadsBatch, ('%x: f32[2] = read "x"', "%y: f32[2] = aten.mul.Tensor(%x, %w)")),
    (rules.ServerReadsForeign, ('%u: f32[2] = read "u"',)),
    (rules.ServerReadsForeign, ('%um: f32[2] = read "u.m"',)),
    (rules.ServerReadsForeign, ('%ug: f32[2] = read "u.grad"',)),
    (rules.ServerRunsForward, ('write "loss" = %g',)),
    (rules.ServerRunsForward, ('write "w.grad" = %g',)),
    (rules.ServerWritesForeign, ('write "u" = %g',)),
    (rules.ServerDrawsRandom, ("%r: f32[2] = aten.rand_like.default(%w)",)),
    (rules.MutatingOp, ("%r: f32[2] = aten.mul_.Tensor(%w, %w)",)),
]


def test_golden_broken_servers():
    check = lambda lines: verify_server(server_with(*lines), {"w"})  # noqa: E731
    check_golden("verify/servers", messages_of(BROKEN_SERVERS, check))


def test_legal_server():
    program = server_with(
        '%norm: f32[] = read "norm"', '%lr: host float = read "lr"',
        "%c: f32[2] = aten.mul.Tensor(%g, %norm)",
        "%n: f32[2] = aten.add.Tensor(%m, %c)", "%s: f32[2] = aten.mul.Tensor(%n, %lr)",
        "%d: f32[2] = aten.sub.Tensor(%w, %s)", 'write "w" = %d', 'write "w.m" = %n', 'write "norm" = %norm',
    )  # fmt: skip
    verify_server(program, {"w"})
    with pytest.raises(rules.NotForServers, match="expected what is owned: nothing"):
        verify_server(program, set())


def test_server_of_a_slice():
    """The update of a captured step, cut at its gradient, is a legal server's program; uncut, it is not."""
    program, values = handmade.momentum_step()
    gradient = next(n for n in program.graph.nodes if n.name == "mm_1")
    mark = Variable("fc.weight.grad", Role.GRAD, (3, 4), torch.float32, of="fc.weight")
    owned = {"fc.weight", "fc.weight.momentum_buffer"}
    results = {name: node for name, node in program.results.items() if name in owned}
    update = program.slice(results, {gradient: mark})
    verify_server(update, {"fc.weight"})
    given = {name: values.get(name, torch.ones(3, 4)) for name in update.reads}
    verify_inputs_unchanged(update, given)
    with pytest.raises(rules.ServerReadsBatch):
        verify_server(program.slice(results), {"fc.weight"})


def test_pieces_are_owned_by_name_or_by_their_whole():
    program = program_of(
        'param "emb/1": f32[2,4] whole "emb" rows [2,4]', '%e: f32[2,4] = read "emb/1"', 'write "emb/1" = %e'
    )
    verify_server(program, {"emb/1"})
    verify_server(program, {"emb"})
    with pytest.raises(rules.ServerReadsForeign):
        verify_server(program, {"emb/0"})
