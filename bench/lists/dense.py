"""Who takes part in bench/dense.py."""

from __future__ import annotations

from dataclasses import replace

from bench.contestants import Contestant, Kind

# Whose first losses a contestant's must equal. Who trains without its peers can equal only one who is alone.
LOSS_REFERENCE = {
    Kind.OURS: "ddp-compile",
    Kind.PEER: "ddp-compile",
    Kind.LIMIT: "alone",
    Kind.APART: "alone",
}


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


CONTESTANTS = {
    contestant.name: replace(contestant, loss_reference=LOSS_REFERENCE[contestant.kind])
    for contestant in _contestants()
}
DEFAULT = tuple(name for name in CONTESTANTS if name not in ("ddp-tuned", "apart"))
