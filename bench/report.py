"""From what was measured to what is said: medians, ratios, bootstrap intervals, and the list of shows.

Pure functions over plain numbers. `times` maps a contestant's name to its seconds per step, one per repeat;
all lists have one length, and position i of each was measured in the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Times = Mapping[str, Sequence[float]]

DRAWS = 2000
COVERAGE = 0.90

OVERHEAD_BAR = 0.75
LOSS_BAR = 1e-6
FIRST_STEP_BAR = 1.05
UPDATE_BAR = 1.0


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 90% interval. None: not defined, never zero in its place."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Show:
    """A promise and whether it holds: `value <= bar`. None for both: it could not be judged, see `note`."""

    name: str
    value: float | None
    bar: float
    holds: bool | None
    note: str = ""


# --- statistics ----------------------------------------------------------------------------------------


def bootstrap(times: Times, statistic: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Figure:
    """The statistic of the medians, its interval by resampling whole rounds.

    Rounds are drawn, not single times: what slowed a round slowed all its contestants. `statistic` takes
    medians by name, as arrays, and answers NaN or infinity where it is not defined.
    """
    names = list(times)
    table = np.array([times[name] for name in names], dtype=np.float64)  # contestant, repeat
    rounds = np.random.default_rng(0).integers(table.shape[1], size=(DRAWS, table.shape[1]))
    drawn = np.median(table[:, rounds], axis=2)  # contestant, draw
    point = statistic(by_name(names, np.median(table, axis=1, keepdims=True)))[0]
    spread = statistic(by_name(names, drawn))
    spread = np.where(np.isnan(spread), np.inf, spread)  # an undefined draw counts as the worst
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(spread, [tail, 1 - tail], method="nearest")
    return Figure(finite(point), finite(low), finite(high))


def by_name(names: Sequence[str], rows: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(names, rows, strict=True))


def finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def median_seconds(times: Times, name: str) -> Figure:
    return bootstrap({name: times[name]}, lambda medians: medians[name])


def ratio(times: Times, name: str, base: str) -> Figure:
    """The median of `name` over the median of `base`."""
    return bootstrap(pick(times, name, base), lambda medians: medians[name] / medians[base])


def overhead(times: Times, name: str, limit: str) -> Figure:
    """Seconds per step above the limit."""
    return bootstrap(pick(times, name, limit), lambda medians: medians[name] - medians[limit])


def overhead_ratio(times: Times, name: str, base: str, limit: str) -> Figure:
    """The overhead of `name` over that of `base`; not defined where `base` is not above the limit."""

    def statistic(medians: Mapping[str, np.ndarray]) -> np.ndarray:
        below = medians[base] - medians[limit]
        safe = np.where(below > 0, below, 1.0)
        return np.where(below > 0, (medians[name] - medians[limit]) / safe, np.inf)

    return bootstrap(pick(times, name, base, limit), statistic)


def pick(times: Times, *names: str) -> dict[str, Sequence[float]]:
    return {name: times[name] for name in names}


def fastest(times: Times, names: Sequence[str]) -> str | None:
    """The one of `names` with the lowest median; None when none was measured."""
    measured = [name for name in names if name in times]
    return min(measured, key=lambda name: float(np.median(times[name])), default=None)


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """max|a-b|, and the same over max|b|. A float32 loss near 8 has a spacing of 9.5e-7."""
    if len(losses) != len(reference):
        raise ValueError(f"{len(losses)} losses against {len(reference)}: they must be of the same steps")
    largest = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
    return largest, largest / max(abs(b) for b in reference)


def ratio_of_medians(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return float(np.median(ours) / np.median(theirs))


# --- one workload --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What the table says of one contestant. Seconds; MiB. None: not measured, or not defined."""

    name: str
    status: str
    step: Figure = Figure(None)
    over_limit: Figure = Figure(None)
    over_best: Figure = Figure(None)
    overhead: Figure = Figure(None)
    overhead_over_best: Figure = Figure(None)
    first_cold: float | None = None
    first_warm: float | None = None
    peak_mb: float | None = None
    above_bare_mb: float | None = None
    loss_reference: str | None = None
    loss_absolute: float | None = None
    loss_relative: float | None = None


def rows(results: Mapping[str, Mapping], peers: Sequence[str], limit: str, bare_mb: float) -> list[Row]:
    """One row per contestant; `results` holds, by name, what the driver recorded of each."""
    times = {name: result["seconds_per_step"] for name, result in results.items() if measured(result)}
    best = fastest(times, peers)
    return [
        row(name, results, times, best, limit if limit in times else None, bare_mb)
        if name in times
        else Row(name, results[name]["status"])
        for name in results
    ]


def measured(result: Mapping) -> bool:
    return result["status"] == "measured"


