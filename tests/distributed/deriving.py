"""Prints what every role derives in a process of its own, and all must agree on: plans, programs, digests of jobs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from syncwright import capture
from syncwright.job import Job
from syncwright.lower import lower
from syncwright.plan import Hash, ParameterServer, Plan, Rules
from syncwright.planning import make_plan
from syncwright.program import Program
from syncwright.text import to_text
from tests import zoo
from tests.equivalence import DTYPES, PLANS, Family, plan_for

FAMILIES = (
    Family("mlp", "Adam", "float32", True),
    Family("tied", "SGD-nesterov", "float64", True),
    Family("conv_train", "Muon", "float32", False),
    Family("transformer", "Adafactor", "float32", True),
)
TRAINERS, SERVERS = 3, 3


def captured(family: Family) -> Program:
    model, optimizer = zoo.make_model(family.model, family.optimizer, DTYPES[family.dtype])
    (batch,) = zoo.make_batches(family.model, DTYPES[family.dtype], 4, 1)
    return capture(zoo.make_step(family.model, family.clip), model, optimizer, *batch)


def plans(program: Program) -> Iterator[Plan]:
    """Those of the matrix, and one that places by hash."""
    for name in PLANS:
        yield plan_for(program, name, TRAINERS, SERVERS)
    yield make_plan(Rules(ParameterServer(place=Hash())), program, TRAINERS, SERVERS)


def text_of(job: Job) -> str:
    programs = [*job.trainer.values(), *(program for part in job.servers for program in part.programs)]
    return "\n".join([job.plan.to_yaml(), *map(to_text, programs), f"digest: {job.digest}"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for family in FAMILIES:
        program = captured(family)
        for plan in plans(program):
            print(f"# {family.model}, {family.optimizer}\n{text_of(lower(program, plan))}")
