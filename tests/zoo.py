"""Small models, batches and optimizers on which every plan is compared with one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from syncwright.optim import RowWiseAdagrad

Batch = tuple[torch.Tensor, torch.Tensor]


class Embedding(nn.Module):
    """A table of which a batch reads few rows, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


class Tied(nn.Module):
    """One tensor read by a lookup and by the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.hidden = nn.Linear(4, 4)
        self.output = nn.Linear(4, 9, bias=False)
        self.output.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(self.table(ids))).mean(1))


class ConvNet(nn.Module):
    """A convolution and batch norm, in train or in eval mode."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.1, 0.1)
            self.norm.running_var.uniform_(0.5, 1.5)
        self.train(training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Transformer(nn.Module):
    """One block: attention whose key bias has a gradient of zero, up to rounding."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.project = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)
        self.head = nn.Linear(8, 9)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
        attention = self.dropout((q @ k.transpose(2, 3) / 2).softmax(3))
        x = x + self.project((attention @ v).transpose(1, 2).flatten(2))
        return self.head(x + self.dropout(self.narrow(F.gelu(self.wide(x)))))


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the zoo.

    batch    makes a batch of n examples from a generator
    loss     of the model's output and the second tensor of a batch
    mixes    why the whole batch at once is no reference: something in the step mixes its examples, or draws numbers
    """

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy
    mixes: str = ""


def _dense(features: int, classes: int) -> Callable[[torch.Generator, int], Batch]:
    return lambda g, n: (torch.randn(n, features, generator=g), torch.randint(classes, (n,), generator=g))


def _regression(g: torch.Generator, n: int) -> Batch:
    return torch.randn(n, 4, generator=g), torch.randn(n, 3, generator=g)


def _tokens(vocabulary: int, length: int, classes: int) -> Callable[[torch.Generator, int], Batch]:
    return lambda g, n: (
        torch.randint(vocabulary, (n, length), generator=g),
        torch.randint(classes, (n,), generator=g),
    )


def _images(g: torch.Generator, n: int) -> Batch:
    return torch.randn(n, 1, 5, 5, generator=g), torch.randint(3, (n,), generator=g)


def _text(g: torch.Generator, n: int) -> Batch:
    ids = torch.randint(9, (n, 6), generator=g)
    return ids[:, :-1], ids[:, 1:]


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


MODELS: Mapping[str, Entry] = {
    "linear": Entry(lambda: nn.Linear(4, 3), _regression, F.mse_loss),
    "mlp": Entry(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), _dense(6, 3)),
    "embedding": Entry(Embedding, _tokens(13, 3, 3)),
    "tied": Entry(Tied, _tokens(9, 3, 9)),
    "conv_train": Entry(lambda: ConvNet(True), _images, mixes="batch norm"),
    "conv_eval": Entry(lambda: ConvNet(False), _images),
    "transformer": Entry(lambda: Transformer(0.0), _text, _token_loss),
    "dropout": Entry(lambda: Transformer(0.2), _text, _token_loss, mixes="dropout"),
}

OptimizerTree = Optimizer | tuple[Optimizer, ...]


def _plain(kind: type[Optimizer], **settings: object) -> Callable[[nn.Module], OptimizerTree]:
    return lambda model: kind(model.parameters(), **settings)  # type: ignore[call-arg]


