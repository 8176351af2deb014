"""A bounded cache of what was captured, by what a capture stands for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from syncwright.capture.axes import name_of
from syncwright.capture.state import Binding
from syncwright.errors import BatchError
from syncwright.program import Guard, Program
from syncwright.tree import leaves, with_paths

CAPACITY = 8


@dataclass(frozen=True, slots=True)
class Key:
    """What a capture stands for.

    leaves    of the batch: of tensors shape (None along a dynamic axis), dtype and device; others as they are
    axes      of each leaf, the dynamic ones
    settings  flags that the trace has frozen
    """

    leaves: tuple[object, ...]
    axes: tuple[tuple[int, ...], ...]
    settings: tuple
    guards: tuple[Guard, ...]

    def stands_for(self, given: Given) -> bool:
        alike = self.settings == given.settings and self.leaves == given.leaves(self.axes)
        return alike and all(guard.holds(given.numbers) for guard in self.guards)


@dataclass(frozen=True, slots=True)
class Given:
    """A batch, and what else a capture depends on.

    sizes    of the tensors, by variable
    numbers  what guards read: hyper-parameters, and sizes
    """

    batch: tuple
    settings: tuple
    sizes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, object]

    @classmethod
    def of(cls, batch: tuple, binding: Binding, more: tuple = ()) -> Given:
        """`more` is compared like the settings of the model and the optimizer."""
        found = with_paths(batch)
        sizes = {name_of(path): tuple(leaf.shape) for path, leaf in found if isinstance(leaf, torch.Tensor)}
        return cls(batch, (*binding.settings(), *more), sizes, {**binding.hyper_values(), **sizes})

    def key(self, program: Program) -> Key:
        known = [program.variables.get(name_of(path)) for path, _ in with_paths(self.batch)]
        axes = tuple(() if variable is None else variable.dynamic for variable in known)
        return Key(self.leaves(axes), axes, self.settings, program.guards)

    def leaves(self, axes: tuple[tuple[int, ...], ...]) -> tuple[object, ...]:
        return tuple(_leaf(leaf, each) for leaf, each in zip(leaves(self.batch), axes, strict=True))


T = TypeVar("T")


class Kept(Generic[T]):
    """A bounded cache of what was captured. Forgets what was used longest ago. Changes with use."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[T]:
        return iter(self._kept.values())

    def find(self, given: Given) -> T | None:
        """What stands for a batch and numbers like these."""
        for key in self._kept:
            if key.stands_for(given):
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def keep(self, key: Key, made: T) -> None:
        self._kept[key] = made
        if len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)


def _leaf(leaf: object, axes: tuple[int, ...]) -> object:
    if isinstance(leaf, torch.Tensor):
        return tuple(None if i in axes else size for i, size in enumerate(leaf.shape)), leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError as error:
        raise BatchError(
            f"the batch holds a {type(leaf).__name__}; expected tensors, numbers and strings, in any tree. "
            "Turn it into a tensor: torch.as_tensor(...)."
        ) from error
    return leaf
