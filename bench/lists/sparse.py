"""Who takes part in bench/sparse.py: two trainers, and servers as a system needs them."""

from __future__ import annotations

from dataclasses import replace

from bench.contestants import Contestant, Kind

TRAINERS = 2
REFERENCE = "one-device"
LIMIT = "alone-sparse"

# Plans of ours, as data: a strategy's name, or rules. The first is the one that is judged.
PLANS = {
    "syncwright": "{default: {parameter_server: {mode: async}}}",
    "syncwright-sync": "parameter_server",
    "syncwright-parallax": "parallax",
    "syncwright-gathered": "{default: all_reduce, variables: [{'tables.*': all_gather}]}",
    "syncwright-all-reduce": "all_reduce",
}


def served(name: str, plan: str, servers: int = 1) -> Contestant:
    return Contestant(
        name,
        Kind.OURS,
        "bench.contestants.ours_served",
        {"plan": plan, "compile": "auto"},
        helpers=("store", *["server"] * servers),
        wire={"tcp": True},
    )


def torchrec(sharding: str) -> Contestant:
    return Contestant(
        f"torchrec-{sharding.replace('_', '-')}",
        Kind.PEER,
        "bench.contestants.torchrec_sharded",
        {"sharding": sharding},
        environment="torchrec",
    )


def _contestants() -> list[Contestant]:
    alone, ddp = "bench.contestants.alone", "bench.contestants.ddp"
    sparse = {"model": {"sparse": True}}
    return [
        Contestant("alone-sparse", Kind.APART, alone, sparse, processes=1),
        Contestant("alone-dense", Kind.APART, alone, processes=1),
        Contestant(
            *("one-device", Kind.WHOLE, alone, {**sparse, "trainers": TRAINERS}), processes=1, minibatches=TRAINERS
        ),
        *(served(name, plan) for name, plan in PLANS.items()),
        Contestant("ddp-dense", Kind.PEER, ddp),
        Contestant("ddp-sparse", Kind.PEER, ddp, sparse),
        torchrec("table_wise"),
        torchrec("column_wise"),
        torchrec("row_wise"),
        Contestant(
            "tensorflow-ps",
            Kind.PEER,
            "bench.contestants.tensorflow_sparse",
            processes=1,
            minibatches=TRAINERS,
            helpers=("worker",) * TRAINERS + ("ps",),
            environment="tensorflow",
            imports="tensorflow",
        ),
    ]


# Asynchronous ones, and those that train alone, compute something else.
COMPARED = (Kind.OURS, Kind.PEER)
ASYNCHRONOUS = ("syncwright-async", "tensorflow-ps")

CONTESTANTS = {
    contestant.name: replace(
        contestant,
        loss_reference=REFERENCE if contestant.kind in COMPARED and contestant.name not in ASYNCHRONOUS else None,
    )
    for contestant in _contestants()
}
# Dense gradients of large tables fill the memory: with those workloads, whose names begin so, only when named.
LARGE = "dlrm"
DENSE = ("alone-dense", "syncwright-servers", "syncwright-all-reduce", "ddp-dense")


def default(workload: str) -> tuple[str, ...]:
    """Who takes part when nobody is named."""
    return tuple(name for name in CONTESTANTS if not (workload.startswith(LARGE) and name in DENSE))
