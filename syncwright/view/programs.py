"""The program of a role as text; the whole program after any pass, and what a pass changed."""

from __future__ import annotations

from collections.abc import Sequence

from syncwright.errors import RequestError
from syncwright.job import Job
from syncwright.lower import pipeline
from syncwright.near import did_you_mean
from syncwright.passes import PIPELINE
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.text import diff, to_text

CAPTURED = "captured"
ROLES = ("trainer", "idle", CAPTURED)


def program_text(role: str, program: Program, job: Job) -> str:
    """The text of `trainer`, `idle` (a trainer without examples), `captured`, `server:K` or `exchange:K`; where calls accumulate,
    or gradients are applied one step late, also of other phases of a trainer: `between`, `first`, `last`.

    Raises `RequestError` for a role that the job has not.
    """
    match role:
        case "captured":
            return to_text(program)
        case "trainer":
            return to_text(job.trainer["step"])
        case "idle":
            return to_text(job.trainer["idle"])
    exchanges = {f"exchange:{number}": each for number, each in enumerate(job.exchanges)}
    if role in exchanges:
        return to_text(exchanges[role].job.trainer["step"])
    if role in job.trainer:
        return to_text(job.trainer[role])
    phases = [phase for phase in job.trainer if phase not in ("step", "idle")]
    known = [*ROLES, *phases, *(f"server:{part.rank}" for part in job.servers), *exchanges]
    if role not in known:
        advice = did_you_mean(role, known, "Write one of them.")
        raise RequestError(f"--program: found {role!r}, expected one of {', '.join(known)}. {advice}")
    return _server_text(job, int(role.partition(":")[2]))


def text_after(name: str, program: Program, plan: Plan, without: Sequence[str] = ()) -> str:
    """The whole program once the pass `name` has run; `captured`: before any."""
    return to_text(_stages([name], program, plan, without)[name])


def text_of_difference(span: str, program: Program, plan: Plan, without: Sequence[str] = ()) -> str:
    """What the pass `span` changed in the whole program; of `A..B`, what changed from after A to after B."""
    first, dots, last = span.partition("..")
    if not dots:
        first, last = _before(span, without), span
    stages = _stages([first, last], program, plan, without)
    return diff(stages[first], stages[last]) or f"no difference between {first} and {last}"


def _before(name: str, without: Sequence[str]) -> str:
    names = [CAPTURED, *(each.__name__ for each in pipeline(PIPELINE, without))]
    _check(name, names[1:])
    return names[names.index(name) - 1]


def _stages(wanted: Sequence[str], program: Program, plan: Plan, without: Sequence[str]) -> dict[str, Program]:
    """The program after each of the passes `wanted`."""
    passes = pipeline(PIPELINE, without)
    for name in wanted:
        _check(name, [CAPTURED, *(each.__name__ for each in passes)])
    found = {CAPTURED: program}
    for each in passes:
        program = each(program, plan)
        found[each.__name__] = program
    return {name: found[name] for name in wanted}


def _check(name: str, known: Sequence[str]) -> None:
    if name not in known:
        advice = did_you_mean(name, known, "Write one of them.")
        raise RequestError(f"pass: found {name!r}, expected one of {', '.join(known)}. {advice}")


def _server_text(job: Job, rank: int) -> str:
    part = job.servers[rank]
    held = [f"# server {rank} holds {', '.join(v.name for v in part.holds) or 'nothing'}"]
    programs = [
        f"# program {number} of {len(part.programs)}, once per step, when all that it reads is there\n{to_text(each)}"
        for number, each in enumerate(part.programs, start=1)
    ]
    return "\n".join([*held, *programs])
