"""The command `syncwright`: run a job, look at what it will do, check it against one device."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from typer.core import TyperCommand

from syncwright.errors import RequestError, SyncwrightError

app = typer.Typer(
    help="Write the training step for one device; choose per variable how it is kept in sync on many.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Start(StrEnum):
    """How `run` starts roles."""

    AUTO = "auto"
    FORK = "fork"
    SPAWN = "spawn"


class TakesScript(TyperCommand):
    """Its options may stand before or behind the script; those it does not know, and all behind `--`, are the script's.

    Something near to an option of its own is refused: a slip would go to a script that ignores it.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        known = [name for parameter in self.params for name in parameter.opts if name.startswith("--")]
        for word in (word.partition("=")[0] for word in own if word.startswith("--")):
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.85)
            if near and word not in known:
                ctx.fail(f"No such option: {word}. Did you mean {near[0]}? An option of the script's goes behind `--`.")
        return super().parse_args(ctx, args)


_OWN_OPTIONS_FIRST = {"allow_interspersed_args": False}
_OPTIONS_ANYWHERE = {"ignore_unknown_options": True}

Script = Annotated[
    str, typer.Argument(metavar="SCRIPT", help="The script that calls distribute(...) and .step(*batch).")
]
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="The script's own arguments.")]
Trainers = Annotated[int | None, typer.Option(min=1, help="How many trainers. [default: 2, or a complete plan's]")]
Servers = Annotated[
    int | None, typer.Option(min=0, help="How many servers; 0: one inside each trainer. [default: 0, or a plan's]")
]
PlanOption = Annotated[
    str | None, typer.Option("--plan", help="A strategy or a YAML file, instead of the script's plan.")
]
Disabled = Annotated[str, typer.Option(metavar="A,B", help="Passes to leave out, to find the one at fault.")]


@app.command(context_settings=_OWN_OPTIONS_FIRST)
def run(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="The script to run in every role.")],
    arguments: Arguments = None,
    trainers: Annotated[int, typer.Option(min=1, help="How many trainers.")] = 2,
    servers: Annotated[int, typer.Option(min=0, help="How many server processes; 0: threads of the trainers.")] = 0,
    disable_passes: Disabled = "",
    metrics: Annotated[bool, typer.Option("--metrics", help="Every role serves its numbers, for top too.")] = False,
    start: Annotated[
        Start, typer.Option(help="Roles as copies of one process that has imported, or each by itself.")
    ] = Start.AUTO,
) -> None:
    """Run SCRIPT as a job of several processes on this machine; all behind SCRIPT is its own."""
    from syncwright.lower import pipeline
    from syncwright.passes import PIPELINE
    from syncwright.runtime.forking import can_fork
    from syncwright.runtime.launch import launch
    from syncwright.runtime.membership import DISABLED_PASSES, METRICS

    with _errors():
        pipeline(PIPELINE, _listed(disable_passes))
        if not Path(script).is_file():
            raise RequestError(f"script: found no file {script!r}, expected a Python script. Check the path.")
        asked = ({DISABLED_PASSES: disable_passes} if disable_passes else {}) | ({METRICS: "1"} if metrics else {})
        forks = can_fork() if start is Start.AUTO else start is Start.FORK
        environment = {**os.environ, **asked}
        raise typer.Exit(launch(script, _behind(arguments), trainers, servers, environment=environment, forks=forks))


@app.command(cls=TakesScript, context_settings=_OPTIONS_ANYWHERE)
def show(
    script: Script,
    arguments: Arguments = None,
    trainers: Trainers = None,
    servers: Servers = None,
    plan: PlanOption = None,
    program: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="A program as text: trainer, idle, captured, server:K or exchange:K."),
    ] = None,
    after: Annotated[str | None, typer.Option(metavar="PASS", help="The trainer's program after this pass.")] = None,
    diff: Annotated[
        str | None, typer.Option(metavar="PASS", help="What this pass changed; A..B: from after A to after B.")
    ] = None,
    memory: Annotated[bool, typer.Option("--memory", help="What every role will hold.")] = False,
    disable_passes: Disabled = "",
) -> None:
    """Show the plan as a table, or the program of a role as text. Runs SCRIPT up to its first step."""
    from syncwright.lower import lower
    from syncwright.passes import JOINING
    from syncwright.view import planned, programs
    from syncwright.view.look import look
    from syncwright.view.memory import memory_table
    from syncwright.view.tables import show_table, show_text

    console, without = Console(), _listed(disable_passes)
    with _errors():
        _check_views(program, after, diff, memory)
        seen = look(script, arguments or (), plan, trainers, servers)
        if diff is not None:
            show_text(console, programs.text_of_difference(diff, seen.program, seen.plan, without))
        elif after is not None:
            show_text(console, programs.text_after(after, seen.program, seen.plan, without).rstrip())
        elif program is not None:
            job = lower(seen.program, seen.plan, without)
            show_text(console, programs.program_text(program, seen.program, job).rstrip())
        elif memory:
            show_table(console, memory_table(seen.program, lower(seen.program, seen.plan, without)))
        else:
            unbucketed = lower(seen.program, seen.plan, (*without, *JOINING))
            show_table(console, planned.plan_table(seen.program, seen.plan, unbucketed))
            notes = planned.plan_notes(seen.program, seen.plan, lower(seen.program, seen.plan, without))
            show_text(console, "\n" + "\n".join(notes))


