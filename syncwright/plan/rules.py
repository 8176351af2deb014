"""Rules: what a person writes, before any program exists: a default, and patterns that override it.

    default: all_reduce
    variables:
      - "embed.*": parameter_server
      - "embed.big.weight": {parameter_server: {partition: blocks, place: {on: 1}}}
    buffers:
      - "*.running_mean": trainer0

Patterns are shell patterns (`*`, `?`, `[...]`, case-sensitive) on a variable's full name and its aliases.
Where several match, the last one counts, whole: settings of the earlier ones are not mixed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from syncwright.document import Node, read, write
from syncwright.errors import PlanError
from syncwright.plan.precision import Dynamic
from syncwright.plan.sync import Sync
from syncwright.typed import Count, Size, check_fields, decode, describe, encode

BufferPolicy = Literal["mean", "trainer0", "local"]
Uncuttable = Literal["refuse", "keep_whole"]
Clip = Literal["global", "per_trainer"]

_DEFAULT = 'Add a line such as "default: all_reduce".'
_PATTERN = 'Write a line such as - "embed.*": parameter_server.'
_BUFFER = 'Write a line such as - "*.running_mean": trainer0.'
_SHARING = "Write one of them."
_KEYS = (
    "default",
    "variables",
    "buffers",
    "clip",
    "sync_batch_norm",
    "memory_gb",
    "accumulate",
    "loss_scale",
    "uncuttable",
)


@dataclass(frozen=True, slots=True)
class Rules:
    """How variables are to be shared, by pattern.

    default     for every variable that no pattern matches
    patterns    (pattern, sharing), the last match counts
    buffers     (pattern, "mean" | "trainer0" | "local") for buffers that the step writes; likewise
    clip        what a norm of several gradients is of: the trainers' merged gradients, or each trainer's own, before they
                are merged
    sync_batch_norm  whether batch norm in train mode normalises by the examples of all trainers, and not each by its own
    memory_gb   gigabytes (2**30 bytes) that a trainer may hold at once in a step; None: as many as it takes
    accumulate  so many calls of a step make one update, of the gradient of all their batches together
    loss_scale  by what the loss of a step without a GradScaler is scaled; None: by nothing
    uncuttable  what becomes of a partition where a variable's update cannot be cut: "refuse" it (what a
                person wrote is meant), or "keep_whole" with a note in the plan (named strategies)
    source      what errors call these rules: the file's name
    """

    default: Sync
    patterns: tuple[tuple[str, Sync], ...] = ()
    buffers: tuple[tuple[str, BufferPolicy], ...] = ()
    uncuttable: Uncuttable = "refuse"
    clip: Clip = "global"
    sync_batch_norm: bool = False
    memory_gb: Size | None = None
    accumulate: Count = 1
    loss_scale: Dynamic | None = None
    source: str = field(default="rules", compare=False)

    def __post_init__(self) -> None:
        check_fields(self, PlanError)

    @classmethod
    def of(
        cls,
        default: Sync,
        variables: Mapping[str, Sync] | None = None,
        buffers: Mapping[str, BufferPolicy] | None = None,
    ) -> Rules:
        """Rules from mappings: Rules.of(AllReduce(), {"embed.*": ParameterServer()})."""
        return cls(default, tuple((variables or {}).items()), tuple((buffers or {}).items()))

    @classmethod
    def from_yaml(cls, source: str | Path) -> Rules:
        """Rules from a file (a `Path`, or a name that ends in .yaml or .yml) or from YAML text."""
        top = read(source, "rules", PlanError)
        if isinstance(top.value, dict) and "digest" in top.value:
            raise top.error("rules", "Read it with Plan.from_yaml.", found="a complete plan")
        nodes = top.record(_KEYS, _DEFAULT)
        if "default" not in nodes:
            raise top.error("the sharing of variables that no pattern matches", _DEFAULT, found="no `default`")
        uncuttable, clip = nodes.get("uncuttable"), nodes.get("clip")
        return cls(
            default=decode(nodes["default"], Sync, _SHARING),
            patterns=_lines(nodes.get("variables"), Sync, _PATTERN),
            buffers=_lines(nodes.get("buffers"), BufferPolicy, _BUFFER),
            uncuttable=decode(uncuttable, Uncuttable) if uncuttable else "refuse",
            clip=decode(clip, Clip) if clip else "global",
            sync_batch_norm=decode(nodes["sync_batch_norm"], bool) if "sync_batch_norm" in nodes else False,
            memory_gb=decode(nodes["memory_gb"], Size) if "memory_gb" in nodes else None,
            accumulate=decode(nodes["accumulate"], Count) if "accumulate" in nodes else 1,
            loss_scale=decode(nodes["loss_scale"], Dynamic | None) if "loss_scale" in nodes else None,
            source=top.source,
        )

    def to_yaml(self) -> str:
        """The rules as a person would write them: settings that hold their defaults are left out."""
        document = {
            "default": encode(self.default),
            "variables": [{pattern: encode(sync)} for pattern, sync in self.patterns],
            "buffers": [{pattern: policy} for pattern, policy in self.buffers],
            "clip": self.clip if self.clip != "global" else None,
            "sync_batch_norm": self.sync_batch_norm,
            "memory_gb": self.memory_gb,
            "accumulate": self.accumulate if self.accumulate > 1 else None,
            "loss_scale": encode(self.loss_scale),
            "uncuttable": self.uncuttable if self.uncuttable != "refuse" else None,
        }
        return write({key: value for key, value in document.items() if value}, flow=_tags_of(self))


def _tags_of(rules: Rules) -> list[str]:
    """The keys whose values stand on one line: every pattern, and `default`."""
    return ["default", *(pattern for pattern, _ in rules.patterns)]


def _lines(node: Node | None, kind: Any, example: str) -> tuple[tuple[str, Any], ...]:
    """(pattern, value) from a list of one-line mappings, or from one mapping, whose order counts."""
    if node is None:
        return ()
    expected = f"a list of lines, each a pattern and {describe(kind)}"
    if isinstance(node.value, dict):
        pairs = list(node.value.items())
    else:
        pairs = [_pair(item, kind, example) for item in node.items(expected, example)]
    return tuple((pattern, decode(value, kind, _SHARING)) for pattern, value in pairs)


def _pair(item: Node, kind: Any, example: str) -> tuple[str, Node]:
    expected = f"one pattern and {describe(kind)}"
    nodes = item.mapping(expected, example)
    if len(nodes) != 1:
        raise item.error(expected, example)
    return next(iter(nodes.items()))
