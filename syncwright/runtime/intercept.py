"""How the command line looks at a script's job: it runs the script up to its first step and takes over there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_taker: ContextVar[Callable[..., None] | None] = ContextVar("syncwright_intercept", default=None)


class Taken(BaseException):
    """Ends a script whose first step was taken over; passes every `except Exception`."""


@contextmanager
def intercepting(take: Callable[..., None]) -> Iterator[None]:
    """While open, the first step of a `distribute` calls `take(trainer, prepared, part)` and ends the script."""
    token = _taker.set(take)
    try:
        yield
    except Taken:
        return
    finally:
        _taker.reset(token)


def intercepted(*given: Any) -> None:
    """Called where a job would start."""
    take = _taker.get()
    if take is not None:
        take(*given)
        raise Taken
