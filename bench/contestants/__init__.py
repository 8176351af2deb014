"""Who is measured: a table of names, and what each contestant's module must offer.

A module offers `start(workload, seat, **options) -> Running`. The table imports no torch: the driver reads
it, and the driver must stay small (a child's peak memory counts from its parent's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Kind(Enum):
    OURS = "ours"
    LIMIT = "limit"  # the captured step, its communication left out
    PEER = "peer"  # synchronous data parallel training by someone else
    APART = "apart"  # trains without any peer: comparable in time, not in losses after the first step


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    kind: Kind
    module: str
    options: Mapping[str, object] = field(default_factory=dict)
    processes: int = 2
    compiles: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """Where one process of a contestant sits. `store` is a file for rendezvous, new for every start."""

    rank: int
    processes: int
    store: str


@dataclass(frozen=True, slots=True)
class Running:
    """A started contestant. `step` runs one whole training step and returns the loss."""

    step: Callable[..., torch.Tensor]
    close: Callable[[], None]


class NotAvailable(Exception):
    """This contestant cannot run here; the message says why. Never replaced by a figure."""


def _contestants() -> tuple[Contestant, ...]:
    ours, ddp, fsdp2, alone = (f"bench.contestants.{name}" for name in ("ours", "ddp", "fsdp2", "alone"))
    return (
        Contestant("limit", Kind.LIMIT, ours, {"plan": "independent", "compile": True}, compiles=True),
        Contestant("syncwright", Kind.OURS, ours, {"plan": "all_reduce", "compile": True}, compiles=True),
        Contestant("syncwright-interpreted", Kind.OURS, ours, {"plan": "all_reduce", "compile": False}),
        Contestant("ddp", Kind.PEER, ddp),
        Contestant("ddp-compile", Kind.PEER, ddp, {"compile": True}, compiles=True),
        Contestant("ddp-fused", Kind.PEER, ddp, {"fused": True}),
        Contestant("ddp-compile-fused", Kind.PEER, ddp, {"compile": True, "fused": True}, compiles=True),
        Contestant("fsdp2", Kind.PEER, fsdp2),
        Contestant("fsdp2-compile", Kind.PEER, fsdp2, {"compile": True}, compiles=True),
        Contestant("alone", Kind.APART, alone, processes=1),
        Contestant("alone-compile", Kind.APART, alone, {"compile": True}, processes=1, compiles=True),
        # Only when named with --contestants:
        Contestant(
            "ddp-tuned",
            Kind.PEER,
            ddp,
            {"compile": True, "fused": True, "bucket_view": True},
            compiles=True,
        ),
        Contestant("apart", Kind.APART, alone, {"compile": True, "fused": True}, compiles=True),
    )


CONTESTANTS = {contestant.name: contestant for contestant in _contestants()}
DEFAULT = tuple(name for name in CONTESTANTS if name not in ("ddp-tuned", "apart"))
