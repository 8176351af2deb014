"""When the contributions to a channel are complete, and what they give together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from syncwright.errors import BatchError
from syncwright.job import Channel
from syncwright.runtime.messages import Push

Given = dict[int, tuple[float, torch.Tensor]]
"""By trainer: the weight of its contribution, and the contribution, already multiplied by weight / trainers."""


@dataclass(slots=True)
class Attendance:
    """Which trainers there are. Changes when one leaves.

    left  from which step on a trainer contributes nothing
    """

    trainers: int
    left: dict[int, int] = field(default_factory=dict)

    @property
    def live(self) -> list[int]:
        """Trainers that have not left."""
        return [k for k in range(self.trainers) if k not in self.left]

    def expected(self, step: int) -> list[int]:
        """The trainers that contribute to a step."""
        return [k for k in range(self.trainers) if self.left.get(k, step + 1) > step]


class Rounds:
    """The contributions to one channel: those of a step count when every trainer that is there has given its own.

    Changes with every contribution. Other rules of when contributions count are other classes with these methods; what
    counts is numbered, and a server's program runs once for each number.
    """

    def __init__(self, channel: Channel, attendance: Attendance):
        self.channel, self._attendance = channel, attendance
        self._given: dict[int, Given] = {}

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed and others have not."""
        return bool(self._given)

    def take(self, trainer: int, push: Push, tensor: torch.Tensor) -> int:
        """Takes a contribution in; returns the number under which it counts."""
        self._given.setdefault(push.step, {})[trainer] = push.weight, tensor
        return push.step

    def complete(self) -> list[tuple[int, torch.Tensor]]:
        """What has become complete: numbers, each with the merged value. Raises `BatchError` where nobody has examples."""
        found = [(step, self._given.pop(step)) for step in sorted(self._given) if not self._late(step)]
        for step, given in found:
            if not any(weight for weight, _ in given.values()):
                raise no_examples(step)
        return [(step, merge(self.channel, given, self._attendance.trainers)) for step, given in found]

    def missing(self) -> list[tuple[int, str]]:
        """Which contributions are late: steps, each with what to say of it."""
        return [
            (
                step,
                f"'{self.channel.variable.name}' of step {step} from trainer {', '.join(map(str, self._late(step)))}",
            )
            for step in sorted(self._given)
            if self._late(step)
        ]

    def _late(self, step: int) -> list[int]:
        return [k for k in self._attendance.expected(step) if k not in self._given[step]]


def merge(channel: Channel, given: Mapping[int, tuple[float, torch.Tensor]], trainers: int) -> torch.Tensor:
    """One value of all contributions, added in the order of trainers: the same whoever came first.

    Contributions are already multiplied by weight / trainers; their sum is divided by the sum of the weights / trainers
    unless that is 1, so that it is a mean over those that are there. g = 1 from three trainers of four gives 1.0.
    """
    ordered = [given[k] for k in sorted(given)]
    if channel.merge == "first":
        return ordered[0][1]
    total = ordered[0][1]
    for _, tensor in ordered[1:]:
        total = total + tensor
    if channel.merge == "mean":
        weight = _sum_of_weights([w for w, _ in ordered], total.dtype) / trainers
        if weight not in (0, 1):
            total = total / weight
    return total


def no_examples(step: int) -> BatchError:
    """The error of a step for which no trainer has an example: its mean is 0 / 0."""
    return BatchError(
        f"step {step}: no trainer has examples; expected at least one, on some trainer. Leave the step out on all "
        "trainers for such a batch."
    )


def _sum_of_weights(weights: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Added as collectives add them, in float64 only for float64 values: so servers and replicas agree to the bit."""
    precision = torch.float64 if dtype is torch.float64 else torch.float32
    total = torch.tensor(weights[0], dtype=precision)
    for weight in weights[1:]:
        total = total + torch.tensor(weight, dtype=precision)
    return total
