"""What a user gives as `plan=` to the complete plan of a program."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from syncwright.document import read
from syncwright.errors import PlanError
from syncwright.meaning import followed
from syncwright.plan import Dynamic, Plan, Rules, check, resolve
from syncwright.program import Program, Role, Variable
from syncwright.strategies import named
from syncwright.text import op_name
from syncwright.untouched import leaves_rows_alone
from syncwright.update import Updates, find_updates

PlanSource = str | Path | Rules | Plan


def make_plan(
    source: PlanSource, program: Program, trainers: int, servers: int, hosts: Sequence[int] | None = None
) -> Plan:
    """A strategy's name, a YAML file of rules or of a complete plan, `Rules` or a `Plan`, resolved and checked.

    hosts  how many trainers each host has, in the order of their numbers; None: as a complete plan says, else all on one;
           () where nobody knows

    Raises `PlanError` where it cannot be meant for this program.
    """
    updates = find_updates(program)
    variables, digest = plan_variables(program), program_digest(program, updates)
    match source:
        case Plan():
            plan = source
        case Rules():
            still = {v.name for v in variables if v.sparse and leaves_rows_alone(program, updates, v.name)}
            kinds, order = _kinds(updates, variables), _use_order(program)
            return resolve(source, variables, kinds, trainers, servers, digest, still, hosts, order)
        case str() | Path() if _is_file(source):
            plan = complete_plan(source)
            if plan is None:
                return make_plan(Rules.from_yaml(source), program, trainers, servers, hosts)
        case str():
            return make_plan(named(source, variables), program, trainers, servers, hosts)
        case _:
            raise PlanError(
                f"plan: found a {type(source).__name__}, expected a strategy's name, the path of a YAML file, Rules or "
                "a Plan. Give one of these, such as plan='all_reduce'."
            )
    _check_numbers(plan, trainers, servers)
    _check_hosts(plan, hosts)
    check(plan, variables, digest)
    return plan


def complete_plan(source: PlanSource) -> Plan | None:
    """The plan, where `source` is one or a file that holds one; None for everything that is still to be resolved."""
    if isinstance(source, Plan):
        return source
    if isinstance(source, str | Path) and _is_file(source) and "digest" in _keys(source):
        return Plan.from_yaml(source)
    return None


def loss_scale_of(source: PlanSource) -> Dynamic | None:
    """By what a plan, or the rules that it is to be made from, scale the loss; known before there is a program."""
    if isinstance(source, str | Path) and _is_file(source):
        source = complete_plan(source) or Rules.from_yaml(source)
    return source.loss_scale if isinstance(source, Rules | Plan) else None


def plan_variables(program: Program) -> list[Variable]:
    """What a plan is about: parameters in registration order, and the buffers that the step writes."""
    written, follows = set(program.writes), followed(program)
    buffers = [v for v in program.of_role(Role.BUFFER) if v.name in written and v.name not in follows]
    return [*program.of_role(Role.PARAM), *buffers]


def program_digest(program: Program, updates: Updates) -> str:
    """Equal for programs with the same variables and updates; batch shapes are left out."""
    kept = (Role.PARAM, Role.BUFFER, Role.STATE, Role.HYPER)
    lines = [repr(v) for v in program.variables.values() if v.role in kept]
    lines += [f"{v.name} {v.unbounded.to_text()}" for v in program.variables.values() if v.unbounded is not None]
    lines += [f"{op_name(n.target) or n.target} {type(m).__name__}" for n, m in updates.meanings.items()]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def _kinds(updates: Updates, variables: list[Variable]) -> dict:
    """A foreign update is whole to a plan; lowering says why it cannot be served."""
    kinds = {name: "whole" if kind == "foreign" else kind for name, kind in updates.kinds().items()}
    return {v.name: kinds.get(v.name) for v in variables if v.role is Role.PARAM}


def _use_order(program: Program) -> list[str]:
    """The parameters that the step uses, in the order in which it first does."""
    places = {node: place for place, node in enumerate(program.graph.nodes)}
    read = {v.name: program.placeholders[v.name] for v in program.of_role(Role.PARAM) if v.name in program.reads}
    return sorted(
        (name for name in read if read[name].users), key=lambda name: min(map(places.__getitem__, read[name].users))
    )


def _is_file(source: str | Path) -> bool:
    return isinstance(source, Path) or source.endswith((".yaml", ".yml"))


def _keys(source: str | Path) -> set[str]:
    value = read(source, "plan", PlanError).value
    return set(value) if isinstance(value, dict) else set()


def _check_numbers(plan: Plan, trainers: int, servers: int) -> None:
    if plan.trainers != trainers or plan.servers > servers:
        raise PlanError(
            f"plan: made for {plan.trainers} trainers and {plan.servers} servers, found {trainers} and {servers}. "
            f"Expected the same number of trainers and at least as many servers. Start the job with "
            f"--trainers {plan.trainers} --servers {plan.servers}, or make the plan anew."
        )


def _check_hosts(plan: Plan, hosts: Sequence[int] | None) -> None:
    if plan.hosts and hosts is not None and tuple(hosts) != plan.hosts:
        raise PlanError(
            f"plan: made for hosts with {_listed(plan.hosts)} trainers, found {_listed(hosts) or 'unknown ones'}. Expected the "
            "same, as it shares by hosts. Start the job so (SYNCWRIGHT_HOSTS says who is where), or make the plan anew."
        )


def _listed(hosts: Sequence[int]) -> str:
    return ", ".join(map(str, hosts))


def with_servers(plan: Plan, servers: int) -> Plan:
    """The plan on more servers than it names: those beyond have nothing to do."""
    return replace(plan, servers=max(plan.servers, servers))
