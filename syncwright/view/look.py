"""A script's step, captured, with the plan for a number of trainers and servers: what the commands look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from syncwright.capture import capture
from syncwright.capture.own_scale import scaled_by
from syncwright.cluster import trainers_by_host
from syncwright.errors import PlanError
from syncwright.plan import Plan, Rules
from syncwright.planning import PlanSource, complete_plan, loss_scale_of, make_plan, plan_variables
from syncwright.program import Program
from syncwright.runtime.intercept import FirstStep
from syncwright.strategies import named
from syncwright.view.script import first_step

TRAINERS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """The first step of a script, as a program, and its plan."""

    first: FirstStep
    program: Program
    plan: Plan


def look(
    script: str,
    arguments: Sequence[str],
    source: PlanSource | str | Path | None = None,
    trainers: int | None = None,
    servers: int | None = None,
    choose: Callable[[Program], PlanSource] | None = None,
) -> Look:
    """Runs a script up to its first step.

    source             a plan instead of the script's own; or `choose`, which makes one of the program
    trainers, servers  default: those of a complete plan; else two trainers and, as `syncwright run` does without
                       server processes, one server inside each; all trainers are on one host, unless SYNCWRIGHT_HOSTS says who is
                       where
    """
    first = first_step(script, arguments)
    given = source if source is not None else first.plan
    if choose is not None:
        given = choose(_captured(first))
    first = replace(first, step=scaled_by(first.step, loss_scale_of(given)))
    program = _captured(first)
    complete = complete_plan(given)
    trainers = trainers or (complete.trainers if complete else TRAINERS)
    if servers is None:
        servers = complete.servers if complete else 0
    hosts = trainers_by_host(os.environ, trainers) or None
    return Look(first, program, make_plan(complete or given, program, trainers, servers or trainers, hosts))


def _captured(first: FirstStep) -> Program:
    return capture(first.step, first.model, first.optimizer, *first.batch, state=first.state)


def rules_of(strategy: str, program: Program, options: Mapping[str, object]) -> Rules:
    """The rules of a named strategy with options, or of a YAML file."""
    if strategy.endswith((".yaml", ".yml")):
        if options:
            raise PlanError(f"{strategy}: found options for a file of rules, expected none. Write them in the file.")
        return Rules.from_yaml(Path(strategy))
    return named(strategy, plan_variables(program), **options)
