"""Random numbers that a step draws, and those that it draws once more from a state that it has set back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from syncwright.capture.lines import current_line
from syncwright.errors import CaptureError


class Draws(TorchDispatchMode):
    """While open, every random call gets the number of its draw. Changes with every call.

    `torch.utils.checkpoint` sets the random state back to compute a forward with dropout once more: its calls get the
    numbers of the forward's, and the graph keeps one call for each number (see `normalize`). Fake tensors do not move
    the generator, so a state stands for the number of draws before it and is known by identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self._next = 0
        self._calls: list[object] = []
        self._states: dict[int, tuple[torch.Tensor, int]] = {}
        self._undo: list[Callable[[], None]] = []
        self._foreign = ""

    def __enter__(self):
        self._patch("get_rng_state", self._get(torch.get_rng_state))
        self._patch("set_rng_state", self._set(torch.set_rng_state))
        self._patch("manual_seed", self._seed(torch.manual_seed))
        return super().__enter__()

    def __exit__(self, *raised):
        for undo in reversed(self._undo):
            undo()
        return super().__exit__(*raised)

    def check_end(self) -> None:
        """Raises `CaptureError` where the next step would begin with numbers that this one has drawn."""
        if self._next != len(self._calls):
            raise CaptureError(
                "the step ends with the random state set back, so that the next step would draw the same numbers; a graph draws "
                "new ones. Expected a step to go on from where it came to. Leave the random state alone, or restore it."
            )

    def _patch(self, name: str, replacement: Callable) -> None:
        for module in (torch, torch.random):
            self._undo.append(partial(setattr, module, name, getattr(module, name)))
            setattr(module, name, replacement)

    def _get(self, original: Callable) -> Callable:
        def get_rng_state() -> torch.Tensor:
            state = original()
            self._states[id(state)] = (state, self._next)
            return state

        return get_rng_state

    def _set(self, original: Callable) -> Callable:
        def set_rng_state(state: torch.Tensor) -> None:
            original(state)
            if id(state) in self._states:
                self._next, self._foreign = self._states[id(state)][1], ""
            else:
                self._foreign = "a random state from elsewhere was set"

        return set_rng_state

    def _seed(self, original: Callable) -> Callable:
        def manual_seed(seed: int) -> torch.Generator:
            self._foreign = "torch.manual_seed was called"
            return original(seed)

        return manual_seed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._note((func, *(_looks(a) for a in [*args, *(kwargs or {}).values()])))
        return func(*args, **(kwargs or {}))

    def _note(self, call: object) -> None:
        if self._foreign:
            raise CaptureError(
                f"{current_line()}: random numbers are drawn after {self._foreign} inside the training step; a graph goes on "
                "with the trainer's own stream. Expected a step that only draws, or that draws again what it drew before (as "
                "torch.utils.checkpoint does). Seed before the step, or pass the numbers in the batch."
            )
        if self._next == len(self._calls):
            self._calls.append(call)
        elif self._calls[self._next] != call:
            raise CaptureError(
                f"{current_line()}: the step sets the random state back and then draws other numbers than the first time. "
                "Expected what is computed again, as by torch.utils.checkpoint, to draw the same. Take branches that depend on "
                "torch.is_grad_enabled() out of it, or give checkpoint(..., preserve_rng_state=False)."
            )
        self.numbers.append(self._next)
        self._next += 1


def _looks(value: object) -> object:
    return (value.dtype, tuple(value.shape), value.device) if isinstance(value, torch.Tensor) else value