@app.command(cls=TakesScript, context_settings=_OPTIONS_ANYWHERE)
def plan(
    strategy: Annotated[str, typer.Argument(metavar="STRATEGY", help="A strategy's name, or a YAML file of rules.")],
    script: Script,
    arguments: Arguments = None,
    trainers: Trainers = None,
    servers: Servers = None,
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the strategy.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Write the rules, and not the complete plan.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Write a strategy's plan for SCRIPT as YAML, to be read, edited and given as `plan=`."""
    from syncwright.view.look import look, rules_of

    with _errors():
        options = dict(_pair(text) for text in option or ())
        seen = look(script, arguments or (), None, trainers, servers, lambda p: rules_of(strategy, p, options))
        text = rules_of(strategy, seen.program, options).to_yaml() if rules else seen.plan.to_yaml()
        if output is None:
            sys.stdout.write(text)
        else:
            output.write_text(text, encoding="utf-8")


@app.command(cls=TakesScript, context_settings=_OPTIONS_ANYWHERE)
def verify(
    script: Script,
    arguments: Arguments = None,
    trainers: Trainers = None,
    servers: Servers = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps, all on the script's first batch.")] = 5,
    plan: PlanOption = None,
    disable_passes: Disabled = "",
) -> None:
    """Train a few steps on the plan and on one device and compare every variable; status 1 beyond tolerance."""
    from syncwright.view.checked import show_check
    from syncwright.view.look import look

    with _errors():
        seen = look(script, arguments or (), plan, trainers, servers)
        if not show_check(Console(), Console(stderr=True), seen, steps, _listed(disable_passes)):
            raise typer.Exit(1)


@app.command()
def top(
    at: Annotated[
        str | None, typer.Option("--at", metavar="HOST:PORT", help="The job's store. [default: the job of this host]")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
) -> None:
    """Watch a running job: how far each role is, what it sends and takes in, for whom it waits."""
    from syncwright.view.top import show_top

    with _errors():
        show_top(Console(), at, once)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A part of the steps, to see that it works.")] = False,
) -> None:
    """Train on 261,536 real flights with two trainers and a server, and check it. Three minutes on two cores."""
    from syncwright.demo.course import demonstrate

    with _errors():
        raise typer.Exit(demonstrate(Console(), quick))


@contextmanager
def _errors() -> Iterator[None]:
    """What is raised on purpose becomes a message and status 2."""
    try:
        yield
    except SyncwrightError as error:
        for note in getattr(error, "__notes__", ()):
            sys.stderr.write(f"{note}\n")
        sys.stderr.write(f"syncwright: {error}\n")
        raise typer.Exit(2) from None


def _check_views(program: str | None, after: str | None, diff: str | None, memory: bool) -> None:
    if memory and (program or after or diff):
        raise RequestError(
            "--memory: found beside --program, --after or --diff, expected it alone: it shows no program."
        )
    if after is not None and diff is not None:
        raise RequestError("--after and --diff: found both, expected one. `--diff A..B` says between which passes.")
    if program not in (None, "trainer") and (after is not None or diff is not None):
        raise RequestError(
            f"--program {program}: found beside --after or --diff, expected trainer. Passes rewrite its program only."
        )


def _behind(arguments: list[str] | None) -> list[str]:
    """A script's arguments without the `--` that may stand before them."""
    given = list(arguments or ())
    return given[1:] if given[:1] == ["--"] else given


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _pair(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise RequestError(f"--option: found {text!r}, expected NAME=VALUE, such as min_elements=1.")
    return name, yaml.safe_load(value)
