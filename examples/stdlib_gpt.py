"""A small GPT that learns to write Python, from the source of Python's own standard library.

    python examples/stdlib_gpt.py --one-device      plain PyTorch, Syncwright is not even imported
    python examples/stdlib_gpt.py                   one trainer under Syncwright

Syncwright needs these lines, all in `main` and `train`; everything else is what one device needs too:

    trainer = syncwright.distribute(step, model, optimizer, plan=...)     (and the import)
    for batch in trainer.shard(loader):              instead of   for batch in loader:
    loss = trainer.step(*batch)                      instead of   loss = step(model, optimizer, *batch)

and `trainer.evaluate(fn, loader)` where one would call `fn(model, *batch)` in a loop.

The step clips its gradients to a global norm of 1; the learning rate is scheduled outside the step, as usual.
The text depends on the version of Python: compare losses between runs of one version only.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

VOCABULARY = 4096
CONTEXT = 64


# ---------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, slots=True)
class Data:
    """Windows (n, CONTEXT + 1) of int64 tokens, and the mean number of bytes that a held-out token spells."""

    train: Tensor
    test: Tensor
    bytes_per_token: float


class Tokenizer:
    """The 256 bytes, and the words that save most tokens; a word not among them is spelled in bytes.

    Lossless: `decode(encode(text)) == text`.
    """

    WORD = re.compile(r" ?[A-Za-z_]+| ?\d+|\n *| +|[^\sA-Za-z_\d]+|\s")

    def __init__(self, text: str, size: int = VOCABULARY) -> None:
        counts = Counter(self.WORD.findall(text))
        saved = {word: count * (len(word.encode()) - 1) for word, count in counts.items()}
        best = sorted((word for word in saved if saved[word]), key=lambda word: (-saved[word], word))
        self.spelled = [bytes([value]) for value in range(256)] + [w.encode() for w in best[: size - 256]]
        self.token = {word: token for token, word in enumerate(best[: size - 256], start=256)}

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = []
        for word in self.WORD.findall(text):
            known = self.token.get(word)
            if known is None:
                tokens.extend(word.encode())
            else:
                tokens.append(known)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(self.spelled[token] for token in tokens).decode()


def load(test_windows: int = 512) -> Data:
    """The top-level modules of the standard library by name; every tenth file is held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    training = "".join(text for index, text in enumerate(texts) if index % 10)
    held_out = "".join(texts[::10])
    tokenizer = Tokenizer(training)
    test = windows(tokenizer.encode(held_out))
    chosen = test[:: max(1, len(test) // test_windows)][:test_windows]  # spread over all held-out files
    spelled = sum(len(tokenizer.spelled[token]) for token in chosen[:, 1:].flatten().tolist())
    return Data(windows(tokenizer.encode(training)), chosen, spelled / chosen[:, 1:].numel())


def windows(tokens: list[int]) -> Tensor:
    """Cut a text into windows of `CONTEXT + 1` tokens; the last token of one is the first of the next."""
    return torch.tensor(tokens).unfold(0, CONTEXT + 1, CONTEXT).contiguous()


# --------------------------------------------------------------------------------- the model and its step


class Block(nn.Module):
    """Attention to earlier tokens, then a small network on each token, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    """The whole training step, for one device; `tokens` is (batch, CONTEXT + 1)."""
    optimizer.zero_grad()
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def loss_per_window(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean loss of each window, (batch,), in nats per token."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(dim=1)


def warm_cosine(step: int, total: int, warm: int = 20) -> float:
    """The learning rate of a step as a part of the highest: up in a line, down along a cosine."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


# ------------------------------------------------------------------------------------- training and judging


def batches(dataset: TensorDataset, batch: int, seed: int | None = None) -> DataLoader:
    """Global batches, a last short one included: shuffled anew each epoch from `seed`, or in order."""
    if seed is None:
        sampler = SequentialSampler(dataset)
    else:
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    return DataLoader(dataset, sampler=BatchSampler(sampler, batch, drop_last=False), batch_size=None)


def train(
    trainer: Any,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: DataLoader,
    epochs: int,
    total: int,
    on_step: Callable[[int, int, Tensor], None] | None = None,
) -> list[float]:
    """Train for `total` steps in at most `epochs`, and return the loss of every step."""
    losses: list[Tensor] = []
    for _ in range(epochs):
        if len(losses) == total:
            break
        for (tokens,) in trainer.shard(loader):
            loss = trainer.step(tokens)
            schedule.step()
            losses.append(loss.detach())
            if on_step is not None:
                on_step(len(losses), total, loss)
            if len(losses) == total:
                break
    return torch.stack(losses).tolist()


class OneDevice:
    """The trainer of `--one-device`: plain PyTorch under the names that a Syncwright trainer has."""

    rank = 0

    def __init__(self, step: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.function, self.model, self.optimizer = step, model, optimizer

    def __enter__(self) -> OneDevice:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def shard(self, loader: Iterable[Any]) -> Iterator[Any]:
        return iter(loader)

    def step(self, *batch: Tensor) -> Tensor:
        return self.function(self.model, self.optimizer, *batch)

    def evaluate(self, function: Callable[..., Tensor], loader: Iterable[Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([function(self.model, *batch) for batch in loader])


def show(bar: Progress) -> Callable[[int, int, Tensor], None]:
    """Progress as a bar on a terminal, else as a line every 20 steps."""
    task = bar.add_task("training", total=None)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        bar.update(task, completed=done, total=total)
        if bar.disable and (done % 20 == 0 or done == total):
            print(f"step {done} of {total}: loss {loss.item():.4f}", flush=True)

    return on_step


def main() -> None:
    options = argparse.ArgumentParser(description="A small GPT on the source of Python's standard library.")
    options.add_argument("--one-device", action="store_true", help="plain PyTorch, without Syncwright")
    options.add_argument("--plan", default="all_reduce", help="a name or a YAML file")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--batch", type=int, default=16, help="windows in a batch, over all trainers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit-steps", type=int, default=200, help="stop after this many steps")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = options.parse_args()

    torch.manual_seed(args.seed)
    data = load()
    loader = batches(TensorDataset(data.train), args.batch, args.seed)
    total = min(args.epochs * len(loader), args.limit_steps)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, total))
    if args.one_device:
        trainer = OneDevice(step, model, optimizer)
    else:
        import syncwright

        trainer = syncwright.distribute(step, model, optimizer, plan=args.plan)

    start = time.perf_counter()
    with trainer, Progress(disable=trainer.rank != 0 or not sys.stdout.isatty()) as bar:
        on_step = show(bar) if trainer.rank == 0 else None
        losses = train(trainer, schedule, loader, args.epochs, total, on_step)
        seconds = time.perf_counter() - start
        held_out = trainer.evaluate(loss_per_window, batches(TensorDataset(data.test), 64)).mean().item()

    if trainer.rank != 0:
        return
    bits = held_out / math.log(2) / data.bytes_per_token
    print(f"{len(losses)} steps in {seconds:.1f} s")
    print(f"loss on held-out files: {held_out:.4f} nats per token, {bits:.3f} bits per byte")
    if args.json:
        report = {"example": "stdlib_gpt", "held_out_loss": held_out, "bits_per_byte": bits}
        report |= {"steps": len(losses), "seconds": seconds, "losses": losses}
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
