"""A trace without writes, rewritten: to the letter what a second trace gives; and what it leaves to that."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import syncwright
from syncwright.capture.functional import NotCovered, without_writes
from syncwright.text import to_text
from tests import zoo

TRACE = importlib.import_module("syncwright.capture.trace")


@pytest.mark.parametrize(
    "optimizer", ["SGD-nesterov", "Adam-amsgrad", "Adafactor", "RAdam", "RMSprop-centered", "NAdam"]
)
@pytest.mark.parametrize("model", ["tied", "conv_eval", "dropout"])
def test_it_is_what_a_second_trace_gives(model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch):
    texts = []
    for rewrite in (must_cover, never):
        monkeypatch.setattr(TRACE, "without_writes", rewrite)
        built, optimizers = zoo.make_model(model, optimizer, torch.float32)
        ((x, y),) = zoo.make_batches(model, torch.float32, 2, 1)
        texts.append(to_text(syncwright.capture(zoo.make_step(model, clip=True), built, optimizers, x, y)))
    assert texts[0] == texts[1]


def must_cover(graph):
    return without_writes(graph)


def never(graph):
    raise NotCovered("for comparison")


def run_both(function, *inputs: torch.Tensor) -> None:
    """Results, and inputs afterwards, are the same to the bit."""
    module = make_fx(function)(*(x.clone() for x in inputs))
    pure = torch.fx.GraphModule(module, without_writes(module.graph))
    assert not any(n.target._schema.is_mutable for n in pure.graph.nodes if is_op(n) and "copy_" not in n.name)
    ours, theirs = [x.clone() for x in inputs], [x.clone() for x in inputs]
    torch.testing.assert_close(pure(*ours), function(*theirs), rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def is_op(node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def test_later_reads_see_the_write():
    def function(x, y):
        before = x * 2
        rows = x[0]
        x.add_(y)
        again = rows * 3
        x.mul_(before)
        return again + rows, x.t().detach().mul(2), before

    run_both(function, torch.randn(3, 3), torch.randn(3, 3))


def test_what_a_write_returns_is_what_it_wrote_to():
    def function(x, y):
        z = x.mul_(y).sub_(1.0)
        x.addcmul_(y, y)
        torch.maximum(x, y, out=x)
        y.copy_(x)
        return z, y + 1

    run_both(function, torch.randn(4), torch.randn(4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[0].add_(1.0),
        lambda x: x.t().mul_(2.0),
        lambda x: x.index_put_((torch.tensor([0]),), torch.zeros(3)),
        lambda x: x.bernoulli_(0.5),
        lambda x: x.zero_(),
        lambda x: nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
    ],
)
def test_not_covered(function):
    module = make_fx(lambda x: (function(x), x)[1])(torch.randn(3, 3))
    if any(is_op(n) and n.target._schema.is_mutable for n in module.graph.nodes):
        with pytest.raises(NotCovered):
            without_writes(module.graph)


def test_a_cast_is_not_covered():
    module = make_fx(lambda x, y: x.add_(y))(torch.zeros(3, dtype=torch.float16), torch.zeros(3))
    with pytest.raises(NotCovered, match="casts"):
        without_writes(module.graph)
