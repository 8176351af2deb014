"""Batch norm over the batches of all trainers together."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Graph, Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.insert import SAME, read_share, read_weight, weight_of_call
from syncwright.plan import AllReduce, ParameterServer, Plan, Shard
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
FORWARD = aten._native_batch_norm_legit_functional.default
WITHOUT_STATISTICS = aten._native_batch_norm_legit.no_stats
BACKWARD = aten.native_batch_norm_backward.default


def sync_batch_norm(program: Program, plan: Plan) -> Program:
    """Normalises by the mean and the variance of all trainers' examples, as `torch.nn.SyncBatchNorm` does.

    before  %y, %m, %s, %rm, %rv = batch_norm(%x, w, b, mean, var, training), ..., %d, %gw, %gb = batch_norm_backward(%g, %x, ...)
    after   %p = gather_parts([cat(mean(%x), var(%x), count)], "batch_norm.statistics"), %m, %v = of all of wait_whole(%p),
            %y = batch_norm(%x, w, b, %m, %v, not training), %rm = lerp(mean, %m, 0.1), ...,
            %q = gather_parts([cat(sum(%g), sum(%g * (%x - %m))) * share], "batch_norm_backward.sums"),
            %d = (%g - %sum(wait_whole(%q)) ...) * w / std

    A trainer gives its mean, the variance around it and its count (Chan et al., 1979): no sum of squares loses digits. The
    gradient of what is normalised is that of the mean loss of all, weighted by examples, divided by this trainer's share of it,
    as all gradients are multiplied by that where they are reduced. Running statistics are the same on all trainers, and are not
    averaged again.
    """
    if not plan.sync_batch_norm or plan.trainers == 1:
        return program
    program = program.edit()
    norms = [node for node in program.graph.nodes if node.target in (FORWARD, WITHOUT_STATISTICS) and _trains(node)]
    if not norms:
        return program
    known, share = Inference(mode_of(program.graph)), None
    if "sum" not in {
        sync.reduce for each in plan.sharings if isinstance(sync := each.sync, AllReduce | Shard | ParameterServer)
    }:
        program, weight = read_weight(program, weight_of_call(plan))
        share = read_share(weight, plan.trainers)
    for norm in norms:
        _Norm(program.graph, norm, plan.trainers, share, known).rewrite()
    remove_dead(program.graph)
    return program


def _trains(node: Node) -> bool:
    """Whether it normalises by the statistics of its batch."""
    return node.args[5 if node.target is FORWARD else 3] is True


@dataclass(slots=True, eq=False)
class _Norm:
    """One batch norm, and where it goes backward.

    share  what a trainer's part of the loss weighs; None: losses are added up
    """

    graph: Graph
    norm: Node
    trainers: int
    share: Node | None
    known: Inference

    def rewrite(self) -> None:
        x, weight, bias = self.norm.args[:3]
        old = {int(user.args[1]): user for user in self.norm.users}  # type: ignore[arg-type]
        momentum, eps = self.norm.args[-2:]
        with self.graph.inserting_before(self.norm):
            mean, variance, total = self._statistics(x)  # type: ignore[arg-type]
            deviation = self._call(aten.rsqrt.default, self._call(aten.add.Tensor, variance, eps))
            given = (x, weight, bias, mean, variance, False, momentum, eps)
            made = {0: self._call(getitem, self._call(FORWARD, *given), 0), 1: mean, 2: deviation}
            if self.norm.target is FORWARD:
                unbiased = self._call(aten.mul.Tensor, variance, total)
                unbiased = self._call(aten.div.Tensor, unbiased, self._call(aten.sub.Tensor, total, 1.0))
                for place, new in ((3, mean), (4, unbiased)):
                    made[place] = self._call(aten.lerp.Scalar, self.norm.args[place], new, momentum)
                    made[place].meta[SAME] = True
        backward = [user for user in (old[1].users if 1 in old else ()) if user.target is BACKWARD]
        for place, node in old.items():
            node.replace_all_uses_with(made[place])
        for node in backward:
            self._backward(node, total)

    def _call(self, target: object, *args: object, **kwargs: object) -> Node:
        return self.known.call(self.graph, target, *args, **kwargs)  # type: ignore[arg-type]

    def _wide(self, x: Node) -> Node:
        narrow = x.meta["val"].dtype.itemsize < 4
        return self._call(aten._to_copy.default, x, dtype=torch.float32) if narrow else x

    def _of_all(self, own: Node, name: str) -> Node:
        """Every trainer's vector, one above another."""
        count, channel = own.meta["val"].shape[0], f"{self.norm.name}.{name}"
        started = self._call(ops.gather_parts, [own], channel, self.trainers)
        waited = self._call(ops.wait_whole, started, channel, [self.trainers * count])
        return self._call(aten.view.default, self._call(getitem, waited, 0), [self.trainers, count])

    def _statistics(self, x: Node) -> tuple[Node, Node, Node]:
        """The mean and the variance of each channel over all trainers' examples, and the count of numbers in one."""
        val = x.meta["val"]
        channels, axes = val.shape[1], [axis for axis in range(val.dim()) if axis != 1]
        wide = self._wide(x)
        own = self._call(aten.var_mean.correction, wide, axes, correction=0)
        ones = self._call(aten.ones_like.default, self._call(aten.select.int, wide, 1, 0))
        count = self._call(aten.reshape.default, self._call(aten.sum.default, ones), [1])
        parts = [self._call(getitem, own, 1), self._call(getitem, own, 0), count]
        table = self._of_all(self._call(aten.cat.default, parts), "statistics")
        cuts = ((0, channels), (channels, 2 * channels), (2 * channels, 2 * channels + 1))
        means, variances, counts = (self._call(aten.slice.Tensor, table, 1, *cut) for cut in cuts)
        total = self._call(aten.sum.default, counts)
        mean = self._mean(means, counts, total)
        apart = self._call(aten.pow.Tensor_Scalar, self._call(aten.sub.Tensor, means, mean), 2)
        return mean, self._mean(self._call(aten.add.Tensor, variances, apart), counts, total), total

    def _mean(self, values: Node, counts: Node, total: Node) -> Node:
        weighted = self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, values, counts), [0])
        return self._call(aten.div.Tensor, weighted, total)

    def _backward(self, node: Node, total: Node) -> None:
        """%d = (%g - mean(g) - (%x - %m) * mean(g * (x - m)) / var) * w / std, with means over all trainers' examples."""
        grad, x, weight, mean, deviation, mask = (node.args[place] for place in (0, 1, 2, 5, 6, 9))
        val = x.meta["val"]  # type: ignore[union-attr]
        channels, axes = val.shape[1], [axis for axis in range(val.dim()) if axis != 1]
        across = [1, channels] + [1] * (val.dim() - 2)
        old = {int(user.args[1]): user for user in node.users}  # type: ignore[arg-type]
        with self.graph.inserting_before(node):
            wide = self._wide(grad)  # type: ignore[arg-type]
            apart = self._call(aten.sub.Tensor, self._wide(x), self._call(aten.view.default, mean, across))  # type: ignore[arg-type]
            sums = [self._call(aten.sum.dim_IntList, wide, axes)]
            sums.append(self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, wide, apart), axes))
            made = {1: self._call(aten.mul.Tensor, sums[1], deviation), 2: sums[0]}
            if 0 in old:
                made[0] = self._input(wide, apart, sums, total, weight, deviation, across)  # type: ignore[arg-type]
                if made[0].meta["val"].dtype != val.dtype:
                    made[0] = self._call(aten._to_copy.default, made[0], dtype=val.dtype)
        assert mask, "what is not wanted is not read"
        for place, got in old.items():
            got.replace_all_uses_with(made[place])

    def _input(
        self,
        grad: Node,
        apart: Node,
        sums: list[Node],
        total: Node,
        weight: Node | None,
        deviation: Node,
        across: list[int],
    ) -> Node:
        """The gradient of what was normalised."""
        channels = across[1]
        own = self._call(aten.cat.default, sums)
        own = own if self.share is None else self._call(aten.mul.Tensor, own, self.share)
        mean = self._call(aten.div.Tensor, self._call(aten.sum.dim_IntList, self._of_all(own, "sums"), [0]), total)
        mean = mean if self.share is None else self._call(aten.div.Tensor, mean, self.share)
        first, second = (
            self._call(aten.slice.Tensor, mean, 0, *cut) for cut in ((0, channels), (channels, 2 * channels))
        )
        second = self._call(aten.mul.Tensor, second, self._call(aten.mul.Tensor, deviation, deviation))
        found = self._call(aten.sub.Tensor, grad, self._call(aten.view.default, first, across))
        along = self._call(aten.mul.Tensor, apart, self._call(aten.view.default, second, across))
        scale = deviation if weight is None else self._call(aten.mul.Tensor, deviation, weight)
        return self._call(
            aten.mul.Tensor, self._call(aten.sub.Tensor, found, along), self._call(aten.view.default, scale, across)
        )
