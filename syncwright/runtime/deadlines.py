"""How long roles wait for each other, and when a wait is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadlines:
    """In seconds.

    join     to find each other at the start
    wait     any other wait
    linger   to send what is left at the end
    compile  how long a role may capture or compile at a stretch: for as long, those who wait for it wait on
    """

    join: float = 60.0
    wait: float = 300.0
    linger: float = 5.0
    compile: float = 1800.0


class Wait:
    """Changes: one wait, whose end moves on while somebody who is waited for captures or compiles.

    seconds  how long it lasts when nobody does
    more     asked when time is over: how many seconds more are to be given
    doing    for errors: who captures or compiles, as the end of a sentence; nothing where nobody does
    """

    def __init__(
        self, seconds: float, more: Callable[[], float] = lambda: 0.0, doing: Callable[[], str] = lambda: ""
    ) -> None:
        self.seconds = seconds
        self.doing = doing
        self._more = more
        self._until = time.monotonic() + seconds

    def is_over(self) -> bool:
        """Whether time is over and nobody is given more."""
        if time.monotonic() <= self._until:
            return False
        more = self._more()
        self._until = time.monotonic() + more
        return more <= 0.0
