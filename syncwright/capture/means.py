"""Means over a part of a batch's examples: a masked loss, `ignore_index`, weights of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode

from syncwright import ops
from syncwright.capture import private
from syncwright.program import Role, Variable

aten = torch.ops.aten
_LINE = "line"
_DEFAULT_IGNORED = -100
_LOSSES = frozenset({aten.nll_loss_forward.default, aten.nll_loss2d_forward.default})
_MEAN = 1
_QUOTED = _LOSSES | {aten.div.Tensor}
_SUMS = frozenset(
    {aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.count_nonzero.default}
)


class Lines(TorchDispatchMode):
    """While open, calls that may be such a mean note the user's line in their node's meta."""

    def __init__(self, line: Callable[[], str]):
        super().__init__()
        self._line = line

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _QUOTED and (node := private.newest_call()) is not None:
            node.meta[_LINE] = self._line()
        return result


def partial_means(graph: Graph, arguments: Sequence[Variable], batch: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """What is said of every mean that a gradient goes through and that is over something else than all examples.

    The trainers' weights are their numbers of examples; such a mean needs the numbers of what it is over. Found are

    * the loss of classes with `reduction="mean"` and weights of classes, or an `ignore_index` other than the default, or
      the default where a label of the example batch has it (the default alone says nothing: every such loss has one);
    * the quotient of two sums, or means, of which the lower one is made from the batch and from no parameter: the sum of
      a mask. A quotient by a number (`len(x)`) is none.
    """
    roles = dict(zip(graph.find_nodes(op="placeholder"), arguments, strict=True))
    inputs, parameters = (
        _made_from(graph, {n for n, v in roles.items() if v.role is r}) for r in (Role.INPUT, Role.PARAM)
    )
    found: dict[str, str] = {}
    for node in sorted(_ancestors(graph.find_nodes(op="call_function", target=ops.gradient))):
        if _LINE not in node.meta:
            continue
        if node.target in _LOSSES:
            what = _of_classes(node, {n: batch[v.name] for n, v in roles.items() if v.role is Role.INPUT})
        else:
            what = "divides by a sum over the batch, such as a mask's" if _is_quotient(node, inputs, parameters) else ""
        if what:
            found.setdefault(node.meta[_LINE], what)
    return tuple(f"{line}: this mean {what}" for line, what in found.items())


def _of_classes(node: Node, batch: Mapping[Node, torch.Tensor]) -> str:
    _, labels, weight, reduction, ignored = node.args[:5]
    if reduction != _MEAN:
        return ""
    if weight is not None:
        return "weighs examples by their class"
    if ignored != _DEFAULT_IGNORED:
        return f"leaves examples out (ignore_index={ignored})"
    given = [batch[n] for n in _ancestors([labels]) if n in batch]  # type: ignore[list-item]
    if any(torch.eq(x, _DEFAULT_IGNORED).any().item() for x in given if not x.is_floating_point()):
        return f"leaves examples out (the batch has labels {ignored})"
    return ""


def _is_quotient(node: Node, inputs: set[Node], parameters: set[Node]) -> bool:
    above, below = node.args[:2]
    if not isinstance(above, Node) or not isinstance(below, Node):
        return False
    depends = above in parameters and below in inputs and below not in parameters
    return depends and _is_sum(above) and _is_sum(below)


def _is_sum(node: Node) -> bool:
    """A number made from a sum, elementwise: a sum, `sum.clamp(min=1)`, `sum + 1e-6`."""
    while node.meta["val"].dim() == 0 and node.target not in _SUMS:
        if torch.Tag.pointwise not in getattr(node.target, "tags", ()) and node.target is not aten._to_copy.default:
            return False
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
        if not tensors:
            return False
        node = tensors[0]
    return node.meta["val"].dim() == 0


def _made_from(graph: Graph, sources: set[Node]) -> set[Node]:
    found = set(sources)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(roots: Sequence[Node]) -> set[Node]:
    stack, seen = list(roots), set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen
