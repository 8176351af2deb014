"""A step tells which rows of a table it looks up, where trainers that train alone exchange those rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from syncwright.passes.compact_lookups import READS
from syncwright.plan import LocalSteps, Plan
from syncwright.program import Program, Role, Variable, set_results
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def note_lookups(program: Program, plan: Plan) -> Program:
    """The ids of a table's lookups become a result of the step, which stays on its trainer.

    before  %y = embedding(w, ids), ..., output({"loss": %loss, "w": %n})
    after   %y = embedding(w, ids), ..., %i = cat([reshape(ids, [-1])]), output({"loss": %loss, "w": %n, "lookups of w": %i})

    An id may stand there many times, and that of padding too.
    """
    tables = [s.variable for s in plan.sharings if s.rows and isinstance(s.sync, LocalSteps)]
    if plan.trainers == 1 or not tables:
        return program
    program = program.edit()
    known, variables, results = Inference(mode_of(program.graph)), dict(program.variables), dict(program.results)
    for name in tables:
        ids = _ids(program, known, program.placeholders[name])
        noted = Variable(
            noted_name(name), Role.OUTPUT, tuple(ids.meta["val"].shape), ids.meta["val"].dtype, along="batch"
        )
        variables[noted.name], results[noted.name] = noted, ids
    set_results(program, results)
    return replace(program, variables=variables)


def noted_name(table: str) -> str:
    """The result that holds the ids of a table's lookups."""
    return f"lookups of {table}"


def _ids(program: Program, known: Inference, table: Node) -> Node:
    with program.graph.inserting_before(program.output):
        reads = [argument(user, "indices") for user in table.users if user.target in READS]
        flat = [known.call(program.graph, aten.reshape.default, ids, [-1]) for ids in dict.fromkeys(reads)]
        return known.call(program.graph, aten.cat.default, flat)
