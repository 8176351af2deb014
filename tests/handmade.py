"""Small programs for tests, made from functions or from graphs written by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from syncwright.program import Guard, Program, Role, Variable, new_placeholder

aten = torch.ops.aten


def variable(name: str, role: Role, value: object, **facts) -> Variable:
    """The variable that `value`, a tensor or a host number, is a value of."""
    if isinstance(value, torch.Tensor):
        return Variable(name, role, tuple(value.shape), value.dtype, **facts)
    dtypes = {float: torch.float64, int: torch.int64, bool: torch.bool}
    return Variable(name, role, (), dtypes[type(value)], **facts)


def traced(step: Callable, reads: Mapping[Variable, torch.Tensor], writes: list[Variable]) -> Program:
    """`step`, a function from tensors to a tuple of tensors, as a program on variables."""
    pure = torch.func.functionalize(step, remove="mutations")
    module = make_fx(pure, tracing_mode="fake")(*reads.values())
    graph, made = Graph(), {}
    variables = iter(reads)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            made[node] = new_placeholder(graph, next(variables), node.meta["val"])
        elif node.op != "output":
            made[node] = graph.node_copy(node, made.__getitem__)
    results = [made[node] for node in module.graph.output_node().args[0]]
    graph.output({v.name: node for v, node in zip(writes, results, strict=True)})
    return Program(graph, {v.name: v for v in [*reads, *writes]})


def call(graph: Graph, op: Callable, val: object, *args, **kwargs) -> Node:
    """A new node whose value is like `val`, a tensor or a host type."""
    node = graph.call_function(op, args, kwargs)
    node.meta["val"] = val
    return node


def momentum_step() -> tuple[Program, dict[str, object]]:
    """A linear layer, its gradient by hand, and momentum with a correction on host numbers."""
    torch.manual_seed(0)
    weight, velocity, x = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    w = variable("fc.weight", Role.PARAM, weight, aliases=("out.weight",))
    v = variable("fc.weight.momentum_buffer", Role.STATE, velocity, of="fc.weight")
    batch = variable("batch.0", Role.INPUT, x)
    loss = Variable("loss", Role.OUTPUT, (), torch.float32)
    lr, beta = (variable(f"optimizer.0.{name}", Role.HYPER, 0.5) for name in ("lr", "momentum"))

    def step(weight, velocity, x):
        y = x @ weight.t()
        gradient = (2.0 * y / y.numel()).t() @ x
        velocity = (velocity * 0.9).add_(gradient)
        return weight, velocity, (y * y).mean()

    program = traced(step, {w: weight, v: velocity, batch: x}, [w, v, loss])
    graph, results = program.graph, program.results
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        rate, momentum = new_placeholder(graph, lr, float), new_placeholder(graph, beta, float)
    with graph.inserting_before(program.output):
        power = call(graph, operator.pow, float, momentum, 3)
        correction = call(graph, operator.truediv, float, rate, power)
        scaled = call(graph, aten.mul.Tensor, results[v.name].meta["val"], results[v.name], correction)
        new = call(graph, aten.sub.Tensor, scaled.meta["val"], results[w.name], scaled)
    program.output.args = ({**results, w.name: new},)
    variables = {**program.variables, lr.name: lr, beta.name: beta}
    guard = Guard("momentum != 0", ("momentum",), (beta.name,))
    values = {w.name: weight, v.name: velocity, batch.name: x, lr.name: 0.1, beta.name: 0.9}
    return Program(graph, variables, (guard,)), values


def tiny(role: Role = Role.PARAM, shape: tuple[int, ...] = (2,)) -> Program:
    """w = w + w: the smallest program, for tests that then break it."""
    value = torch.zeros(shape)
    w = variable("w", role, value)
    return traced(lambda w: (w + w,), {w: value}, [w])
