"""Which digit is this? A small convolutional network with batch norm, on 1,797 real images of 8 by 8 pixels.

    python examples/digits.py --one-device      plain PyTorch, Syncwright is not even imported
    python examples/digits.py                   one trainer under Syncwright

Syncwright needs these lines, all in `main` and `train`; everything else is what one device needs too:

    trainer = syncwright.distribute(step, model, optimizer, plan=...)     (and the import)
    for batch in trainer.shard(loader):              instead of   for batch in loader:
    loss, scores = trainer.step(*batch)              instead of   ... = step(model, optimizer, *batch)

and `trainer.evaluate(fn, loader)` where one would call `fn(model, *batch)` in a loop.

Every fifth image is held out. The same people wrote both parts, so this is easier than unknown handwriting.

Batch norm takes its statistics from the examples that a trainer sees. On several trainers that is a part of
the batch each, so the numbers differ a little from one device's, and the running statistics are averaged.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset


@dataclass(frozen=True, slots=True)
class Data:
    """Images (n, 1, 8, 8) float32 in 0 to 1 with digits (n,) int64."""

    train: TensorDataset
    test: TensorDataset


def load() -> Data:
    """Every fifth image is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16.0).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(labels)) % 5 == 0
    return Data(TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out]))


class Model(nn.Module):
    """Two convolutions with batch norm, then a linear classifier of ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv_2, self.norm_2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm_1(self.conv_1(images)))
        x = F.max_pool2d(F.relu(self.norm_2(self.conv_2(x))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole training step, for one device: the loss, and how much of the batch was right."""
    optimizer.zero_grad()
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    optimizer.step()
    return loss, {"accuracy": (logits.argmax(dim=1) == labels).float().mean()}


def classify(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The likeliest digit of each image, (batch,)."""
    return model(images).argmax(dim=1)


def train(
    trainer: Any,
    data: Data,
    epochs: int = 15,
    batch: int = 64,
    seed: int = 0,
    limit_steps: int | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """Train, and return the loss of every step. `on_step(done, total, loss)` is called after each."""
    order = RandomSampler(data.train, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(data.train, batch_size=batch, sampler=order)
    total = min(epochs * len(loader), limit_steps or sys.maxsize)
    losses: list[Tensor] = []
    for _ in range(epochs):
        if len(losses) == total:
            break
        for images, labels in trainer.shard(loader):
            loss, _ = trainer.step(images, labels)
            losses.append(loss.detach())
            if on_step is not None:
                on_step(len(losses), total, loss)
            if len(losses) == total:
                break
    return torch.stack(losses).tolist()


def accuracy(trainer: Any, model: nn.Module, test: TensorDataset) -> float:
    """The part of the images in `test` that are classified right, by running statistics."""
    model.eval()
    found = trainer.evaluate(classify, DataLoader(test, batch_size=256))
    model.train()
    return (found == test.tensors[1]).float().mean().item()


class OneDevice:
    """The trainer of `--one-device`: plain PyTorch under the names that a Syncwright trainer has."""

    rank = 0

    def __init__(self, step: Callable[..., Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.function, self.model, self.optimizer = step, model, optimizer

    def __enter__(self) -> OneDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def shard(self, loader: Iterable[Any]) -> Iterator[Any]:
        return iter(loader)

    def step(self, *batch: Tensor) -> Any:
        return self.function(self.model, self.optimizer, *batch)

    def evaluate(self, function: Callable[..., Tensor], loader: Iterable[Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(self.model, *batch) for batch in loader])


def show(bar: Progress) -> Callable[[int, int, Tensor], None]:
    """Progress as a bar on a terminal, else as a line every 100 steps."""
    task = bar.add_task("training", total=None)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        bar.update(task, completed=done, total=total)
        if bar.disable and (done % 100 == 0 or done == total):
            print(f"step {done} of {total}: loss {loss.item():.4f}", flush=True)

    return on_step


def main() -> None:
    options = argparse.ArgumentParser(description="Handwritten digits: a small network with batch norm.")
    options.add_argument("--one-device", action="store_true", help="plain PyTorch, without Syncwright")
    options.add_argument("--plan", default="all_reduce", help="a name or a YAML file")
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--batch", type=int, default=64, help="images in a batch, over all trainers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit-steps", type=int, help="stop after this many steps")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = options.parse_args()

    torch.manual_seed(args.seed)
    data = load()
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    if args.one_device:
        trainer = OneDevice(step, model, optimizer)
    else:
        import syncwright

        trainer = syncwright.distribute(step, model, optimizer, plan=args.plan)

    start = time.perf_counter()
    with trainer, Progress(disable=trainer.rank != 0 or not sys.stdout.isatty()) as bar:
        on_step = show(bar) if trainer.rank == 0 else None
        losses = train(trainer, data, args.epochs, args.batch, args.seed, args.limit_steps, on_step)
        seconds = time.perf_counter() - start
        right = accuracy(trainer, model, data.test)

    if trainer.rank != 0:
        return
    print(f"{len(losses)} steps in {seconds:.1f} s; right on {right:.2%} of {len(data.test)} held-out images")
    if args.json:
        report = {"example": "digits", "accuracy": right, "steps": len(losses), "seconds": seconds}
        args.json.write_text(json.dumps(report | {"losses": losses}, indent=1))


if __name__ == "__main__":
    main()
