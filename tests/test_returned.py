"""What a step returns: which tensors have a value per example."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncwright
from syncwright.errors import LoweringError

CLASSES = 3


def classifying(metrics: Callable[..., dict]) -> Callable:
    """A step on three classes that returns the loss, and `metrics(logits, y, *rest)`."""

    def step(model, optimizer, x, y, *rest):
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y, *rest)
        loss.backward()
        optimizer.step()
        return loss, metrics(logits, y, *rest)

    return step


def per_class(logits: torch.Tensor, y: torch.Tensor, *_: torch.Tensor) -> dict:
    return {"hits": torch.zeros(CLASSES).index_add(0, y, (logits.argmax(1) == y).float())}


def per_example(logits: torch.Tensor, y: torch.Tensor, *_: torch.Tensor) -> dict:
    return {"loss of each": F.cross_entropy(logits, y, reduction="none"), "logits": logits}


def along(step: Callable, *batch: torch.Tensor) -> dict[str, str]:
    torch.manual_seed(0)
    model = nn.Linear(2, CLASSES)
    program = syncwright.capture(step, model, torch.optim.Adam(model.parameters()), *batch)
    return {n: v.along for n, v in program.variables.items() if n.startswith("metrics.")}


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(size, 2), torch.arange(size) % CLASSES


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_value_per_class_is_none_per_example(size: int) -> None:
    assert along(classifying(per_class), *batch_of(size)) == {"metrics.hits": ""}
    assert along(classifying(per_example), *batch_of(size)) == {
        "metrics.loss of each": "batch",
        "metrics.logits": "batch",
    }


def test_weights_of_as_many_classes_as_examples_are_told_apart() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])
    assert along(classifying(per_class), *batch_of(3), weights) == {"metrics.hits": ""}
    assert set(along(classifying(per_example), *batch_of(3), weights).values()) == {"batch"}


@pytest.mark.parametrize(("plan", "servers"), [("all_reduce", 0), ("parameter_server", 1)])
def test_a_value_per_class_is_refused_by_name(plan: str, servers: int) -> None:
    model = nn.Linear(2, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(classifying(per_class), model, optimizer, plan=plan, trainers=2, servers=servers)
    with pytest.raises(LoweringError, match=r"the step returns 'metrics\.hits' of shape \[3\]"):
        job.step([batch_of(3), batch_of(3)])


def test_what_cannot_be_told_is_refused_by_name() -> None:
    """This step runs on three examples only."""

    def fixed(logits: torch.Tensor, y: torch.Tensor) -> dict:
        return {"table": logits.view(3, 3) @ torch.eye(3)}

    assert along(classifying(fixed), *batch_of(3)) == {"metrics.table": "unknown"}
    model = nn.Linear(2, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(classifying(fixed), model, optimizer, plan="all_reduce", trainers=2)
    with pytest.raises(LoweringError, match=r"'metrics\.table' of shape \[3, 3\].*cannot be told"):
        job.step([batch_of(3), batch_of(3)])
    alone = syncwright.loopback(classifying(fixed), model, optimizer, plan="all_reduce")
    assert alone.step([batch_of(3)])[1]["table"].shape == (3, 3)
