"""Outer: what trainers that have trained alone make of their values when they exchange them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from syncwright.errors import PlanError
from syncwright.near import did_you_mean
from syncwright.typed import check_fields

Setting = int | float | bool | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of all trainers' values (local SGD): base + mean(latest - base), base being what the last exchange gave."""


@dataclass(frozen=True, slots=True)
class Geo:
    """Each trainer's own difference, added on a server as it comes, without waiting for the others (Paddle's GEO)."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer of `torch.optim`, which updates base with mean(base - latest) as its gradient (DiLoCo).

    name      of the class: "SGD"
    settings  numbers, by the names of the constructor's arguments: (("lr", 0.7), ("momentum", 0.9), ("nesterov", True))

    Raises PlanError for what the constructor does not take.
    """

    name: str
    settings: tuple[tuple[str, Setting], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, PlanError)
        self.build([torch.nn.Parameter(torch.zeros(1))])

    @classmethod
    def of(cls, name: str, **settings: Setting) -> Optimizer:
        """Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True)"""
        return cls(name, tuple(settings.items()))

    def build(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        kinds = _kinds()
        if self.name not in kinds:
            advice = did_you_mean(self.name, kinds, "Write one of them.")
            raise PlanError(f"outer optimizer: found {self.name!r}, expected one of {', '.join(kinds)}. {advice}")
        kind = kinds[self.name]
        known = [name for name in inspect.signature(kind).parameters if name != "params"]
        for name, _ in self.settings:
            if name not in known:
                expected = f"one of {', '.join(known)}"
                advice = did_you_mean(name, known, "Take it out.")
                raise PlanError(
                    f"outer optimizer {self.name}: found the setting {name!r}, expected {expected}. {advice}"
                )
        try:
            return kind(parameters, **dict(self.settings))
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"outer optimizer {self.name}: found settings that torch.optim.{self.name} does not take ({error}), expected "
                "those of its constructor. Correct them."
            ) from error


Outer = Mean | Geo | Optimizer

_UNFIT = {"LBFGS", "SparseAdam", "Muon"}
"""They ask for the loss again, for sparse gradients, for matrices."""


@cache
def _kinds() -> dict[str, Callable[..., Any]]:
    found = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    fit = {n: k for n, k in found.items() if issubclass(k, torch.optim.Optimizer) and n not in _UNFIT}
    return {name: fit[name] for name in sorted(fit) if fit[name] is not torch.optim.Optimizer}
