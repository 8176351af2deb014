"""capture(): one training step as a Program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from syncwright.capture.axes import Axes, dynamic_axes, name_of
from syncwright.capture.normalize import normalize
from syncwright.capture.state import Binding
from syncwright.capture.trace import trace
from syncwright.program import Program, Role, Variable


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A program and what joins it to the user's objects.

    returned   how the step's result is put together from the OUTPUT variables
    constants  values of the variables named `constant.*`: tensors made inside the step from numbers
    modes      of every module, whether it trains when the step ends (`Binding.set_modes`)
    """

    program: Program
    returned: pytree.TreeSpec
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    modes: tuple[bool, ...]


def capture(
    step: Callable,
    model: nn.Module,
    optimizer: object,
    *batch: object,
    state: Mapping[str, nn.Module] | None = None,
    dynamic_shapes: object = None,
) -> Program:
    """The whole step (forward, backward, clipping, optimizer) as one functional program.

        before  def step(model, optimizer, x, y):
                    optimizer.zero_grad(); loss = F.mse_loss(model(x), y); loss.backward(); optimizer.step(); return loss
        after   reads batch.0, batch.1, weight, weight.exp_avg, ..., optimizer.0.lr
                writes loss, weight, weight.exp_avg, ...

    step       `step(model, optimizer, *batch)`: returns a loss, or a loss and a tree of metrics
    optimizer  one `torch.optim` optimizer, a tuple or a dict of them
    batch      an example; tensors anywhere in a tree. Shapes are those of the program, but for dynamic axes
    state      further modules that the step writes (an EMA copy), by a name of your choice
    dynamic_shapes  axes of any size, as `torch.export` takes them: `({0: "n"}, {0: "n"})` for two tensors; so are those
               of an example with `torch._dynamo.mark_dynamic(tensor, axis)`

    Nothing of the user's is changed, also when this fails. Raises `CaptureError`, quoting the line, for steps that no
    graph stands for.
    """
    dynamic = dynamic_axes(batch, dynamic_shapes)
    return capture_step(step, Binding(model, optimizer, state), optimizer, batch, dynamic).program


def capture_step(
    step: Callable, binding: Binding, optimizer: object, batch: tuple, dynamic: Axes | None = None
) -> Captured:
    """`capture` for a caller that keeps the binding. `dynamic`: axes of any size."""
    inputs = batch_variables(batch, dynamic or {})
    traced = trace(step, binding, optimizer, batch, inputs)
    constants: dict[str, torch.Tensor] = {}
    program = normalize(traced, constants)
    program = replace(program, variables=_with_sparsity(program))
    return Captured(program, traced.returned, program.writes[: traced.leaves], constants, traced.modes)


def batch_variables(batch: tuple, dynamic: Axes) -> tuple[Variable, ...]:
    """An INPUT variable per tensor of a batch, named by its place in the tree. A trace takes sizes of 0 and 1 as fixed."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        if isinstance(leaf, torch.Tensor):
            name = name_of(path)
            axes = tuple(axis for axis in dynamic.get(name, ()) if leaf.shape[axis] > 1)
            found.append(Variable(name, Role.INPUT, tuple(leaf.shape), leaf.dtype, dynamic=axes))
    return tuple(found)


_LOOKUPS = {torch.ops.aten.embedding.default: 0, torch.ops.aten._embedding_bag.default: 0}
_SPARSE_GRADIENTS = frozenset(
    {torch.ops.aten.embedding_dense_backward.default, torch.ops.aten._embedding_bag_dense_backward.default}
)


def _with_sparsity(program: Program) -> dict[str, Variable]:
    """Marks parameters whose gradient is made by lookups alone."""
    variables = dict(program.variables)
    for node in program.graph.nodes:
        if str(node.target) == "syncwright.gradient.default":
            name = node.args[1]
            if _from_lookups(node.args[0]):
                variables[name] = replace(variables[name], sparse=True)
    return variables


def _from_lookups(node: Node) -> bool:
    """The gradient is a lookup's, or the sum of several lookups' of one table."""
    if node.target is torch.ops.aten.add.Tensor:
        return all(isinstance(a, Node) and _from_lookups(a) for a in node.args)
    return node.target in _SPARSE_GRADIENTS
