"""One line of program text, read from left to right; its place changes as it is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from typing import Any, NoReturn, TypeVar

import torch

from syncwright.text.words import CONSTANTS, NAMESPACES, TextError, find_op

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<node>%[A-Za-z_]\w*)
      | (?P<number>complex\([^)]*\) | -?\d+(?:\.\d+)?(?:e[+-]?\d+)? | -inf\b | -nan\b)
      | (?P<word>[A-Za-z_][\w.]*(?::\d+)?)
      | (?P<mark>[()\[\]:,=])
      | (?P<other>.)""",
    re.VERBOSE,
)
END = "the end of the line"
Choice = TypeVar("Choice")


class Line:
    """One line's tokens and how far they are read. What does not fit raises TextError with its place."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.text = text
        matches = [match for match in _TOKEN.finditer(text) if match.lastgroup != "space"]
        self.tokens = [match[0] for match in matches]
        self.columns = [match.start() for match in matches]
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        """A token that is not yet read; empty behind the last."""
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def accept(self, token: str) -> bool:
        """Reads `token` if it is next."""
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def take(self, token: str) -> None:
        """Reads `token`, which must be next."""
        if not self.accept(token):
            self.fail(f"`{token}`")

    def end(self) -> None:
        if self.peek():
            self.fail(END)

    def match(self, pattern: str, expected: str) -> str:
        """The next token, which must match a regular expression."""
        token = self.peek()
        if not re.fullmatch(pattern, token):
            self.fail(expected)
        self.at += 1
        return token

    def string(self, expected: str) -> str:
        if not self.peek().startswith('"'):
            self.fail(f"{expected} in double quotes")
        try:
            value = json.loads(self.peek(), strict=False)
        except ValueError:
            self.fail(f"{expected} in double quotes, escaped as in JSON")
        self.at += 1
        return value

    def fresh(self, pattern: str, expected: str, taken: Container[str]) -> str:
        """The next token or string, which must not have been given before."""
        start = self.at
        name = self.string(expected) if pattern == '"' else self.match(pattern, expected)
        if name in taken:
            self.at = start
            self.fail(f"{expected} that no earlier line or argument gives")
        return name

    def choose(self, choices: Mapping[str, Choice], expected: str) -> Choice:
        """What the next token stands for."""
        if self.peek() not in choices:
            self.fail(expected)
        self.at += 1
        return choices[self.tokens[self.at - 1]]

    def sequence(self, item: Callable[[], object]) -> list | tuple:
        """`[a, b]` or `(a, b)`, with `(a,)` for one."""
        close = "]" if self.accept("[") else ")"
        if close == ")":
            self.take("(")
        items = []
        while not self.accept(close):
            items.append(item())
            self.separator(close)
        return items if close == "]" else tuple(items)

    def separator(self, close: str) -> None:
        """A comma, or `close` ahead."""
        if not self.accept(",") and self.peek() != close:
            self.fail(f"`,` or `{close}`")

    def sizes(self) -> tuple[int, ...]:
        """`[3,4]`"""
        if self.peek() != "[":
            self.fail("sizes in brackets, such as [3,4]")
        return tuple(self.sequence(lambda: int(self.match(r"\d+", "a size"))))

    def device(self) -> torch.device:
        try:
            device = torch.device(self.peek())
        except RuntimeError:
            self.fail("a device, such as cuda:0")
        self.at += 1
        return device

    def constant(self) -> Any:
        """A number, dtype, layout, memory format, device or one of Python's own words."""
        token = self.peek()
        if token in CONSTANTS:
            return self.choose(CONSTANTS, "")
        try:
            if token.startswith("complex("):
                value: object = complex(*map(float, token[8:-1].split(",")))
            elif re.match("-?[0-9]|-inf|-nan", token):
                value = int(token) if re.fullmatch(r"-?\d+", token) else float(token)
            else:
                value = torch.device(token)
        except (RuntimeError, ValueError, TypeError):
            self.fail("a node, number, string, dtype, device, list or other constant")
        self.at += 1
        return value

    def op(self) -> Callable[..., object]:
        """An op by name: `aten.mm.default`, `operator.pow`."""
        op = find_op(self.peek())
        if op is None:
            known = ", ".join(NAMESPACES)
            self.fail(f"`read` or a registered op of {known}, operator, math or torch.sym_*; import what defines it")
        self.at += 1
        return op

    def fail(self, expected: str) -> NoReturn:
        """Raises what was expected instead of the next token."""
        found = f"`{self.peek()}`" if self.peek() else END
        column = self.columns[self.at] if self.at < len(self.columns) else len(self.text)
        place = f"line {self.number}, column {column + 1}"
        raise TextError(f"{place}: found {found}, expected {expected}\n    {self.text}\n    {' ' * column}^")
