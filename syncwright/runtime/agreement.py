"""The check that replicas are equal: digests of what every trainer holds, compared after a step."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence

import torch

from syncwright.errors import Disagreement
from syncwright.passes.average import communicates
from syncwright.plan import ALL, Collective, Plan
from syncwright.plan.groups import Members
from syncwright.program import Program, Role
from syncwright.update import followed


def replicated(program: Program, plan: Plan, values: Iterable[str]) -> list[str]:
    """Which of a trainer's `values` are to be equal on all trainers: what is all-reduced or gathered, with its state and what
    follows it, other buffers that are not local, and state of no parameter (a loss scale)."""
    shared = {s.variable for s in plan.sharings if isinstance(s.sync, Collective)}
    buffers, follows = dict(plan.buffers), followed(program)
    found = []
    for variable in [program.variables[name] for name in values if name in program.variables]:
        owner = follows.get(variable.name, variable.of or variable.name)
        if variable.role is Role.BUFFER and owner == variable.name:
            is_shared = communicates(plan) and buffers.get(owner) != "local"
        elif variable.role is Role.STATE and variable.of is None:
            is_shared = communicates(plan)
        else:
            is_shared = owner in shared
        found += [variable.name] if is_shared else []
    return found


def digest(values: Sequence[object]) -> torch.Tensor:
    """64 bits for each value, equal for equal bits."""
    return torch.tensor([_hash(value) for value in values], dtype=torch.int64)


def alike(name: str, program: Program, plan: Plan) -> Members:
    """The groups of trainers on which a variable is to be equal."""
    variable = program.variables[name]
    if variable.role is Role.STATE and variable.of is None:  # it follows from all gradients of a trainer
        among = [plan.groups.alike(s.sync) for s in plan.sharings if isinstance(s.sync, Collective)]
        return max([plan.groups.members(ALL), *among], key=len)
    owner = followed(program).get(name, variable.of or name)
    sync = next((sharing.sync for sharing in plan.sharings if sharing.variable == owner), None)
    return plan.groups.members(ALL) if sync is None else plan.groups.alike(sync)


def check_equal(names: Mapping[str, Members], digests: Sequence[torch.Tensor], step: int) -> None:
    """Raises `Disagreement` for the first variable whose replicas differ after `step` steps.

    names  with the groups of trainers among which each is to be equal
    """
    for (name, groups), row in zip(names.items(), torch.stack(list(digests)).T.tolist(), strict=True):
        first = {rank: each[0] for each in groups for rank in each}
        apart = [rank for rank, each in enumerate(row) if each != row[first[rank]]]
        if apart:
            where = "all trainers" if len(groups) == 1 else "all trainers of its group"
            others = f"{'have' if len(apart) > 1 else 'has'} other bits than trainer {first[apart[0]]}"
            raise Disagreement(
                f"'{name}' is not the same on {where} after step {step - 1}: trainer{'s' * (len(apart) > 1)} "
                f"{', '.join(map(str, apart))} {others}. Expected replicas to be "
                "equal after every step. Look for something that writes to the values of one trainer, and for hardware that "
                "computes differently."
            )


def _hash(value: object) -> int:
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        data = struct.pack("d", value)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
