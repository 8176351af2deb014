"""A mean over something else than all examples warns, where trainers are weighted by their numbers of examples."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncwright

X = torch.arange(8.0).view(4, 2)
LABELS, MISSING = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, -100, 1])
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0])

Loss = Callable[..., torch.Tensor]


def plain(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return nn.CrossEntropyLoss()(logits, y)


def summed(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, ignore_index=0, reduction="sum") / len(y)


def scaled_inputs(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logits.sum(1) / mask.sum()).square().mean()


def masked(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logits.square().sum(1) * mask).sum() / mask.sum()


def clamped(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (logits.square().sum(1) * mask).mean() / ((mask > 0).float().mean() + 1e-6).clamp(min=0.1)


def ignoring(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, ignore_index=0)


def weighted(logits: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, weight=torch.tensor([1.0, 2.0, 3.0]))


def warned(loss_of: Loss, y: torch.Tensor, trainers: int = 2, examples: Callable | None = None) -> list[str]:
    def step(model, optimizer, x, y, mask):
        optimizer.zero_grad()
        loss = loss_of(model(x), y, mask)
        loss.backward()
        optimizer.step()
        return loss

    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = syncwright.loopback(step, model, optimizer, trainers=trainers, examples=examples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            job.step(list(zip(*(t.tensor_split(trainers) for t in (X, y, MASK)), strict=True)))
    return [str(w.message) for w in caught if "examples=" in str(w.message)]


@pytest.mark.parametrize("loss", [plain, summed, scaled_inputs], ids=lambda loss: loss.__name__)
def test_means_over_all_examples_are_silent(loss: Loss) -> None:
    assert warned(loss, LABELS) == []


@pytest.mark.parametrize(
    ("loss", "line", "what"),
    [
        (masked, "(logits.square().sum(1) * mask).sum() / mask.sum()", "divides by a sum over the batch"),
        (clamped, ".clamp(min=0.1)", "divides by a sum over the batch"),
        (ignoring, "F.cross_entropy(logits, y, ignore_index=0)", "leaves examples out (ignore_index=0)"),
        (weighted, "weight=torch.tensor([1.0, 2.0, 3.0])", "weighs examples by their class"),
    ],
    ids=["masked", "clamped", "ignoring", "weighted"],
)
def test_other_means_warn_once_and_quote_the_line(loss: Loss, line: str, what: str) -> None:
    (message,) = warned(loss, LABELS)
    quoted, said = message.split(": this mean ")
    assert quoted.startswith("test_means.py:")
    assert line in quoted
    assert said.startswith(what)
    assert "Give distribute(..., examples=)" in said


def test_the_default_ignore_index_warns_where_the_batch_has_it() -> None:
    """The first trainer's part, from which its step is captured, holds labels 0 and -100."""
    (message,) = warned(plain, MISSING.roll(-1))
    assert "leaves examples out (the batch has labels -100)" in message


def test_nothing_is_said_to_who_counts_or_is_alone() -> None:
    assert warned(masked, LABELS, examples=lambda x, y, mask: mask.sum()) == []
    assert warned(masked, LABELS, trainers=1) == []
