"""Where each node of a whole program runs: in its meta, and in its text behind `at`."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

AT = "at"
"""The key in a node's meta; a node without it runs on every trainer."""


@dataclass(frozen=True, slots=True)
class Trainers:
    """Every trainer, on its part of the batch."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Every server that owns a piece of `variable`, each on its piece. One node stands for all of them."""

    variable: str


@dataclass(frozen=True, slots=True)
class Server:
    """One server."""

    rank: int


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Made from hyper-parameters and constants: each role that needs it computes it."""


Place = Trainers | Owners | Server | Everywhere
TRAINERS = Trainers()
EVERYWHERE = Everywhere()


def place_of(node: Node) -> Place:
    return node.meta.get(AT, TRAINERS)


def put(node: Node, place: Place) -> None:
    """Says where `node` runs."""
    if isinstance(place, Trainers):
        node.meta.pop(AT, None)
    else:
        node.meta[AT] = place


def is_served(node: Node) -> bool:
    """Whether a server runs the node, and no trainer."""
    return isinstance(place_of(node), Owners | Server)
