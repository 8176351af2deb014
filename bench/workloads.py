"""The dense workloads: a model whose forward returns the loss, its optimizer, and fixed batches.

The forward returns the loss so that a contestant that compiles the model compiles the loss with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

SEED = 20_240_229
BATCHES = 8  # different batches per trainer, used in turn

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every contestant trains, from the same initial values on the same batches.

    model      a new model with the seeded initial values
    optimizer  a new optimizer over `parameters`; `fused` is torch's argument of that name
    batches    the batches of one trainer
    layers     the parts of a model that a sharding contestant wraps one by one
    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, bool], torch.optim.Optimizer]
    batches: Callable[[int], list[Batch]]
    layers: Callable[[nn.Module], list[nn.Module]]


# --- mlp -----------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """256-1024-1024-1024-10 with ReLU and a cross entropy."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [256, 1024, 1024, 1024, 10]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.cross_entropy(self.layers[-1](x), label)


def mlp_batches(rank: int) -> list[Batch]:
    """64 examples each; the label is a fixed function of the example, so that there is something to learn."""
    teacher = torch.randn(256, 10, generator=torch.Generator().manual_seed(SEED))
    source = torch.Generator().manual_seed(SEED + 1 + rank)
    examples = [torch.randn(64, 256, generator=source) for _ in range(BATCHES)]
    return [(x, (x @ teacher).argmax(dim=1)) for x in examples]


# --- gpt -----------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, HEADS, DEPTH, LENGTH = 4096, 256, 4, 4, 64


class Block(nn.Module):
    """Attention and a feed-forward part, each behind its norm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._feed_forward(self._attend(x))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        count, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(count, length, 3, HEADS, width // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.projection(mixed.transpose(1, 2).reshape(count, length, width))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """4 layers, width 256, vocabulary 4096, no tied weights: 53 parameters, 5.27 million elements."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(initialise)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def initialise(module: nn.Module) -> None:
    """GPT-2's initial values: normal(0, 0.02) weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def wide_gpt() -> GPT:
    """8 layers, width 768: 63 million elements."""
    return GPT(768, 8)


def few_tokens(rank: int) -> list[Batch]:
    """2 x 64 tokens each, the first of the GPT's."""
    return [(ids[:2], targets[:2]) for ids, targets in gpt_batches(rank)]


def gpt_batches(rank: int) -> list[Batch]:
    """8 x 64 tokens each, drawn with Zipf's frequencies as words are; the target is the next token."""
    source = torch.Generator().manual_seed(SEED + 1 + rank)
    frequency = 1.0 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    draws = [
        torch.multinomial(frequency, 8 * (LENGTH + 1), replacement=True, generator=source).view(8, LENGTH + 1)
        for _ in range(BATCHES)
    ]
    return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in draws]


# --- the table -----------------------------------------------------------------------------------------


def seeded(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        return kind()

    return build


def adam(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    # `fused=False` would also switch foreach off; None leaves torch its own default.
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True if fused else None)


def adamw(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True if fused else None)


WORKLOADS = {
    "mlp": Workload("mlp", seeded(MLP), adam, mlp_batches, lambda model: list(model.layers)),
    "gpt": Workload("gpt", seeded(GPT), adamw, gpt_batches, lambda model: list(model.blocks)),
    "wide-gpt": Workload("wide-gpt", seeded(wide_gpt), adamw, few_tokens, lambda model: list(model.blocks)),
}
