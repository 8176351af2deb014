"""The rule that only a run can check: what a program is given stays as it is, to the bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Interpreter, Node

from syncwright.program import Program
from syncwright.text import quote
from syncwright.verify.causes import InputChanged


def verify_inputs_unchanged(program: Program, values: Mapping[str, object]) -> None:
    """Runs `program` on copies of `values`; raises InputChanged, naming variable and node, if one changes.

    Some ops write to their inputs without a word in their schema (aten.native_batch_norm): `verify` cannot
    see it. Random generators are left as they were.
    """
    with torch.random.fork_rng():
        given = _copies(program, values)
        program.run(given)
        tensors = [name for name in program.reads if isinstance(values[name], torch.Tensor)]
        changed = [name for name in tensors if _bits(given[name]) != _bits(values[name])]
        if not changed:
            return
        writer = _Watch(program, _copies(program, values)).writer(changed[0])
    names = ", ".join(quote(name) for name in changed)
    op = f"%{writer.name} ({writer.target})" if writer else "a node that does so only sometimes"
    remedy = "replace the op by one that returns the new value"
    raise InputChanged(names, f"it changed by {op}", "inputs as they were given", remedy)


class _Watch(Interpreter):
    """Runs a program node by node until a variable's value changes."""

    def __init__(self, program: Program, values: Mapping[str, object]) -> None:
        super().__init__(GraphModule({}, program.graph))
        self.values = [values[name] for name in program.reads]
        self.place = {name: at for at, name in enumerate(program.reads)}

    def writer(self, name: str) -> Node | None:
        """The first node behind which the value of `name` is another one."""
        value = self.values[self.place[name]]
        self.watched, self.before, self.found = value, _bits(value), None
        self.run(*self.values)
        return self.found

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if self.found is None and _bits(self.watched) != self.before:
            self.found = n
        return result


def _copies(program: Program, values: Mapping[str, object]) -> dict[str, object]:
    return {name: v.clone() if isinstance(v := values[name], torch.Tensor) else v for name in program.reads}


def _bits(value: object) -> bytes:
    assert isinstance(value, torch.Tensor), "only tensors can be written to"
    return value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
