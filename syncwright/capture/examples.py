"""Which returned tensors have a value per example, told by running the step's shapes on twice as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from syncwright.errors import CaptureError
from syncwright.program import Along, Program, Variable
from syncwright.tree import tensors

Shapes = Sequence[tuple[int, ...]]


def leading_size(batch: object) -> int | None:
    """The batch's size: the leading size of its first tensor that has axes."""
    sizes = (leaf.shape[0] for leaf in tensors(batch) if leaf.dim())
    return next(sizes, None)


def with_examples(
    program: Program, outputs: Sequence[str], batch: tuple, shapes: Callable[[tuple], Shapes]
) -> Mapping[str, Variable]:
    """The program's variables, with `along` where what the step returns has a leading axis of the batch's size.

    A metric per class has it too where there happen to be as many classes as examples. So the step runs again, on
    shapes alone (`shapes(batch)`: of what it returns, in the order of `outputs`), with twice as many examples. What then
    is twice as long goes along the batch; what is as long as before does not.
    """
    size, variables = leading_size(batch), dict(program.variables)
    asked = [name for name in outputs if size is not None and variables[name].shape[:1] == (size,)]
    if not asked:
        return variables
    found = _runs(batch, int(size or 0), shapes)
    for name in asked:
        lengths = {run[outputs.index(name)][:1] for run in found}
        variables[name] = replace(variables[name], along=_along(lengths, int(size or 0)))
    return variables


def _along(lengths: set[tuple[int, ...]], size: int) -> Along:
    if lengths == {(2 * size,)}:
        return "batch"
    return "" if lengths == {(size,)} else "unknown"


def _runs(batch: tuple, size: int, shapes: Callable[[tuple], Shapes]) -> list[Shapes]:
    """What the step returns on twice as many examples; none where it runs on no such batch.

    Every tensor of the batch's size is doubled. Where the step does not run so, one of them may be something else, such
    as the weights of as many classes: then each is left as it is, in turn.
    """
    leaves, spec = pytree.tree_flatten(batch)
    along = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.shape[:1] == (size,)]
    for choices in ([None], along[1:]):
        found: list[Shapes] = []
        for left in choices:
            doubled = [_doubled(x) if i in along and i != left else x for i, x in enumerate(leaves)]
            found.extend(_run(spec.unflatten(doubled), shapes))
        if found:
            return found
    return []


def _run(batch: tuple, shapes: Callable[[tuple], Shapes]) -> Iterator[Shapes]:
    try:
        yield shapes(batch)
    except CaptureError:
        return


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty((2 * tensor.shape[0], *tensor.shape[1:]))
