"""Program text: golden files, the way back, equal results, errors that name the line, and diffs."""

from __future__ import annotations

import dataclasses
import math
import operator

import handmade
import pytest
import torch
from golden_files import check_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph

from syncwright.place import EVERYWHERE, TRAINERS, Owners, Server, place_of, put
from syncwright.program import Guard, Program, Role, Variable, new_placeholder
from syncwright.selection import Own, Selection
from syncwright.tables import CountFilter, Settings
from syncwright.text import TextError, diff, parse, to_text

aten = torch.ops.aten


def check_round_trip(program: Program) -> Program:
    text = to_text(program)
    again = parse(text)
    assert to_text(again) == text
    assert dict(again.variables) == dict(program.variables)
    assert list(again.variables) == list(program.variables)
    assert again.guards == program.guards
    assert again.reads == program.reads
    assert again.writes == program.writes
    for old, new in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert (old.op, old.target) == (new.op, new.target)
        assert old.op == "output" or old.name == new.name
    return again


def bits(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return (
            tuple(value.shape),
            value.dtype,
            value.stride(),
            value.contiguous().view(-1).view(torch.uint8).tolist(),
        )
    return repr(value)


def check_same_results(program: Program, values: dict[str, object]) -> None:
    again = check_round_trip(program)
    torch.manual_seed(7)
    expected = program.run(values)
    torch.manual_seed(7)
    found = again.run(values)
    assert {name: bits(v) for name, v in found.items()} == {name: bits(v) for name, v in expected.items()}


def every_argument() -> Program:
    """Every kind of variable, type and argument once (it is never run)."""
    graph, mode = Graph(), torch._subclasses.fake_tensor.FakeTensorMode()
    rows = Selection("emb", "rows", 0, 2)
    table = Variable('emb "é".weight/0', Role.PARAM, (2, 4), torch.bfloat16, None, True, ("a", "b"), rows, lazy=True)
    cut = (Selection("g", "rows", 0, 2, 0), Selection("g", "rows", 2, 4, 1))
    others = [
        Variable("x", Role.INPUT, (0, 3), torch.float16),
        Variable("momentum", Role.HYPER, (), torch.float64),
        Variable("warmup", Role.HYPER, (), torch.int64),
        Variable("nesterov", Role.HYPER, (), torch.bool),
        Variable("as tensor", Role.HYPER, (), torch.float32),
        Variable("g", Role.GRAD, (4, 4), torch.float32, of="emb", kept=cut),
        Variable("rare", Role.BUFFER, (1,), torch.float8_e4m3fn),
        Variable("coefficient", Role.GLOBAL, (), torch.float32),
        Variable("loss", Role.OUTPUT, (), torch.float32),
    ]
    with mode:
        vals = {v.name: torch.empty(v.shape, dtype=v.dtype) for v in [table, *others]}
        on_gpu = torch.empty((2, 3, 4), device="cuda:1").transpose(0, 2)
        pair = (torch.empty(2), None, [torch.empty(1, 1), float])
    w = new_placeholder(graph, table, vals[table.name])
    m = new_placeholder(graph, others[1], float)
    same_target = new_placeholder(graph, Variable("momentum ", Role.HYPER, (), torch.float64), float)
    same_target.target = "v_momentum__1"
    gpu = torch.device("cuda:1")
    made = handmade.call(graph, aten.full.default, on_gpu, [2, 3], math.inf, dtype=torch.int64, device=gpu)
    handmade.call(graph, aten.nan_to_num.default, on_gpu, made, nan=-math.inf, posinf=math.nan, neginf=-0.0)
    handmade.call(
        graph, aten.empty.memory_format, on_gpu, [], dtype=torch.complex64, layout=torch.strided,
        device=torch.device("cpu"), pin_memory=False, memory_format=torch.channels_last,
    )  # fmt: skip
    handmade.call(graph, aten.div.Tensor_mode, on_gpu, w, 1e-08, rounding_mode="floor")
    handmade.call(graph, aten.index.Tensor, pair, w, [None, made])
    handmade.call(graph, aten.mul.Scalar, on_gpu, w, complex(-0.0, math.inf))
    handmade.call(graph, operator.getitem, bool, (w, (), (m,), [made, [1, -2]], True), 2)
    handmade.call(graph, torch.sym_max, int, m, 10**30)
    handmade.call(graph, math.trunc, int, m)
    handmade.call(graph, aten._assert_async.msg, None, w, 'say "%w" \n\t\\ \u2028 # (')
    last = graph.call_function(aten.detach.default, (w,))
    for node, place in ((w, Owners("emb")), (m, EVERYWHERE), (made, Server(2)), (last, TRAINERS)):
        put(node, place)
    graph.output({"g": last, "loss": m})
    guards = (Guard('m != 0 and s == "x"', ("m", "s"), ("momentum", "warmup")), Guard("True", (), ()))
    return Program(graph, {v.name: v for v in [table, *others]}, guards)


def test_golden_momentum():
    program, values = handmade.momentum_step()
    check_golden("text/momentum", to_text(program))
    check_same_results(program, values)


def test_golden_every_argument():
    program = every_argument()
    check_golden("text/every_argument", to_text(program))
    check_round_trip(program)


def test_values_come_back():
    program = every_argument()
    modes = set()
    for old, new in zip(program.graph.nodes, parse(to_text(program)).graph.nodes, strict=True):
        assert ("val" in old.meta) == ("val" in new.meta)
        assert place_of(old) == place_of(new)
        tensors = zip(*(torch.utils._pytree.tree_leaves(n.meta.get("val")) for n in (old, new)), strict=True)
        for before, after in tensors:
            if not isinstance(before, torch.Tensor):
                assert before is after
                continue
            modes.add(after.fake_mode)
            assert before.shape == after.shape
            assert before.stride() == after.stride()
            assert (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
    assert len(modes) == 1


def test_arguments_come_back():
    program = every_argument()
    for old, new in zip(program.graph.nodes, parse(to_text(program)).graph.nodes, strict=True):
        assert repr(old.args) == repr(new.args)
        assert repr(old.kwargs) == repr(new.kwargs)


def test_every_field_of_a_variable_is_written():
    """A field that is added to Variable must be added to the text: each, changed alone, changes the text."""
    plain = Variable("w", Role.PARAM, (2,), torch.float32)
    part = Selection("r", "elements", 1, 4, 1)
    kept = (Selection("w", server=2),)
    other = Variable(
        *("v", Role.BUFFER, (3,), torch.int8, "p", True, ("q",), part, kept),
        **{
            "lazy": True,
            "along": "batch",
            "dynamic": (0,),
            "initial": 0.5,
            "unbounded": Settings(4, admission=CountFilter(3)),
            "own": Own("r", (3, 2), 2),
        },
    )
    for field in dataclasses.fields(Variable):
        changed = dataclasses.replace(plain, **{field.name: getattr(other, field.name)})
        assert changed != plain, f"Variable.{field.name} is the default"
        graph = Graph()
        graph.output({})
        again = parse(to_text(Program(graph, {changed.name: changed})))
        assert dict(again.variables) == {changed.name: changed}, f"Variable.{field.name} is lost in text"


def test_comments_and_empty_lines_mean_nothing():
    text = to_text(handmade.tiny())
    assert to_text(parse("# a comment\n\n" + text.replace("\n", "\n   # another\n\n"))) == text


def test_random_ops_round_trip():
    x = torch.randn(8, 8)
    w = handmade.variable("w", Role.PARAM, x)
    program = handmade.traced(lambda x: (torch.nn.functional.dropout(x, 0.5, True),), {w: x}, [w])
    check_same_results(program, {"w": x})


def test_loss_and_gradients_of_a_network_round_trip():
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Embedding(7, 4), torch.nn.Conv1d(5, 3, 2), torch.nn.BatchNorm1d(3), torch.nn.Flatten(),
        torch.nn.GELU(), torch.nn.LayerNorm(9), torch.nn.Linear(9, 2),
    )  # fmt: skip
    net.eval()
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    buffers = {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    batch = {"ids": torch.randint(0, 7, (4, 5)), "labels": torch.randint(0, 2, (4,))}

    def loss(parameters, buffers, ids, labels):
        logits = torch.func.functional_call(net, (parameters, buffers), (ids,))
        return torch.nn.functional.cross_entropy(logits, labels)

    def step(*flat):
        split, last = len(parameters), len(flat) - 2
        held = (
            dict(zip(parameters, flat[:split], strict=True)),
            dict(zip(buffers, flat[split:last], strict=True)),
        )
        gradients, value = torch.func.grad_and_value(loss)(*held, *flat[last:])
        return *gradients.values(), value

    groups = {Role.PARAM: parameters, Role.BUFFER: buffers, Role.INPUT: batch}
    reads = {handmade.variable(k, role, v): v for role, group in groups.items() for k, v in group.items()}
    writes = [handmade.variable(f"{k}.grad", Role.GRAD, v, of=k) for k, v in parameters.items()]
    program = handmade.traced(step, reads, [*writes, Variable("loss", Role.OUTPUT, (), torch.float32)])
    assert len(program.graph.nodes) > 50
    check_same_results(program, {v.name: value for v, value in reads.items()})


# Random graphs of pointwise ops.

UNARY = [aten.neg.default, aten.sigmoid.default, aten.sqrt.default, aten.detach.default, aten.t.default]
BINARY = [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor]
SHAPES = [(), (3,), (2, 3), (1, 3), (0, 3)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
NUMBERS = st.one_of(st.floats(allow_nan=True), st.integers(-100, 100))


@st.composite
def pointwise_programs(draw) -> tuple[Program, dict[str, object]]:
    """A random graph: some tensors and one host number, then ops on whatever is there."""
    graph, variables, values = Graph(), {}, {}
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    names = draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3, unique=True))
    tensors = []
    for name in names:
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
        values[name] = (torch.arange(max(1, math.prod(shape)))[: math.prod(shape)].reshape(shape) - 1).to(dtype)
        variables[name] = handmade.variable(name, Role.PARAM, values[name])
        tensors.append(new_placeholder(graph, variables[name], mode.from_tensor(values[name])))
        tensors[-1].target = tensors[-1].name
    variables["host"] = Variable("host", Role.HYPER, (), torch.float64)
    values["host"] = draw(st.floats(-2, 2))
    number = new_placeholder(graph, variables["host"], float)
    number.target = number.name
    number = handmade.call(graph, operator.mul, float, number, draw(st.floats(-4, 4)))
    for _ in range(draw(st.integers(1, 8))):
        tensors.append(draw_op(draw, graph, mode, tensors, number))
    graph.output({name: draw(st.sampled_from(tensors)) for name in variables if name != "host"})
    return Program(graph, variables), values


def draw_op(draw, graph, mode, tensors, number):
    first = draw(st.sampled_from(tensors))
    matching = [t for t in tensors if t.meta["val"].shape == first.meta["val"].shape]
    second = draw(st.one_of(st.sampled_from(matching), st.just(number), NUMBERS))
    kind = draw(st.sampled_from(["unary", "binary", "cast"]))
    if kind == "cast":
        node = graph.call_function(aten._to_copy.default, (first,), {"dtype": draw(st.sampled_from(DTYPES))})
    elif kind == "unary" and first.meta["val"].dtype != torch.int64:
        node = graph.call_function(draw(st.sampled_from(UNARY[: 5 if first.meta["val"].dim() < 3 else 4])), (first,))
    else:
        op = draw(st.sampled_from(BINARY))
        node = graph.call_function(op, (first, second))
    with mode:
        arguments = torch.fx.map_arg(node.args, lambda n: 1.0 if n is number else n.meta["val"])
        node.meta["val"] = node.target(*arguments, **node.kwargs)
    return node


@settings(max_examples=60, deadline=None)
@given(pointwise_programs())
def test_pointwise_graphs_round_trip(made):
    check_same_results(*made)


WORDS = [
    *(torch.float32, torch.bool, torch.qint8, torch.strided, torch.sparse_coo, torch.preserve_format),
    *(torch.device("cpu"), torch.device("cuda"), torch.device("cuda:3"), None, True, False),
]
CONSTANTS = st.recursive(
    st.one_of(st.integers(), st.floats(), st.text(), st.complex_numbers(), st.sampled_from(WORDS)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(CONSTANTS)
def test_constants_round_trip(value):
    graph = Graph()
    graph.call_function(operator.getitem, (value, 0), {"nan": value})
    graph.output({})
    node, old = (next(iter(p.graph.nodes)) for p in (parse(to_text(Program(graph, {}))), Program(graph, {})))
    assert repr((node.args, node.kwargs)) == repr((old.args, old.kwargs))


# Errors.

HEAD = 'program\nparam  "w": f32[2]\n%v_w: f32[2] = read "w"\n'
BAD_TEXTS = ["", "programme", "program x"]
BAD_LINES = [
    "?",
    'param "w": f32[2]',
    'param "u" f32[2]',
    'param "u": f33[2]',
    'param "u": f32',
    'param "u": f32[-2]',
    'param "u": f32[2] rows [1]',
    "param u: f32[2]",
    'param "\\x": f32[2]',
    'param "u: f32[2]',
    'guard "x" 3 = "w"',
    "%v_w = aten.neg.default(%v_w)",
    "%sum = aten.neg.default(%v_w)",
    "%y = aten.neg.default(%z)",
    "%y = aten.neg.default(%v_w",
    "%y = aten.neg.default(%v_w %v_w)",
    "%y = aten.neg.default(%v_w) %v_w",
    "%y = aten.neg.default(f(3))",
    "%y = aten.neg.default(complex(1,a))",
    "%y = aten.neg.default(a=1, a=2)",
    "%y = os.system(1)",
    "%y = aten.nope.default(1)",
    "%y = aten.mm(1)",
    "%y = syncwright.nope.default(1)",
    "%y = operator.methodcaller(1)",
    "%y: host str = operator.add(1, 2)",
    "%y: f32[2] on mars = aten.neg.default(%v_w)",
    'write "w" = 3',
    'write "w" = %v_w\nwrite "w" = %v_w',
]


def message_of(text: str) -> str:
    with pytest.raises(TextError) as caught:
        parse(text)
    return str(caught.value)


def test_golden_bad_text():
    messages = [message_of(text) for text in BAD_TEXTS + [HEAD + line for line in BAD_LINES]]
    check_golden("text/bad_text", "\n".join(messages) + "\n")


def broken(change) -> Program:
    program = handmade.tiny()
    change(program, next(n for n in program.graph.nodes if n.op == "call_function"))
    return program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, n: n.meta.update(val="x"),
         "%add: found the value 'x', expected a fake tensor, a host type or a tuple of them; trace it so"),
        (lambda p, n: n.meta.update(val=torch.eye(2).to_sparse()),
         "%add: found a torch.sparse_coo tensor of shape (2, 2), expected a strided one of fixed sizes; "
         "trace it with fixed shapes"),
        (lambda p, n: (setattr(n, "op", "get_attr"), setattr(n, "target", "constant")),
         "%add: found get_attr of constant, expected an op of aten, prims, syncwright, "
         "_c10d_functional, profiler or of host numbers; trace it so"),
        (lambda p, n: setattr(n, "target", print),
         "%add: found call_function of print, expected an op of aten, prims, syncwright, "
         "_c10d_functional, profiler or of host numbers; trace it so"),
        (lambda p, n: setattr(n, "args", (n.args[0], slice(1))),
         "%add: found the argument slice(None, 1, None), expected a node, constant or list of them; "
         "give it as one"),
        (lambda p, n: p.placeholders["w"].meta.pop("variable"),
         '%v_w: found a placeholder without meta["variable"], expected its variable; use new_placeholder'),
        (lambda p, n: setattr(p.output, "args", ({"w": 3},)),
         '"w": found the result 3, expected a node; write the value of one'),
        (lambda p, n: p.variables.update(u=p.variables["w"]),
         '"w": found under "u", expected its own name; file it so'),
    ],
)  # fmt: skip
def test_program_without_text_names_the_node(change, message):
    with pytest.raises(TextError) as caught:
        to_text(broken(change))
    assert str(caught.value) == message


