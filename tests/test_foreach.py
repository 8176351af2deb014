"""Operations on lists of tensors are captured one by one, and give the same numbers to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from syncwright.capture.foreach import each_by_itself
from syncwright.capture.state import Binding
from syncwright.capture.step import capture_step
from syncwright.update import find_updates


def lists(count: int) -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    return [[torch.rand(3) + 0.5, torch.rand(2, 2) + 0.5] for _ in range(count)]


@pytest.mark.parametrize("op", each_by_itself(), ids=str)
def test_the_same_as_on_a_list(op):
    tensors = iter(lists(3))
    given = []
    for argument in op._schema.arguments:
        kind = argument.type.kind()
        if kind == "ListType":
            inner = argument.type.getElementType().kind()
            given.append(next(tensors) if inner == "TensorType" else [0.5, 1.5])
        elif not argument.kwarg_only and not argument.has_default_value():
            given.append(torch.tensor(1.5) if kind == "TensorType" else 2.0)
    copied = copy.deepcopy(given)
    expected, found = op(*given), each_by_itself()[op](*copied)
    if op._schema.is_mutable:
        expected, found = given[0], copied[0]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_users_own_list_operations_do_not_tie_variables_together():
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True)
        torch._foreach_add_([p.grad for p in model.parameters()], 0.25)
        optimizer.step()
        return loss

    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    program = capture_step(step, Binding(model, optimizer), optimizer, (x,)).program
    assert find_updates(program).kinds() == {"weight": "elementwise", "bias": "elementwise"}
    values = {**Binding(model, optimizer).values(), **Binding(model, optimizer).hyper_values(), "batch.0": x}
    written = program.run({name: values[name] for name in program.reads})
    step(model, optimizer, x)
    assert torch.equal(written["weight"], model.weight)
    assert torch.equal(written["bias"], model.bias)
