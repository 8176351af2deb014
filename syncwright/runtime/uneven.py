"""Loaders that end after different numbers of batches: who has no more goes on with batches without examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from syncwright import ops
from syncwright.errors import BatchError
from syncwright.job import BETWEEN, STEP, Job
from syncwright.passes.average import communicates
from syncwright.program import Program
from syncwright.runtime.lookahead import is_same
from syncwright.runtime.sharding import rows_of

MORE = "+"
"""Behind a number of steps: as many are done, and others follow. Without it: there are no more."""


class Words(Protocol):
    """What the trainers of a job say to each other beside their steps."""

    def say(self, key: str, value: str) -> None:
        """Returns when all others can hear it."""
        ...

    def heard(self, key: str) -> str | None:
        """What has been said; None: nothing yet."""
        ...

    def hear(self, key: str, trainer: int, enough: Callable[[str], bool]) -> str:
        """Waits for a trainer to say something that is enough; "0" of one that is gone."""
        ...

    def leave(self) -> None:
        """Says that this trainer takes no further step."""
        ...

    def is_gone(self, trainer: int) -> bool:
        """Whether a trainer takes no further step."""
        ...


class Ends:
    """Of one trainer: its loaders, one after another, beside those of the others. Changes with every batch.

    Before its last batch a trainer says how many it has. Where a step of one trainer is done when all have begun it, all whose
    last batch it was have said so by then; elsewhere each says after every step where it is.
    """

    def __init__(self, words: Words, rank: int, trainers: int):
        self._words, self._rank = words, rank
        self._others = [k for k in range(trainers) if k != rank]
        self._loaders = 0
        self._latest: tuple | None = None
        self._without: tuple | None = None
        self._ended: dict[int, int] = {}

    def know(self, batch: tuple) -> None:
        """A batch of which those without examples are made, until there is another one."""
        self._latest = batch

    def is_without_examples(self, batch: tuple) -> bool:
        """Whether a batch was given because the loader has ended."""
        return self._without is not None and is_same(batch, self._without)

    def batches(
        self, loader: Iterable, job: Callable[[], Job | None], announce: Callable[[object], None]
    ) -> Iterator[tuple]:
        """The batches of `loader`, and then as many without examples as the longest loader has more.

        job       the job, once there is one
        announce  is told each batch while the one in front of it is still to be given
        """
        self._loaders, self._ended, self._without, done = self._loaders + 1, {}, None, 0
        given, end = iter(loader), object()
        batch = next(given, end)
        self._say("0" if batch is end else f"0{MORE}")
        while batch is not end:
            following = next(given, end)
            if following is end:
                self._say(f"{done + 1}")
            else:
                announce(following)
            self._latest = _as_tuple(batch)
            yield self._latest
            done += 1
            if following is not end and _says_where_it_is(job()):
                self._say(f"{done}{MORE}")
            batch = following
        while self._goes_on(done, job()):
            self._without = _as_tuple(rows_of(self._of_which(), 0, 0))
            yield self._without
            done += 1

    def leave(self) -> None:
        """This trainer takes no further step."""
        if self._loaders:
            self._words.leave()

    def _goes_on(self, done: int, job: Job | None) -> bool:
        """Whether another trainer has more batches, where all take every step together."""
        if job is not None and not is_together(job):
            return False
        waits = done == 0 or _says_where_it_is(job)
        words = [self._word_of(trainer, done, waits) for trainer in self._others]
        return any(word.endswith(MORE) or int(word) > done for word in words)

    def _word_of(self, trainer: int, done: int, waits: bool) -> str:
        if trainer in self._ended:
            return str(self._ended[trainer])
        key = f"loader {self._loaders} of {trainer}"
        word = self._words.hear(key, trainer, lambda word: _is_enough(word, done)) if waits else self._words.heard(key)
        if word is None or word.endswith(MORE):
            word = "0" if self._words.is_gone(trainer) else f"0{MORE}"
        if not word.endswith(MORE):
            self._ended[trainer] = int(word)
        return word

    def _of_which(self) -> tuple:
        if self._latest is None:
            raise BatchError(
                "own: this trainer's loader has no batch, and there was none before, so nothing says what a batch without "
                "examples looks like. Expected a batch. Give distribute(..., example=batch), one of any trainer's."
            )
        return self._latest

    def _say(self, word: str) -> None:
        self._words.say(f"loader {self._loaders} of {self._rank}", word)


def is_together(job: Job) -> bool:
    """Whether trainers wait for each other: in every step, every so many, or where one is too far ahead."""
    waits = any(exchange.waits for exchange in job.exchanges)
    return (
        communicates(job.plan)
        or any(communicates(span.job.plan) for span in job.spans)
        or waits
        or job.staleness is not None
    )


def _says_where_it_is(job: Job | None) -> bool:
    """Whether a step may be done on one trainer before all have begun it, and they wait for each other all the same."""
    if job is None or not is_together(job):
        return False
    jobs = [job, *(span.job for span in job.spans)]
    programs = [each.trainer[phase] for each in jobs for phase in (STEP, BETWEEN) if phase in each.trainer]
    return not all(_meets_all(job, program) for program in programs)


def _meets_all(job: Job, program: Program) -> bool:
    """Whether a trainer's program waits for something that all begin in it."""
    for node in program.graph.nodes:
        if node.target in ops.WAITS and node.target is not ops.wait_on_host:
            return True
        if node.target is ops.pull and node.args[0] and _is_of_all(job, str(node.args[1])):
            return True
    return False


def _is_of_all(job: Job, name: str) -> bool:
    """Whether a value that is pulled is made of what all trainers have pushed in the step."""
    return name not in job.arriving


def _is_enough(word: str, done: int) -> bool:
    return not word.endswith(MORE) or int(word.removesuffix(MORE)) >= done


def _as_tuple(batch: object) -> tuple:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)
