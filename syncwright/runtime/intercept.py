"""How the command line looks at a script's job: it runs the script up to its first step and takes over there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from syncwright.planning import PlanSource
from syncwright.runtime.replica import Examples


@dataclass(frozen=True, slots=True, eq=False)
class FirstStep:
    """What a script gave to `distribute`, and the batch of its first step.

    batch  the step's arguments; a script that is taken over runs alone, so they are the whole global batch
    """

    step: Callable
    model: torch.nn.Module
    optimizer: object
    state: Mapping[str, torch.nn.Module]
    plan: PlanSource | str | Path
    examples: Examples
    batch: tuple


_taker: ContextVar[Callable[[FirstStep], None] | None] = ContextVar("syncwright_intercept", default=None)


class Taken(BaseException):
    """Ends a script whose first step was taken over; passes every `except Exception`."""


@contextmanager
def intercepting(take: Callable[[FirstStep], None]) -> Iterator[None]:
    """While open, the first step of a `distribute` calls `take`, before it is captured, and ends the script."""
    token = _taker.set(take)
    try:
        yield
    except Taken:
        return
    finally:
        _taker.reset(token)


def intercepted(first: FirstStep) -> None:
    """Called where a job would start."""
    take = _taker.get()
    if take is not None:
        take(first)
        raise Taken
