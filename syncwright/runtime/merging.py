"""When the contributions to a channel count, and what they give together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from syncwright.errors import BatchError
from syncwright.job import Channel
from syncwright.runtime.messages import Push
from syncwright.runtime.rows import Parting, RowGradient, Standing, by_sorting, merge_rows

Contribution = torch.Tensor | RowGradient
Given = dict[int, tuple[float, Contribution]]
"""By trainer: the weight of its contribution, and the contribution."""
LEAD = 64
"""So many steps a trainer's contributions may wait for those of others: what nobody reads holds nobody back."""
HALVES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Attendance:
    """Which trainers there are. Changes when one leaves or is lost.

    left   from which step on a trainer contributes nothing; of one that is lost, from the first on
    clock  how many steps each trainer has pushed, where trainers say so
    hosts  how many trainers each host has, in the order of their numbers; () where nothing is merged on hosts
    """

    trainers: int
    left: dict[int, int] = field(default_factory=dict)
    clock: dict[int, int] = field(default_factory=dict)
    hosts: tuple[int, ...] = ()

    @property
    def live(self) -> list[int]:
        """Trainers that have not left."""
        return [k for k in range(self.trainers) if k not in self.left]

    @property
    def slowest(self) -> int | None:
        """The fewest steps that a live trainer has pushed; None where nobody is left."""
        return min((self.clock.get(k, 0) for k in self.live), default=None)

    def expected(self, step: int) -> list[int]:
        """The trainers that contribute to a step."""
        return [k for k in range(self.trainers) if self.left.get(k, step + 1) > step]

    def giver(self, trainer: int, channel: Channel) -> int:
        """For whom a trainer contributes: for itself, or for its host, by the number of that one's first trainer."""
        starts = accumulate(self.hosts, initial=0)
        return max(start for start in starts if start <= trainer) if channel.on_host else trainer

    def givers(self, trainers: Iterable[int], channel: Channel) -> list[int]:
        """Those for whom these trainers contribute."""
        return sorted({self.giver(k, channel) for k in trainers})


