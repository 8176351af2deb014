"""Who takes part in bench/compression.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bench.contestants import Contestant, Kind

OURS = {
    "syncwright": "",
    "syncwright-bf16": ", compress: {cast: bfloat16}",
    "syncwright-fp16": ", compress: {cast: float16}",
    "syncwright-power-sgd": ", compress: {power_sgd: {rank: 4, start_step: 4}}",
    "syncwright-top-k": ", compress: {top_k: {ratio: 0.01}}",
    "syncwright-int8": ", compress: {error_feedback: int8}",
}
"""What stands behind the size of a bucket in the rules of each."""

BESIDE = {
    "syncwright": "ddp-compile",
    "syncwright-bf16": "ddp-fp16",
    "syncwright-fp16": "ddp-fp16",
    "syncwright-power-sgd": "ddp-power-sgd-one-bucket",
    "syncwright-top-k": "ddp-top-k",
}
"""The peer that does the same, or comes nearest."""

MANY_BUCKETS = ("syncwright-power-sgd-buckets", "ddp-power-sgd")
"""Those whose factors travel in several buckets: do they always end?"""


def _contestants() -> tuple[Contestant, ...]:
    ours, ddp, hooked = (f"bench.contestants.{name}" for name in ("ours_apart", "ddp", "ddp_hooked"))
    return (
        Contestant("limit", Kind.LIMIT, ours, _options("default: local\n")),
        *(Contestant(name, Kind.OURS, ours, _options(_rules(25, tail))) for name, tail in OURS.items()),
        Contestant("ddp", Kind.PEER, ddp),
        Contestant("ddp-compile", Kind.PEER, ddp, {"compile": True}),
        Contestant("ddp-fp16", Kind.PEER, hooked, {"hook": "fp16", "compile": True}),
        Contestant("ddp-power-sgd", Kind.PEER, hooked, {"hook": "power_sgd", "compile": True}),
        Contestant(
            "ddp-power-sgd-one-bucket", Kind.PEER, hooked, {"hook": "power_sgd", "one_bucket": True, "compile": True}
        ),
        Contestant("ddp-top-k", Kind.PEER, hooked, {"hook": "top_k", "compile": True}),
        Contestant(
            "syncwright-power-sgd-buckets", Kind.OURS, ours, _options(_rules(0.01, OURS["syncwright-power-sgd"]))
        ),
    )


def _rules(bucket_mb: float, tail: str) -> str:
    return f"default: {{all_reduce: {{bucket_mb: {bucket_mb}{tail}}}}}\n"


def _options(rules: str) -> Mapping[str, object]:
    return {"plan": rules, "compile": True}


def contestants(trainers: int) -> dict[str, Contestant]:
    """By name, each with so many trainers."""
    return {each.name: replace(each, processes=trainers) for each in _contestants()}


CONTESTANTS = contestants(2)
DEFAULT = tuple(name for name in CONTESTANTS if name not in MANY_BUCKETS)
