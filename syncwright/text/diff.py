"""What differs between two programs, as text; names that only moved on by a number do not count."""

from __future__ import annotations

import difflib
import re

from syncwright.program import Program
from syncwright.text.write import to_text

_NAME = re.compile(r'"(?:[^"\\]|\\.)*"|%(?P<name>\w+)')


def diff(before: Program, after: Program) -> str:
    """A unified diff of two texts, empty if they are equal but for the numbers in nodes' names.

        -%mul_3: f32[4] = aten.mul.Tensor(%g, 0.5)
        +%div: f32[4] = aten.div.Tensor(%g, 2)

    Nodes of `after` are called as their counterparts in `before`; one that has none, and whose name is taken,
    gets a prime (%mul').
    """
    old, new = to_text(before).splitlines(), to_text(after).splitlines()
    names = _counterparts(old, new)
    lines = [_renamed(line, names) for line in new]
    return "\n".join(difflib.unified_diff(old, lines, "before", "after", lineterm=""))


def _counterparts(old: list[str], new: list[str]) -> dict[str, str]:
    """For every node of `new` the name to show: that of the line of `old` which is equal without numbers."""
    matcher = difflib.SequenceMatcher(None, [_unnumbered(line) for line in old], [_unnumbered(line) for line in new])
    pairs = [(old[a + i], new[b + i]) for a, b, size in matcher.get_matching_blocks() for i in range(size)]
    names = {_defined(line): _defined(match) for match, line in pairs if _defined(line)}
    taken = set(names.values())
    rest = [name for line in new if (name := _defined(line)) and name not in names]
    return names | {name: name + "'" * (name in taken) for name in rest}


def _defined(line: str) -> str:
    match = re.match(r"%(\w+)", line)
    return match[1] if match else ""


def _unnumbered(line: str) -> str:
    return _NAME.sub(lambda m: f"%{re.sub(r'_[0-9]+$', '', m['name'])}" if m["name"] else m[0], line)


def _renamed(line: str, names: dict[str, str]) -> str:
    return _NAME.sub(lambda m: f"%{names.get(m['name'], m['name'])}" if m["name"] else m[0], line)
