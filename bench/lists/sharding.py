"""Who takes part in bench/sharding.py."""

from __future__ import annotations

from dataclasses import replace

from bench.contestants import Contestant, Kind

REFERENCE = "ddp"
"""Whose first losses everybody's must equal who trains with others."""

UNSHARDED = ("zero-redundancy",)
KEPT = ("fsdp2-kept", "fsdp2-kept-compile")
RESHARDED = ("fsdp2", "fsdp2-compile")
BARS = (
    *(("zero1", UNSHARDED, 0.75), ("zero1", ("deepspeed-1",), 0.6), ("zero1", KEPT, 0.6)),
    *(("zero2", UNSHARDED, 0.75), ("zero2", ("deepspeed-2",), 0.6), ("zero2", KEPT, 0.6)),
    *(("zero3", RESHARDED, 0.5), ("zero3", ("deepspeed-3",), 0.5)),
)
"""Of ours the overhead above the limit, at most so much of that of the best of those."""

BUCKET_NBYTES = 25 << 20


def least_nbytes(trainers: int, parameters: int) -> dict[str, int]:
    """By name what all trainers together have to send in a step, of so many bytes of parameters: a gradient or its sum there and
    back, or there while the value comes back; and in stage 3 the value once more for backward, but for the bucket that forward
    has read last."""
    once = parameters * (trainers - 1)
    again = max(0, parameters - BUCKET_NBYTES) * (trainers - 1)
    return {"all_reduce": 2 * once, "zero1": 2 * once, "zero2": 2 * once, "zero3": 2 * once + again}


WIRE_BAR = 1.05


def _contestants() -> tuple[Contestant, ...]:
    ours, ddp, fsdp2, redundancy, deepspeed = (
        f"bench.contestants.{name}" for name in ("ours", "ddp", "fsdp2", "zero_redundancy", "deepspeed_zero")
    )
    return (
        Contestant("limit", Kind.LIMIT, ours, {"plan": "independent", "compile": True}, compiles=True),
        *(
            Contestant(name, Kind.OURS, ours, {"plan": name, "compile": True}, compiles=True, wire={"sockets": True})
            for name in ("all_reduce", "zero1", "zero2", "zero3")
        ),
        Contestant("ddp", Kind.PEER, ddp),
        Contestant("ddp-compile", Kind.PEER, ddp, {"compile": True}, compiles=True),
        Contestant("zero-redundancy", Kind.PEER, redundancy),
        Contestant("fsdp2", Kind.PEER, fsdp2),
        Contestant("fsdp2-compile", Kind.PEER, fsdp2, {"compile": True}, compiles=True),
        Contestant("fsdp2-kept", Kind.PEER, fsdp2, {"reshard": False}),
        Contestant("fsdp2-kept-compile", Kind.PEER, fsdp2, {"reshard": False, "compile": True}, compiles=True),
        *(
            Contestant(f"deepspeed-{stage}", Kind.PEER, deepspeed, {"stage": stage}, environment="deepspeed")
            for stage in range(4)
        ),
    )


def contestants(trainers: int) -> dict[str, Contestant]:
    """By name, each with so many trainers."""
    return {
        each.name: replace(each, processes=trainers, loss_reference=None if each.kind is Kind.LIMIT else REFERENCE)
        for each in _contestants()
    }


CONTESTANTS = contestants(2)
DEFAULT = tuple(CONTESTANTS)