def _muon(model: nn.Module) -> OptimizerTree:
    """Muon for matrices, AdamW for the rest."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)


OPTIMIZERS: Mapping[str, Callable[[nn.Module], OptimizerTree]] = {
    "Adadelta": _plain(torch.optim.Adadelta, lr=0.5),
    "Adafactor": _plain(torch.optim.Adafactor, lr=0.02, weight_decay=0.01),
    "Adagrad": _plain(torch.optim.Adagrad, lr=0.02, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adam": _plain(torch.optim.Adam, lr=0.01, weight_decay=0.01),
    "Adam-amsgrad": _plain(torch.optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": _plain(torch.optim.AdamW, lr=0.01),
    "Adamax": _plain(torch.optim.Adamax, lr=0.01),
    "ASGD": _plain(torch.optim.ASGD, lr=0.05, t0=2),
    "Muon": _muon,
    "NAdam": _plain(torch.optim.NAdam, lr=0.01),
    "RAdam": _plain(torch.optim.RAdam, lr=0.05),
    "RMSprop": _plain(torch.optim.RMSprop, lr=0.01),
    "RMSprop-centered": _plain(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "RowWiseAdagrad": _plain(RowWiseAdagrad, lr=0.05, initial_accumulator_value=0.1),
    "Rprop": _plain(torch.optim.Rprop, lr=0.01),
    "SGD": _plain(torch.optim.SGD, lr=0.1),
    "SGD-dampened": _plain(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "SGD-nesterov": _plain(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
}

ROUNDED = frozenset({"ASGD", "RAdam"})
"""Optimizers that branch on a count in their state: captured as torch's own `capturable` arithmetic, which rounds
differently from the eager one. Equal to one device up to rounding, never asked to be bit-equal."""


_WHOLE: Mapping[str, tuple[int, ...]] = {}


@dataclass(frozen=True, slots=True)
class Step:
    """A training step in two halves, so that a reference may put its own averaging between them."""

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    clip: float | None = None

    def __call__(self, model: nn.Module, optimizer: OptimizerTree, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = self.gradients(model, optimizer, x, y)
        self.update(model, optimizer)
        return loss

    def gradients(self, model: nn.Module, optimizer: OptimizerTree, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for each in as_tuple(optimizer):
            each.zero_grad()
        loss = self.loss(model(x), y)
        loss.backward()
        return loss

    def update(self, model: nn.Module, optimizer: OptimizerTree, sizes: Mapping[str, tuple[int, ...]] = _WHOLE) -> None:
        """`sizes`: of the pieces from which a variable's norm is put together, in rows, or in elements with zeros behind them."""
        if self.clip is not None and sizes:
            norms = [
                _norm_of(p.grad, sizes.get(name, ())) for name, p in model.named_parameters() if p.grad is not None
            ]
            total = torch.linalg.vector_norm(torch.stack(norms))
            nn.utils.clip_grads_with_norm_(model.parameters(), self.clip, total)
        elif self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        for each in as_tuple(optimizer):
            each.step()


def _norm_of(gradient: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    if len(sizes) < 2:
        return torch.linalg.vector_norm(gradient)
    if sum(sizes) != len(gradient):
        gradient = nn.functional.pad(gradient.reshape(-1), (0, sum(sizes) - gradient.numel()))
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in gradient.split(sizes)]))


def make_step(model: str, clip: bool) -> Step:
    """The step of a model of the zoo; a clip that bites."""
    return Step(MODELS[model].loss, 0.1 if clip else None)


def make_batches(model: str, dtype: torch.dtype, examples: int, steps: int) -> list[Batch]:
    """The same batches every time."""
    generator = torch.Generator().manual_seed(7)
    batches = [MODELS[model].batch(generator, examples) for _ in range(steps)]
    return [(_floating(x, dtype), _floating(y, dtype)) for x, y in batches]


def make_model(model: str, optimizer: str, dtype: torch.dtype) -> tuple[nn.Module, OptimizerTree]:
    """A model with the same first values every time, and its optimizer; leaves torch's generator seeded."""
    torch.manual_seed(3)
    built = MODELS[model].build().to(dtype)
    torch.manual_seed(5)
    return built, OPTIMIZERS[optimizer](built)


def make_schedules(optimizer: OptimizerTree) -> list[LRScheduler]:
    """One cycle: learning rates change at every step, and momentum or the first beta where there is one."""
    return [
        OneCycleLR(o, max_lr=2 * o.defaults["lr"], total_steps=8, cycle_momentum=_has_momentum(o))
        for o in as_tuple(optimizer)
    ]


def _has_momentum(optimizer: Optimizer) -> bool:
    return "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))


def as_tuple(optimizer: OptimizerTree) -> tuple[Optimizer, ...]:
    return optimizer if isinstance(optimizer, tuple) else (optimizer,)


def _floating(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
