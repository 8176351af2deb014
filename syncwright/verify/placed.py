"""The rules of places in a whole program: what a node reads is where it runs, or a communication brings it."""

from __future__ import annotations

from torch.fx import Node

from syncwright import ops
from syncwright.place import EVERYWHERE, TRAINERS, Owners, Place, Server, place_of
from syncwright.program import Program, Role, Variable
from syncwright.text import place_text, quote
from syncwright.verify.causes import ReadElsewhere, UnknownOwners, UnknownVariable, WrittenElsewhere, WrongCrossing


def check_places(program: Program) -> None:
    """Raises the error of the first rule that the places of `program` break; nothing to do where all is on trainers."""
    if not any(place_of(node) != TRAINERS for node in program.graph.nodes):
        return
    for node in program.graph.nodes:
        if node.op == "placeholder":
            _check_read(node, program.variables[node.meta["variable"]])
        elif node.op == "call_function":
            _check_owners(node, program)
            (_check_crossing if node.target in ops.CROSSINGS else _check_sources)(node, program)
    for name, node in program.results.items():
        _check_written(name, node, program.variables[name])


def _home(variable: Variable) -> Place:
    """Where a variable is kept."""
    return Owners(variable.of or variable.name) if variable.kept else TRAINERS


def _check_read(node: Node, variable: Variable) -> None:
    place = place_of(node)
    everywhere = place == EVERYWHERE and variable.role is Role.HYPER
    if not everywhere and place != _home(variable):
        expected = f"it {_at(_home(variable))}, where the variable is kept"
        about = f"%{node.name}, which reads {quote(variable.name)}"
        raise ReadElsewhere(about, f"it {_at(place)}", expected, "read it there, and let it cross")


def _check_owners(node: Node, program: Program) -> None:
    place = place_of(node)
    if isinstance(place, Owners) and (place.variable not in program.variables or not _kept(program, place)):
        found, remedy = f"it {_at(place)}, which no server keeps", "name a parameter that servers keep"
        raise UnknownOwners(f"%{node.name}", found, "the owners of a variable with parts that are kept", remedy)


def _kept(program: Program, place: Owners) -> int:
    return len(program.variables[place.variable].kept)


def _check_sources(node: Node, program: Program) -> None:
    place = place_of(node)
    for source in node.all_input_nodes:
        there = place_of(source)
        if there not in (place, EVERYWHERE):
            about, found = f"%{node.name} {_at(place)}", f"a read of %{source.name} {_at(there)}"
            raise ReadElsewhere(
                about, found, "what runs in the same place", "let it cross: push.merged, pull.value or send"
            )


def _check_crossing(node: Node, program: Program) -> None:
    """What trainers push goes to servers, what they pull comes from servers, and servers send to one another."""
    source, channel = node.args[:2]
    from_trainers, to_trainers = node.target in ops.PUSHES, node.target in ops.PULLS
    assert isinstance(source, Node), "arguments are checked before places"
    if channel not in program.variables:
        found, remedy = f"the channel {quote(str(channel))}", "add the variable to Program.variables"
        raise UnknownVariable(f"%{node.name}", found, "the name of a variable that says what crosses", remedy)
    start, end = place_of(source), place_of(node)
    fits = (start in (TRAINERS, EVERYWHERE)) if from_trainers else isinstance(start, Owners | Server)
    fits &= (end == TRAINERS) if to_trainers else isinstance(end, Owners | Server)
    if not fits:
        first, last = ("trainers" if from_trainers else "servers"), ("trainers" if to_trainers else "servers")
        found = f"it {_at(end)}, of %{source.name} {_at(start)}"
        raise WrongCrossing(f"%{node.name}", found, f"one from {first} to {last}", "use the op for these roles")
    parts = _kept(program, start) if isinstance(start, Owners) else 1
    if node.target is ops.gather and node.args[2] != parts:
        found, expected = f"{node.args[2]} parts gathered", f"{parts}, as many as %{source.name} has owners"
        raise WrongCrossing(f"%{node.name}", found, expected, "gather one from each")


def _check_written(name: str, node: Node, variable: Variable) -> None:
    place, home = place_of(node), _home(variable)
    if place not in (home, EVERYWHERE):
        about, found = f"{quote(name)}, written with %{node.name}", f"it {_at(place)}"
        raise WrittenElsewhere(about, found, f"it {_at(home)}, where the variable is kept", "let it cross")


def _at(place: Place) -> str:
    return place_text(place) or "at trainers"
