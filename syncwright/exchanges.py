"""What trainers that train alone do when they meet: an outer step, captured like a user's own and lowered like it.

    def meet(model, optimizer, latest):                     model: what all had after the last exchange
        for value, its in zip(model, latest): value.grad = value - its
        optimizer.step()                                    the outer one; for a mean SGD with lr 1

Its gradients are all-reduced and joined in buckets as any: base - mean(base - latest) is base + mean(latest - base). So
any optimizer that can be captured is an outer one, exactly, and its state is as that of a user's optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from syncwright.capture import capture_step
from syncwright.capture.state import Binding
from syncwright.errors import LoweringError
from syncwright.job import Clock
from syncwright.meaning import followed
from syncwright.passes.average import communicates
from syncwright.plan import BufferPolicy, LocalSteps, Mean, Optimizer, Plan
from syncwright.program import Program, Role, Variable

_MEAN = Optimizer.of("SGD", lr=1.0)


@dataclass(frozen=True, slots=True, eq=False)
class OuterStep:
    """A captured outer step, and the plan by which it is lowered.

    latest  by input of the program, the variable whose latest value it is
    hypers  the outer optimizer's numbers, which never change
    """

    clock: Clock
    program: Program
    plan: Plan
    latest: Mapping[str, str]
    hypers: Mapping[str, float]


def outer_steps(program: Program, plan: Plan) -> list[OuterStep]:
    """The outer steps of a plan, one for each way in which variables are exchanged; none of a mean on one trainer.

    Buffers that the step writes go with the exchange that comes most often, where nothing else is reduced in every step;
    what follows a parameter (an average of its values) goes with it.
    """
    groups = _groups(program, plan)
    buffers = {} if communicates(plan) else _buffers(program, plan)
    follows = followed(program)
    found = []
    for sync, names in sorted(groups.items(), key=lambda item: (item[0].every, item[0].start)):
        its: dict[str, BufferPolicy] = {
            b: _policy(program.variables[b]) for b, parameter in follows.items() if parameter in names
        }
        found.append(_outer_step(program, plan, sync, names, {**buffers, **its}))
        buffers = {}
    return found


def _groups(program: Program, plan: Plan) -> dict[LocalSteps, list[str]]:
    found: dict[LocalSteps, list[str]] = {}
    written, alone = set(program.writes), plan.trainers == 1
    for sharing in plan.sharings:
        sync = sharing.sync
        if (
            isinstance(sync, LocalSteps)
            and sharing.variable in written
            and not (alone and isinstance(sync.outer, Mean))
        ):
            found.setdefault(sync, []).append(sharing.variable)
    return found


def _buffers(program: Program, plan: Plan) -> dict[str, BufferPolicy]:
    written = set(program.writes)
    return {name: policy for name, policy in plan.buffers if policy != "local" and name in written}


def _policy(buffer: Variable) -> BufferPolicy:
    return "mean" if buffer.dtype.is_floating_point else "trainer0"


def _outer_step(
    program: Program, plan: Plan, sync: LocalSteps, names: Sequence[str], buffers: Mapping[str, BufferPolicy]
) -> OuterStep:
    model = _model(program, names, buffers)
    outer = sync.outer if isinstance(sync.outer, Optimizer) else _MEAN
    optimizer = outer.build(list(model.parameters()))
    latest = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    binding = Binding(model, optimizer)
    captured = capture_step(_meet, binding, optimizer, (latest,))
    if captured.constants:
        raise LoweringError(
            f"the outer optimizer {outer.name} makes tensors of its own in each update, which is not supported. Expected an "
            "update made from values, gradients, state and numbers. Use SGD or Adam."
        )
    sharings = tuple(replace(plan.sharing(name), sync=sync.over) for name in names)
    its_plan = Plan(plan.digest, plan.trainers, 0, None, sharings, tuple(buffers.items()))
    inputs = [v.name for v in captured.program.of_role(Role.INPUT)]
    variables = _with_initial(captured.program, binding, outer)
    return OuterStep(
        Clock(sync.every, sync.start),
        replace(captured.program, variables=variables),
        its_plan,
        dict(zip(inputs, latest, strict=True)),
        binding.hyper_values(),
    )


def _meet(model: nn.Module, optimizer: torch.optim.Optimizer, latest: Mapping[str, torch.Tensor]) -> tuple:
    optimizer.zero_grad()
    values = dict(model.named_parameters())
    torch.autograd.backward(list(values.values()), [v.detach() - latest[name] for name, v in values.items()])
    optimizer.step()
    for name, buffer in model.named_buffers():
        buffer.copy_(latest[name])
    return ()


def _model(program: Program, names: Sequence[str], buffers: Mapping[str, BufferPolicy]) -> nn.Module:
    """A module with variables of these names, shapes and dtypes; their values stand for nothing."""
    model = nn.Module()
    for name in names:
        owner, key = _owner(model, name)
        owner.register_parameter(key, nn.Parameter(_zeros(program, name)))
    for name in buffers:
        owner, key = _owner(model, name)
        owner.register_buffer(key, _zeros(program, name))
    return model


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where "encoder.0.weight" goes: the module "encoder.0", made where it is not there, and "weight"."""
    *path, key = name.split(".")
    for part in path:
        if part not in dict(model.named_children()):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model, key


def _zeros(program: Program, name: str) -> torch.Tensor:
    variable, node = program.variables[name], program.placeholders.get(name) or program.results[name]
    return torch.zeros(variable.shape, dtype=variable.dtype, device=node.meta["val"].device)


def _with_initial(program: Program, binding: Binding, outer: Optimizer) -> dict[str, Variable]:
    """State says what it begins with, so that nobody needs the optimizer again."""
    variables, values = dict(program.variables), binding.values()
    for variable in program.of_role(Role.STATE):
        value = values[variable.name]
        first = value.reshape(-1)[0] if value.numel() else torch.zeros(())
        if not torch.equal(value, first.to(value.dtype).expand(value.shape)):
            raise LoweringError(
                f"the outer optimizer {outer.name} begins with other numbers for each element of '{variable.name}', which is not "
                "supported. Expected state that begins as one number. Use SGD or Adam."
            )
        variables[variable.name] = replace(variable, initial=float(first))
    return variables