class Counting(Protocol):
    """The contributions to one channel. What counts is numbered, and a server's program runs once for each number.

    Changes with every contribution.
    """

    channel: Channel

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed and others are waited for."""
        ...

    def refusal(self, trainer: int, push: Push) -> str | None:
        """Why a contribution cannot be taken; None where it can."""
        ...

    def take(self, trainer: int, push: Push, tensor: Contribution) -> int | None:
        """Takes a contribution in; returns the number under which it counts, None where it counts for nothing."""
        ...

    def complete(self) -> list[tuple[int, Contribution]]:
        """What has become complete: numbers, each with the merged value."""
        ...

    def drop(self, trainer: int) -> None:
        """Forgets what a trainer that is lost has given to what is not complete."""
        ...

    def missing(self) -> list[tuple[int, str]]:
        """Which contributions are late: numbers, each with what to say of it."""
        ...


def counting(channel: Channel, attendance: Attendance) -> Counting:
    """How the contributions to a channel count."""
    if channel.calls > 1:
        return OverCalls(channel, attendance)
    return Arrivals(channel) if channel.take else Rounds(channel, attendance)


class Rounds:
    """Contributions by step: those of a step count when every trainer that is there has given its own. See `Counting`."""

    def __init__(self, channel: Channel, attendance: Attendance):
        self.channel, self._attendance = channel, attendance
        self._parted = _parting(channel)
        self._given: dict[int, Given] = {}
        self._done = -1

    @property
    def pending(self) -> bool:
        return bool(self._given)

    def refusal(self, trainer: int, push: Push) -> str | None:
        if push.step <= self._done:
            return f"it is of step {push.step}, which is complete"
        if self._attendance.giver(trainer, self.channel) in self._given.get(push.step, {}):
            return f"it is the second of step {push.step}"
        if trainer not in self._attendance.expected(push.step):
            return f"trainer {trainer} has left before step {push.step}"
        oldest = min(self._given, default=push.step)
        return f"it is of step {push.step}, others are at {oldest}" if push.step > oldest + LEAD else None

    def take(self, trainer: int, push: Push, tensor: Contribution) -> int:
        self._given.setdefault(push.step, {})[self._attendance.giver(trainer, self.channel)] = push.weight, tensor
        return push.step

    def complete(self) -> list[tuple[int, Contribution]]:
        """Raises `BatchError` where nobody has examples."""
        found = [(step, self._given.pop(step)) for step in sorted(self._given) if not self._late(step)]
        for step, given in found:
            if not any(weight for weight, _ in given.values()):
                raise no_examples(step)
            self._done = max(self._done, step)
        return [(step, merge(self.channel, given, self._attendance.trainers, self._parted)) for step, given in found]

    def drop(self, trainer: int) -> None:
        for step in list(self._given):
            self._given[step].pop(self._attendance.giver(trainer, self.channel), None)
            if not self._given[step]:
                del self._given[step]

    def missing(self) -> list[tuple[int, str]]:
        name, whose = self.channel.variable.name, "the host of " if self.channel.on_host else ""
        return [
            (step, f"'{name}' of step {step} from {whose}trainer {', '.join(map(str, late))}")
            for step in sorted(self._given)
            if (late := self._late(step))
        ]

    def _late(self, step: int) -> list[int]:
        givers = self._attendance.givers(self._attendance.expected(step), self.channel)
        return [k for k in givers if k not in self._given[step]]


class OverCalls:
    """Contributions by calls of a step, of which so many make one update: all count when every trainer that is there has given
    those of all calls. See `Counting`.

    Of a trainer that has left before the last call nothing counts.
    """

    def __init__(self, channel: Channel, attendance: Attendance):
        self.channel, self._attendance = channel, attendance
        self._parted = _parting(channel)
        self._given: dict[int, dict[tuple[int, int], tuple[float, Contribution]]] = {}
        self._done = -1

    @property
    def pending(self) -> bool:
        return bool(self._given)

    def refusal(self, trainer: int, push: Push) -> str | None:
        step, call = divmod(push.step, self.channel.calls)
        if step <= self._done:
            return f"it is of step {step}, which is complete"
        if (call, trainer) in self._given.get(step, {}):
            return f"it is the second of call {call} of step {step}"
        if trainer not in self._attendance.expected(step):
            return f"trainer {trainer} has left before step {step}"
        oldest = min(self._given, default=step)
        return f"it is of step {step}, others are at {oldest}" if step > oldest + LEAD else None

    def take(self, trainer: int, push: Push, tensor: Contribution) -> int:
        step, call = divmod(push.step, self.channel.calls)
        self._given.setdefault(step, {})[call, trainer] = push.weight, tensor
        return step

    def complete(self) -> list[tuple[int, Contribution]]:
        """What was begun before a step that is complete was given up: its values were set anew. Raises `BatchError` where nobody
        has examples."""
        ready = [step for step in sorted(self._given) if self._givers(step) and not self._late(step)]
        found = []
        for step in ready:
            givers, given = self._givers(step), self._given[step]
            whole = {place: each for place, each in sorted(given.items()) if place[1] in givers}
            if not any(weight for weight, _ in whole.values()):
                raise no_examples(step)
            numbered = dict(enumerate(whole.values()))
            found.append((step, merge(self.channel, numbered, self._attendance.trainers, self._parted)))
            self._done = step
            self._given = {other: each for other, each in self._given.items() if other > step}
        return found

    def drop(self, trainer: int) -> None:
        for step, given in list(self._given.items()):
            self._given[step] = {place: each for place, each in given.items() if place[1] != trainer}
            if not self._given[step]:
                del self._given[step]

    def missing(self) -> list[tuple[int, str]]:
        name = self.channel.variable.name
        return [
            (step, f"'{name}' of step {step} from trainer {', '.join(map(str, late))}")
            for step in sorted(self._given)
            if (late := self._late(step))
        ]

    def _calls_of(self, step: int, trainer: int) -> int:
        return sum(1 for _, of in self._given[step] if of == trainer)

    def _givers(self, step: int) -> list[int]:
        """Those who have given all."""
        trainers = range(self._attendance.trainers)
        return [k for k in trainers if self._calls_of(step, k) == self.channel.calls]

    def _late(self, step: int) -> list[int]:
        givers = self._givers(step)
        return [k for k in self._attendance.expected(step) if k not in givers]


class Arrivals:
    """Contributions as they come: `channel.take` of them count together, whoever gives them. See `Counting`.

    push 1, 3, 5 with take=3 gives 3 and empties; those of weight 0, without examples, count for nothing.
    """

    pending = False

    def __init__(self, channel: Channel):
        self.channel, self._parted = channel, _parting(channel)
        self._given: list[tuple[float, Contribution]] = []
        self._complete: list[tuple[int, Contribution]] = []
        self._count = 0

    def refusal(self, trainer: int, push: Push) -> str | None:
        return None

    def take(self, trainer: int, push: Push, tensor: Contribution) -> int | None:
        if push.weight == 0:
            return None
        self._given.append((push.weight, tensor))
        count = self._count
        if len(self._given) == self.channel.take:
            self._complete.append((count, self._together()))
            self._given, self._count = [], count + 1
        return count

    def complete(self) -> list[tuple[int, Contribution]]:
        found, self._complete = self._complete, []
        return found

    def _together(self) -> Contribution:
        if not self.channel.rows:
            return together(self.channel, self._given)  # type: ignore[arg-type]
        if self.channel.merge != "mean" or self.channel.take == 1:
            return merge_rows(self.channel, self._given, self._parted)  # type: ignore[arg-type]
        total = sum(weight for weight, _ in self._given)
        scaled = [(w, RowGradient(g.ids, g.rows * (w / total))) for w, g in self._given]  # type: ignore[union-attr]
        return merge_rows(self.channel, scaled, self._parted)

    def drop(self, trainer: int) -> None:
        """Each contribution is whole: what came stays."""

    def missing(self) -> list[tuple[int, str]]:
        return []


def _parting(channel: Channel) -> Parting:
    counted = channel.rows and channel.variable.unbounded is None
    return Standing(channel.variable.shape[0]).parted if counted else by_sorting


def merge(
    channel: Channel,
    given: Mapping[int, tuple[float, Contribution]],
    trainers: int,
    parted: Parting = by_sorting,
) -> Contribution:
    """One value of all contributions to a step, added in the order of trainers (or hosts): the same whoever came first.

    Contributions are already multiplied by weight / trainers; their sum is divided by the sum of the weights / trainers
    unless that is 1, so that it is a mean over those that are there. g = 1 from three trainers of four gives 1.0.
    """
    ordered = [given[k] for k in sorted(given)]
    if channel.rows:
        merged = merge_rows(channel, ordered, parted)  # type: ignore[arg-type]
        return RowGradient(merged.ids, _averaged(channel, merged.rows, ordered, trainers))
    tensors = [tensor for _, tensor in ordered if isinstance(tensor, torch.Tensor)]
    total = tensors[0].to(channel.variable.dtype)
    if channel.merge == "first":
        return total
    for tensor in tensors[1:]:
        total = total + tensor
    return _averaged(channel, total, ordered, trainers)


def _averaged(
    channel: Channel, total: torch.Tensor, given: Sequence[tuple[float, Contribution]], trainers: int
) -> torch.Tensor:
    if channel.merge == "mean":
        weight = _share([w for w, _ in given], trainers, total.dtype)
        if weight not in (0, 1):
            return total / torch.as_tensor(weight)
    return total


def together(channel: Channel, given: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """One value of contributions that nobody has scaled: their sum, or their mean weighted by examples.

    1, 3, 5 of equal weight give 3. Halves are added in float32.
    """
    if len(given) == 1:
        return given[0][1].to(channel.variable.dtype)
    weights = [weight if channel.merge == "mean" else 1.0 for weight, _ in given]
    wide = [tensor.float() if tensor.dtype in HALVES else tensor for _, tensor in given]
    if len(set(weights)) > 1:
        wide = [tensor * weight for tensor, weight in zip(wide, weights, strict=True)]
    total = wide[0]
    for tensor in wide[1:]:
        total = total + tensor
    if channel.merge == "mean":
        total = total / (len(given) if len(set(weights)) == 1 else sum(weights))
    return total.to(channel.variable.dtype)


def no_examples(step: int) -> BatchError:
    """The error of a step for which no trainer has an example: its mean is 0 / 0."""
    return BatchError(
        f"step {step}: no trainer has examples; expected at least one, on some trainer. Leave the step out on all "
        "trainers for such a batch."
    )


def _share(weights: list[float], trainers: int, dtype: torch.dtype) -> np.floating:
    """The sum of the weights over the trainers, [2, 1] of 3 gives 1.0; rounded as collectives round it, in float64 only for
    float64 values: so servers and replicas agree to the bit. NumPy's scalars, as a tensor of one number costs ten times more.
    """
    number = np.float64 if dtype is torch.float64 else np.float32
    return sum(map(number, weights[1:]), start=number(weights[0])) / number(trainers)
