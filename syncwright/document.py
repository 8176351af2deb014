"""YAML files that people write: read into values which know where they stand, and written for reading.

    read("default: alreduce\\n", "rules").value["default"]
        -> Node(value="alreduce", line=1, path="default", ...)
    .error("one of local, all_reduce", "Did you mean 'all_reduce'?")
        -> rules, line 1, at default: found 'alreduce', expected one of local, all_reduce. Did you mean ...

Keys are always text, also where YAML would read a truth value or a number (`on: 1`). A key may stand once.
Anchors and aliases are refused: they hide what a file says, and a few lines of them can fill the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from syncwright.errors import SyncwrightError
from syncwright.near import did_you_mean

MAPPING, LIST = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a YAML file, and where it stands.

    value   dict[str, Node], list[Node], or a scalar
    source  the file's name, or what the text is ("rules")
    line    counted from 1
    path    keys from the top, "variables[2].embed.*"; "" for the whole document
    error   (method) makes the error of the kind that this document's faults are
    """

    value: Any
    source: str
    line: int
    path: str
    kind: type[SyncwrightError]

    @property
    def where(self) -> str:
        return f"{self.source}, line {self.line}, at {self.path}" if self.path else self.source

    @property
    def found(self) -> str:
        """The value in words."""
        match self.value:
            case None:
                return "nothing"
            case bool():
                return f"{str(self.value).lower()} (unquoted on, off, yes and no are truth values in YAML)"
            case dict():
                keys = ", ".join(repr(key) for key in self.value)
                return f"a mapping with the keys {keys}" if keys else "an empty mapping"
            case list():
                return f"a list of {len(self.value)}"
            case _:
                return repr(self.value)

    def error(self, expected: str, do: str, found: str = "") -> SyncwrightError:
        return self.kind(f"{self.where}: found {found or self.found}, expected {expected}. {do}")

    def items(self, expected: str, do: str) -> list[Node]:
        """The nodes of a list."""
        if not isinstance(self.value, list):
            raise self.error(expected, do)
        return self.value

    def mapping(self, expected: str, do: str) -> dict[str, Node]:
        """The nodes of a mapping whose keys are free."""
        if not isinstance(self.value, dict):
            raise self.error(expected, do)
        return self.value

    def record(self, keys: Sequence[str], do: str) -> dict[str, Node]:
        """The nodes of a mapping whose keys are known."""
        listed = f"one of {', '.join(keys)}" if len(keys) > 1 else ", ".join(keys) or "no key"
        nodes = self.mapping("a mapping" + (f" (keys: {', '.join(keys)})" if keys else " without keys"), do)
        for key, node in nodes.items():
            if key not in keys:
                advice = did_you_mean(key, keys, "Take the line out or correct its key.")
                raise node.error(listed, advice, found=f"the key {key!r}")
        return nodes


def read(source: str | Path, name: str, kind: type[SyncwrightError]) -> Node:
    """The document that `source` is: a path (a `Path`, or text that ends in .yaml or .yml), or its text.

    `name` stands in errors where there is no file name; faults are raised as `kind`.
    """
    if isinstance(source, Path) or ("\n" not in source and source.endswith((".yaml", ".yml"))):
        name, text = str(source), _file_text(Path(source), kind)
    else:
        text = source
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        top = loader.get_single_node()
        if top is None:
            return Node(None, name, 1, "", kind)
        return _Walk(loader, name, kind, set()).node(top, "")
    except SyncwrightError:
        raise
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise kind(f"{name}{line}: found text that is not YAML ({fault.problem}). {_ADVICE}") from None
    except (yaml.YAMLError, ValueError) as fault:
        raise kind(f"{name}: found text that is not YAML ({fault}). Correct it.") from None
    except RecursionError:
        raise kind(f"{name}: found values nested hundreds deep, expected a few levels. Flatten it.") from None
    finally:
        if loader is not None:
            loader.dispose()


_ADVICE = "Check the indentation and the colons; a pattern that starts with * or [ stands in quotes."


def _file_text(path: Path, kind: type[SyncwrightError]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise kind(f"{path}: found bytes that are not UTF-8 ({fault.reason}). Save it as UTF-8 text.") from None
    except OSError as fault:
        raise kind(f"{path}: cannot be read ({fault.strerror}). Check the path.") from None


@dataclass(frozen=True, slots=True)
class _Walk:
    """From PyYAML's nodes, which know lines, to ours. `seen` holds the ids of the nodes walked so far."""

    loader: yaml.SafeLoader
    name: str
    kind: type[SyncwrightError]
    seen: set[int]

    def node(self, node: yaml.Node, path: str) -> Node:
        line = node.start_mark.line + 1
        if id(node) in self.seen:
            raise self.kind(f"{self.name}, line {line}, at {path}: found an alias. Write the value out.")
        self.seen.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == MAPPING:
            return Node(self._mapping(node, path), self.name, line, path, self.kind)
        if isinstance(node, yaml.SequenceNode) and node.tag == LIST:
            items = [self.node(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
            return Node(items, self.name, line, path, self.kind)
        return Node(self.loader.construct_object(node, deep=True), self.name, line, path, self.kind)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self.kind(f"{self.name}, line {line}: found a list or mapping as a key, expected text.")
            inner = f"{path}.{key.value}" if path else key.value
            if key.value in nodes:
                first = nodes[key.value].line
                raise self.kind(
                    f"{self.name}, line {line}, at {inner}: found this key a second time (first on line "
                    f"{first}), expected it once. Take one of the two out."
                )
            nodes[key.value] = self.node(value, inner)
        return nodes


def write(value: Any, flow: Sequence[str] = ()) -> str:
    """Plain values as YAML for reading: a line per key; lists of numbers and what `flow` keys hold inline.

    write({"sizes": [3, 1]}) == "sizes: [3, 1]\\n"
    """
    top = yaml.SafeDumper(StringIO(), sort_keys=False).represent_data(_fresh(value))
    _lay_out(top, frozenset(flow), inline=False)
    return yaml.serialize(top, Dumper=yaml.SafeDumper, width=1_000_000)


def _fresh(value: Any) -> Any:
    """A deep copy with tuples as lists, in which no two collections are one: PyYAML would write an alias."""
    match value:
        case dict():
            return {key: _fresh(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_fresh(inner) for inner in value]
        case _:
            return value


def _lay_out(node: yaml.Node, flow: frozenset[str], inline: bool) -> None:
    match node:
        case yaml.MappingNode():
            node.flow_style = inline or not node.value
            for key, value in node.value:
                _lay_out(value, flow, inline or key.value in flow)
        case yaml.SequenceNode():
            numbers = all(item.tag == "tag:yaml.org,2002:int" for item in node.value)
            node.flow_style = inline or numbers
            for item in node.value:
                _lay_out(item, flow, inline)
        case _:
            return
