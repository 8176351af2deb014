"""From seconds per step to rates: minibatches of all trainers together, bytes against those that must move. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.report import Figure, Times, bootstrap, difference_from_reference, fastest, measured, pick

LOSS_BAR = 1e-5
UNKNOWN = Figure(None)


@dataclass(frozen=True, slots=True)
class Rate:
    """What a table of rates says of one contestant. None: not measured, or not defined.

    per_second   minibatches of all trainers together
    over_best    that over the best peer's
    over_limit   that over the limit's
    step_mb      megabytes (10**6) over loopback per step, all processes together
    over_needed  those bytes over the ones that must move
    rank_mb      peak MiB of the largest rank
    other_mb     peak MiB of the largest of its other processes
    loss         largest relative difference of its first losses from its reference's; None: nothing to compare with
    """

    name: str
    status: str
    per_second: Figure = UNKNOWN
    over_best: Figure = UNKNOWN
    over_limit: Figure = UNKNOWN
    step_mb: float | None = None
    over_needed: float | None = None
    rank_mb: float | None = None
    other_mb: float | None = None
    loss: float | None = None


def rates(results: Mapping[str, Mapping], peers: Sequence[str], limit: str, needed: float | None) -> list[Rate]:
    """One per contestant; `results` as the driver recorded them, `needed` bytes that a step must move."""
    times = seconds_per_minibatch(results)
    best = fastest(times, peers)
    return [
        rate(name, results, times, best, limit, needed) if name in times else Rate(name, results[name]["status"])
        for name in results
    ]


def seconds_per_minibatch(results: Mapping[str, Mapping]) -> dict[str, list[float]]:
    """Of who was measured: seconds per step over the minibatches of all trainers in it, every repeat."""
    return {
        name: [seconds / result["minibatches_per_step"] for seconds in result["seconds_per_step"]]
        for name, result in results.items()
        if measured(result)
    }


def rate(
    name: str, results: Mapping[str, Mapping], times: Times, best: str | None, limit: str, needed: float | None
) -> Rate:
    result = results[name]
    sent = result["step_bytes"]
    ranks, others = peaks(result["peaks_mb"], name)
    _, relative = difference_from_reference(result, results)
    return Rate(
        name,
        "measured",
        per_second=per_second(times, name),
        over_best=faster(times, name, best) if best else UNKNOWN,
        over_limit=faster(times, name, limit) if limit in times else UNKNOWN,
        step_mb=None if sent is None else sent / 1e6,
        over_needed=None if sent is None or not needed else sent / needed,
        rank_mb=max(ranks, default=None),
        other_mb=max(others, default=None),
        loss=relative,
    )


def peaks(by_process: Mapping[str, float], name: str) -> tuple[list[float], list[float]]:
    """Peak MiB of the ranks, and of everybody else."""
    ranks = [value for label, value in by_process.items() if label.startswith(f"{name} rank ")]
    others = [value for label, value in by_process.items() if not label.startswith(f"{name} rank ")]
    return ranks, others


def per_second(times: Times, name: str) -> Figure:
    return bootstrap(pick(times, name), lambda medians: 1.0 / medians[name])


def faster(times: Times, name: str, base: str) -> Figure:
    """How many times the rate of `base`; above 1: faster."""
    return bootstrap(pick(times, name, base), lambda medians: medians[base] / medians[name])


def disagreeing(found: Sequence[Rate], bar: float = LOSS_BAR) -> list[str]:
    """Who was compared and did not compute the same."""
    return [one.name for one in found if one.loss is not None and not one.loss <= bar]


# --- transfers -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the table of pushes and pulls says of one contestant in one setting.

    milliseconds  for every trainer to push everything and to pull it
    gigabytes     (10**9) per second through all trainers, both ways together
    over          the time over that of each bare transport
    """

    name: str
    status: str
    milliseconds: Figure = UNKNOWN
    gigabytes: float | None = None
    over: tuple[Figure, ...] = ()


def transfers(results: Mapping[str, Mapping], nbytes: int, trainers: int, bare: Sequence[str]) -> list[Transfer]:
    """One per contestant, each trainer having pushed and pulled `nbytes` in a step."""
    times = {name: result["seconds_per_step"] for name, result in results.items() if measured(result)}
    found = []
    for name, result in results.items():
        if name not in times:
            found.append(Transfer(name, result["status"]))
            continue
        moved = 2 * nbytes * trainers / 1e9
        over = tuple(slower(times, name, base) if base in times else UNKNOWN for base in bare)
        whole = bootstrap(pick(times, name), lambda medians, name=name: 1e3 * medians[name])
        found.append(Transfer(name, "measured", whole, moved / float(np.median(times[name])), over))
    return found


def slower(times: Times, name: str, base: str) -> Figure:
    return faster(times, base, name)
