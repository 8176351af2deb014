"""Values of variables that one flat variable stands for: laid out in it, and taken out of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from syncwright.deferred.tensor import Deferred, real
from syncwright.errors import JobError
from syncwright.program import Variable
from syncwright.runtime.large_pages import memory_for


def laid_flat(flat: Variable, parts: Sequence[Variable], values: Mapping[str, object]) -> torch.Tensor:
    """The parts' values in new memory, each where it belongs; zeros between them."""
    first = values[parts[0].name]
    assert isinstance(first, torch.Tensor), "flat variables are tensors"
    on_host = first.device.type == "cpu"
    joined = (
        memory_for(flat.shape, flat.dtype)
        if on_host
        else torch.empty(flat.shape, dtype=flat.dtype, device=first.device)
    )
    if sum(part.numel for part in parts) < flat.numel:
        joined.zero_()
    for part in parts:
        value = values[part.name]
        value = real(value) if isinstance(value, Deferred) else value
        joined[slice(*part.part)].view(part.shape).copy_(value)  # type: ignore[misc, arg-type]
    return joined


def equal(parts: Sequence[Variable], values: Mapping[str, object]) -> object:
    """The number that stands for several (step counts). Raises `JobError` where they are not equal."""
    first = parts[0]
    apart = [part.name for part in parts if values[part.name] != values[first.name]]
    if apart:
        raise JobError(
            f"'{apart[0]}' is {values[apart[0]]}, '{first.name}' is {values[first.name]}; one update for both of them needs "
            "them equal. Expected parameters of one optimizer to have made the same number of steps. Leave the passes "
            "flatten, join_served and join_tables out: they join updates."
        )
    return values[first.name]


def apart(values: Mapping[str, torch.Tensor], joined: Mapping[str, Sequence[Variable]]) -> dict[str, torch.Tensor]:
    """Values under the user's names: of a flat variable its parts, each a copy; of a number for several, all of them."""
    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        for part in joined.get(name, ()):
            found[part.name] = value if part.part is None else value[slice(*part.part)].view(part.shape).clone()
        if name not in joined:
            found[name] = value
    return found
