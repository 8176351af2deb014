"""What trainers that train alone do when they meet: an outer step, captured like a user's own and lowered like it.

    def meet(model, optimizer, latest):                     model: what all had after the last exchange
        for value, its in zip(model, latest): value.grad = value - its
        optimizer.step()                                    the outer one; for a mean SGD with lr 1

Its gradients are all-reduced and joined in buckets as any, or pushed to servers, which then run its update. So any optimizer
that can be captured is an outer one, exactly, and its state is as that of a user's optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

from syncwright.capture import Captured, capture_step
from syncwright.capture.axes import Axes
from syncwright.capture.state import Binding
from syncwright.errors import LoweringError
from syncwright.job import Clock, Interface
from syncwright.meaning import followed
from syncwright.meeting_steps import geo, geo_of_rows, meet, meet_at_servers
from syncwright.passes.average import communicates
from syncwright.passes.compact_lookups import READS
from syncwright.plan import (
    AllReduce,
    BufferPolicy,
    Geo,
    LocalSteps,
    Mean,
    Optimizer,
    ParameterServer,
    Plan,
    asks_for_hosts,
    served_by,
)
from syncwright.program import Program, Role, Variable
from syncwright.schema import argument
from syncwright.update import find_updates

_NONE: Mapping[str, BufferPolicy] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class OuterStep:
    """A captured outer step, and the plan by which it is lowered.

    interface  which values the program reads and writes
    hypers     the outer optimizer's numbers, which never change
    """

    clock: Clock
    program: Program
    plan: Plan
    interface: Interface
    hypers: Mapping[str, float]


def _plain() -> Optimizer:
    """The optimizer of a mean, and of differences that are added. (Made when it is used: with its first optimizer torch imports
    what takes as long as the rest of it, and not every process needs one.)"""
    return Optimizer.of("SGD", lr=1.0)


def outer_steps(program: Program, plan: Plan) -> list[OuterStep]:
    """The outer steps of a plan, one for each way in which variables are exchanged; none of a mean on one trainer.

    Buffers that the step writes go with the exchange that comes most often, where nothing else is reduced in every step;
    what follows a parameter (an average of its values) goes with it. Where nobody waits for the others they go with none.
    """
    groups = _groups(program, plan)
    buffers = {} if communicates(plan) else _buffers(program, plan)
    follows = followed(program)
    found = []
    for sync, names in sorted(groups.items(), key=lambda item: (item[0].every, item[0].start)):
        if sync.is_geo:
            found += _geo_steps(program, plan, sync, names)
            continue
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
            and not (alone and isinstance(sync.outer, Mean | Geo))
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
    """The mean, or the update of an outer optimizer."""
    outer = sync.outer if isinstance(sync.outer, Optimizer) else _plain()
    given = _Given(program, names, buffers, outer)
    is_served = served_by(sync) is not None
    captured = given.capture(meet_at_servers if is_served else meet, (given.latest,))
    its = _plan(plan, names, sync.over, buffers)
    _check_cut(captured.program, its, outer)
    inputs = dict(zip(_inputs(captured), given.latest, strict=True))
    written = captured.outputs if is_served else names
    results = {**dict(zip(written, names, strict=True)), **{name: name for name in buffers}}
    return given.step(captured, sync, its, Interface(inputs, {}, results, results))


def _geo_steps(program: Program, plan: Plan, sync: LocalSteps, names: Sequence[str]) -> list[OuterStep]:
    """Differences that are added as they come; of each table alone, as other rows of it travel than of others."""
    tables = [name for name in names if plan.sharing(name).rows]
    dense = [name for name in names if name not in tables]
    found = [_geo(program, plan, sync, dense)] if dense else []
    return found + [_geo_of_rows(program, plan, sync, name) for name in tables]


def _geo(program: Program, plan: Plan, sync: LocalSteps, names: Sequence[str]) -> OuterStep:
    given = _Given(program, names, {}, _plain())
    its = {name: torch.zeros_like(tensor) for name, tensor in given.latest.items()}
    captured = given.capture(geo(plan.trainers), (given.latest, its))
    read, results = _inputs(captured), captured.outputs
    latest, base = (dict(zip(part, names, strict=True)) for part in (read[: len(names)], read[len(names) :]))
    goes_on, keeps = (dict(zip(part, names, strict=True)) for part in (results[: len(names)], results[len(names) :]))
    return given.step(captured, sync, _plan(plan, names, _as_it_comes(sync)), Interface(latest, base, goes_on, keeps))


def _geo_of_rows(program: Program, plan: Plan, sync: LocalSteps, name: str) -> OuterStep:
    given = _Given(program, [name], {}, _plain())
    count = _looked_up(program, name, sync.every)
    some = given.latest[name].new_zeros((count, *given.latest[name].shape[1:]))
    batch = torch.zeros(count, dtype=torch.int64, device=some.device), some, torch.zeros_like(some)
    captured = given.capture(geo_of_rows(plan.trainers), batch, {f"batch.{index}": (0,) for index in range(len(batch))})
    ids, latest, base = _inputs(captured)
    goes_on, keeps = captured.outputs
    interface = Interface({latest: name}, {base: name}, {goes_on: name}, {keeps: name}, ids)
    return given.step(captured, sync, _plan(plan, [name], _as_it_comes(sync)), interface)


def _looked_up(program: Program, name: str, steps: int) -> int:
    """How many rows of a table so many steps look up, at most, for the example of an exchange that takes any number. A trace
    takes sizes of 0 and 1 as fixed."""
    reads = [node for node in program.placeholders[name].users if node.target in READS]
    ids = sum(argument(node, "indices").meta["val"].numel() for node in reads)  # type: ignore[union-attr]
    return max(2, min(program.variables[name].shape[0], steps * ids))


class _Given:
    """What an outer step is captured on: a module with variables of these names, whose values stand for nothing."""

    def __init__(
        self, program: Program, names: Sequence[str], buffers: Mapping[str, BufferPolicy], outer: Optimizer
    ) -> None:
        self.model, self.outer = _model(program, names, buffers), outer
        self.optimizer = outer.build(list(self.model.parameters()))
        self.binding = Binding(self.model, self.optimizer)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.latest = {name: tensor.detach() for name, tensor in named}

    def capture(self, meet: Callable, batch: tuple, dynamic: Axes | None = None) -> Captured:
        captured = capture_step(meet, self.binding, self.optimizer, batch, dynamic, returns="batch")
        if captured.constants:
            raise LoweringError(
                f"the outer optimizer {self.outer.name} makes tensors of its own in each update, which is not supported. "
                "Expected an update made from values, gradients, state and numbers. Use SGD or Adam."
            )
        return captured

    def step(self, captured: Captured, sync: LocalSteps, plan: Plan, interface: Interface) -> OuterStep:
        variables = _with_initial(captured.program, self.binding, self.outer)
        program = replace(captured.program, variables=variables)
        return OuterStep(Clock(sync.every, sync.start), program, plan, interface, self.binding.hyper_values())


def _inputs(captured: Captured) -> list[str]:
    return [v.name for v in captured.program.of_role(Role.INPUT)]


def _as_it_comes(sync: LocalSteps) -> ParameterServer:
    by = served_by(sync)
    assert by is not None, "LocalSteps sees to it"
    return replace(by, mode="async")


def _plan(
    plan: Plan, names: Sequence[str], sync: AllReduce | ParameterServer, buffers: Mapping[str, BufferPolicy] = _NONE
) -> Plan:
    """The plan by which an outer step of these variables is lowered."""
    sharings = tuple(replace(plan.sharing(name), sync=sync) for name in names)
    servers, reducer = (plan.servers, plan.reducer) if any(s.owners for s in sharings) else (0, None)
    hosts = plan.hosts if asks_for_hosts(sync) else ()
    return Plan(plan.digest, plan.trainers, servers, reducer, sharings, tuple(buffers.items()), hosts=hosts)


def _check_cut(program: Program, plan: Plan, outer: Optimizer) -> None:
    """Servers run the outer update on pieces only where it is elementwise."""
    kinds = find_updates(program).kinds()
    for sharing in plan.sharings:
        if len(sharing.sizes) > 1 and kinds.get(sharing.variable) != "elementwise":
            raise LoweringError(
                f"'{sharing.variable}' is cut into {len(sharing.sizes)} pieces, but the update of the outer optimizer "
                f"{outer.name} is not elementwise. Expected an update that can be cut. Keep the variable whole: partition: "
                "whole."
            )


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