def row(
    name: str,
    results: Mapping[str, Mapping],
    times: Times,
    best: str | None,
    limit: str | None,
    bare_mb: float,
) -> Row:
    result = results[name]
    absolute, relative = difference_from_reference(result, results)
    peak = max(result["peaks_mb"].values())
    unknown = Figure(None)
    return Row(
        name=name,
        status="measured",
        step=median_seconds(times, name),
        over_limit=ratio(times, name, limit) if limit else unknown,
        over_best=ratio(times, name, best) if best else unknown,
        overhead=overhead(times, name, limit) if limit else unknown,
        overhead_over_best=overhead_ratio(times, name, best, limit) if best and limit else unknown,
        first_cold=median_or_none(result["first_step_seconds"]["cold"]),
        first_warm=median_or_none(result["first_step_seconds"]["warm"]),
        peak_mb=peak,
        above_bare_mb=peak - bare_mb,
        loss_reference=result["loss_reference"],
        loss_absolute=absolute,
        loss_relative=relative,
    )


def median_or_none(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def difference_from_reference(result: Mapping, results: Mapping[str, Mapping]) -> tuple[float | None, float | None]:
    """How far the first losses are from those of the contestant that they are judged by."""
    reference = results.get(result["loss_reference"])
    if reference is None or not measured(reference):
        return None, None
    return loss_difference(result["losses"], reference["losses"])


# --- shows ---------------------------------------------------------------------------------------------


def judge(name: str, value: float | None, bar: float, note: str = "") -> Show:
    return Show(name, value, bar, None if value is None else value <= bar, note)


def workload_shows(
    workload: str, results: Mapping[str, Mapping], peers: Sequence[str], ours: str, limit: str, reference: str
) -> list[Show]:
    """What is promised of `ours` on one workload."""
    names = (
        f"{workload}: overhead above the limit, over the best peer's",
        f"{workload}: first five losses, max difference from {reference}",
        f"{workload}: time to first step, cold cache, over {reference}'s",
        f"{workload}: time to first step, warm cache, over {reference}'s",
    )
    times = {name: result["seconds_per_step"] for name, result in results.items() if measured(result)}
    best = fastest(times, peers)
    return [
        overhead_show(names[0], times, ours, best, limit),
        loss_show(names[1], results, ours, reference),
        first_step_show(names[2], results, ours, reference, "cold"),
        first_step_show(names[3], results, ours, reference, "warm"),
    ]


def overhead_show(name: str, times: Times, ours: str, best: str | None, limit: str, bar: float = OVERHEAD_BAR) -> Show:
    missing = [wanted for wanted in (ours, limit) if wanted not in times]
    if missing or best is None:
        return judge(name, None, bar, f"not measured: {', '.join([*missing] or ['any peer'])}")
    figure = overhead_ratio(times, ours, best, limit)
    if figure.value is None:
        return judge(name, None, bar, f"not defined: {best} is not above {limit}")
    return judge(name, figure.value, bar, f"best peer {best}; 90% {interval(figure)}")


def wire_show(name: str, results: Mapping[str, Mapping], ours: str, least: int, bar: float) -> Show:
    """Bytes of a step over the least possible."""
    sent = results[ours]["step_bytes"] if measured_in(results, ours) else None
    if sent is None:
        return judge(name, None, bar, f"not counted: {ours}")
    return judge(name, sent / least, bar, f"{sent / 1e6:.2f} MB, with TCP's headers")


def interval(figure: Figure) -> str:
    low, high = ("undefined" if end is None else f"{end:.2f}" for end in (figure.low, figure.high))
    return f"{low} to {high}"


def loss_show(name: str, results: Mapping[str, Mapping], ours: str, reference: str) -> Show:
    missing = [wanted for wanted in (ours, reference) if not measured_in(results, wanted)]
    if missing:
        return judge(name, None, LOSS_BAR, f"not measured: {', '.join(missing)}")
    absolute, relative = loss_difference(results[ours]["losses"], results[reference]["losses"])
    return judge(name, absolute, LOSS_BAR, f"relative {relative:.1e}")


def measured_in(results: Mapping[str, Mapping], name: str) -> bool:
    return name in results and measured(results[name])


def first_step_show(name: str, results: Mapping[str, Mapping], ours: str, reference: str, cache: str) -> Show:
    missing = [
        wanted
        for wanted in (ours, reference)
        if not measured_in(results, wanted) or not results[wanted]["first_step_seconds"][cache]
    ]
    if missing:
        return judge(name, None, FIRST_STEP_BAR, f"not measured: {', '.join(missing)}")
    both = [results[wanted]["first_step_seconds"][cache] for wanted in (ours, reference)]
    return judge(name, ratio_of_medians(*both), FIRST_STEP_BAR, f"starts measured: {len(both[0])}")


def update_show(update: Mapping, ours: str, reference: str) -> Show:
    """`update` holds seconds per update by name, and why a name is missing."""
    name = f"update of the GPT, over {reference}"
    times = update["seconds"]
    if ours not in times or reference not in times:
        return judge(name, None, UPDATE_BAR, update["missing"].get(ours, "not measured"))
    figure = ratio(times, ours, reference)
    return judge(name, figure.value, UPDATE_BAR, f"90% {interval(figure)}")
