"""capture(): one training step as a Program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils import _pytree as pytree

from syncwright.capture.axes import Axes, dynamic_axes, name_of
from syncwright.capture.examples import Shapes, with_examples
from syncwright.capture.lookups import with_sparsity
from syncwright.capture.normalize import normalize
from syncwright.capture.state import Binding
from syncwright.capture.trace import returned_shapes, trace
from syncwright.program import Along, Program, Role, Variable
from syncwright.tree import with_paths


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """A program and what joins it to the user's objects.

    returned   how the step's result is put together from the OUTPUT variables
    means      what is said of means over something else than all examples
    constants  values of the variables named `constant.*`: tensors made inside the step from numbers
    modes      of every module, whether it trains when the step ends (`Binding.set_modes`)
    """

    program: Program
    returned: pytree.TreeSpec
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    modes: tuple[bool, ...]
    means: tuple[str, ...] = ()


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
    step: Callable,
    binding: Binding,
    optimizer: object,
    batch: tuple,
    dynamic: Axes | None = None,
    returns: Along | None = None,
    remote: Collection[str] | None = None,
) -> Captured:
    """`capture` for a caller that keeps the binding.

    dynamic  axes of any size
    returns  what the tensors are that the step returns, where that need not be found out
    remote   in an evaluation, the tables of any ids that servers keep (see `Unbounded`)
    """
    inputs = batch_variables(batch, dynamic or {})
    traced = trace(step, binding, optimizer, batch, inputs, remote)
    constants: dict[str, torch.Tensor] = {}
    program = normalize(traced, constants)
    outputs = program.writes[: traced.leaves]
    program = replace(program, variables=with_sparsity(program))

    def shapes(other: tuple) -> Shapes:
        return returned_shapes(step, binding, optimizer, other, batch_variables(other, {}), remote)

    if returns is not None:
        known = {name: replace(program.variables[name], along=returns) for name in outputs}
        program = replace(program, variables={**program.variables, **known})
    else:
        program = replace(program, variables=with_examples(program, outputs, batch, shapes))
    return Captured(program, traced.returned, outputs, constants, traced.modes, traced.means)


def batch_variables(batch: tuple, dynamic: Axes) -> tuple[Variable, ...]:
    """An INPUT variable per tensor of a batch, named by its place in the tree. A trace takes sizes of 0 and 1 as fixed."""
    found = []
    for path, leaf in with_paths(batch):
        if isinstance(leaf, torch.Tensor):
            name = name_of(path)
            axes = tuple(axis for axis in dynamic.get(name, ()) if leaf.shape[axis] > 1)
            found.append(Variable(name, Role.INPUT, tuple(leaf.shape), leaf.dtype, dynamic=axes))
    return tuple(found)
