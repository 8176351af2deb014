"""Which axes of a batch may have any size: marked by the user, as for torch.compile or torch.export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from syncwright.errors import CaptureError
from syncwright.tree import with_paths

Axes = Mapping[str, tuple[int, ...]]


def name_of(path: tuple) -> str:
    """The variable of a leaf of the batch, by its place in the tree: `batch.0`, `batch.1.mask`."""
    return ".".join(["batch", *map(str, path)])


def dynamic_axes(batch: tuple, dynamic_shapes: object = None) -> Axes:
    """Axes marked dynamic, by variable: those of `dynamic_shapes` and of `torch._dynamo.mark_dynamic(tensor, axis)`.

        dynamic_axes((x, y), ({0: "n"}, {0: "n"}))      {"batch.0": (0,), "batch.1": (0,)}

    dynamic_shapes  as `torch.export` takes it: a tree like the batch; for a tensor a dict by axis, or a list with an
                    entry per axis, where None is an axis of fixed size. Dims' names and bounds are not needed: what the
                    step asks of the sizes becomes a guard.

    Raises `CaptureError` where the tree is another than the batch's, or an axis does not exist.
    """
    asked = dict(_asked(dynamic_shapes, batch, ()))
    found = {}
    for path, leaf in with_paths(batch):
        if isinstance(leaf, torch.Tensor):
            name = name_of(path)
            marked = vars(leaf).get("_dynamo_dynamic_indices", ())
            axes = {_checked(axis, leaf, name) for axis in (*asked.get(name, ()), *marked)}
            if axes:
                found[name] = tuple(sorted(axes))
    return found


def joined(known: Axes, more: Axes) -> Axes:
    """Both; an example that was marked once stands for all batches."""
    return {name: tuple(sorted({*known.get(name, ()), *more.get(name, ())})) for name in (*known, *more)}


def _asked(spec: object, value: object, path: tuple) -> Iterator[tuple[str, list[int]]]:
    """(variable, axes) of a spec that goes with `value`."""
    if spec is None:
        return
    if isinstance(value, torch.Tensor):
        yield name_of(path), _axes(spec, path)
    elif isinstance(value, Mapping) and isinstance(spec, Mapping) and set(spec) <= set(value):
        for key, item in spec.items():
            yield from _asked(item, value[key], (*path, key))
    elif isinstance(value, tuple | list) and isinstance(spec, tuple | list) and len(spec) == len(value):
        for index, (item, part) in enumerate(zip(spec, value, strict=True)):
            yield from _asked(item, part, (*path, index))
    else:
        raise CaptureError(
            f"dynamic_shapes: found {spec!r} for '{name_of(path)}', a {type(value).__name__}; expected a tree like the batch, "
            "with a dict by axis for each tensor, or None. Write ({0: 'n'}, {0: 'n'}) for a batch of two tensors."
        )


def _axes(spec: object, path: tuple) -> list[int]:
    if isinstance(spec, Mapping):
        return [axis for axis, dim in spec.items() if dim is not None]
    if isinstance(spec, tuple | list):
        return [axis for axis, dim in enumerate(spec) if dim is not None]
    raise CaptureError(
        f"dynamic_shapes: found {spec!r} for '{name_of(path)}', a tensor; expected a dict by axis, such as {{0: 'n'}}, or None."
    )


def _checked(axis: object, tensor: torch.Tensor, name: str) -> int:
    if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
        raise CaptureError(
            f"dynamic_shapes: found axis {axis!r} for '{name}' of shape {list(tensor.shape)}; expected one of its axes, "
            f"0 to {tensor.dim() - 1}."
        )
    return axis % tensor.dim()