def test_guard_without_text():
    program = dataclasses.replace(handmade.tiny(), guards=(Guard("m", ("m",), ()),))
    with pytest.raises(TextError, match="expected an identifier for each variable that it reads; pair them"):
        to_text(program)


# Diffs.


def test_diff_ignores_renumbering():
    program, _ = handmade.momentum_step()
    again = parse(to_text(program).replace("%mul", "%mul_7_"))
    assert diff(program, program) == ""
    text = to_text(program)
    for number in reversed(range(6)):
        text = text.replace(f"%mul_{number}", f"%mul_{number + 3}")
    assert text != to_text(program)
    assert diff(program, parse(text)) == ""
    assert diff(program, again) != ""


def test_golden_diff():
    before = parse(
        HEAD
        + """
        %mul: f32[2] = aten.mul.Tensor(%v_w, 2.0)
        %mul_1: f32[2] = aten.mul.Tensor(%mul, %v_w)
        %mul_2: f32[2] = aten.mul.Tensor(%mul_1, %mul)
        write "w" = %mul_2"""
    )
    after = parse(
        HEAD
        + """
        %mul: f32[2] = aten.mul.Tensor(%v_w, 2.0)
        %neg: f32[2] = aten.neg.default(%mul)
        %mul_1: f32[2] = aten.mul.Tensor(%neg, 3.0)
        %mul_2: f32[2] = aten.mul.Tensor(%mul, %v_w)
        %mul_5: f32[2] = aten.mul.Tensor(%mul_2, %mul_1)
        write "w" = %mul_5"""
    )
    check_golden("text/diff", diff(before, after) + "\n")
