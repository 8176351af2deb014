"""A job of four trainers on two hosts: variables reduced over a host, by host, and in parts within one.

arguments: a folder, where each trainer writes its plan's groups, what its steps returned, and the values that it ended with
"""

import sys
from pathlib import Path

import torch
from torch import nn

import syncwright
from syncwright import AllReduce, Rules, Shard
from syncwright.runtime.deadlines import Deadlines

STEPS = 4
SIZES = (3, 2, 4, 1)
RULES = Rules.of(
    Shard(3, bucket_mb=0.0001, within="node"),
    {"second.*": AllReduce(hierarchical=True), "own.*": AllReduce(over="node"), "two": AllReduce(over=[1, 2])},
)


class Net(nn.Module):
    """`own` and `two` add to the loss what no gradient of the others depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.own = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(5, 1)
        self.two = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.second(torch.tanh(self.first(x))), self.own(x).squeeze(1) + x @ self.two


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    found, beside = model(x)
    loss = (found - y).square().mean() + beside.sin().mean()
    loss.backward()
    optimizer.step()
    return loss


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Net().double()
    return model, torch.optim.Adam(model.parameters(), 0.05)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    count = sum(SIZES)
    return torch.randn(count, 5, generator=generator).double(), torch.randn(count, 3, generator=generator).double()


def parts(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = batch(number)
    return list(zip(x.split(SIZES), y.split(SIZES), strict=True))


if __name__ == "__main__":
    model, optimizer = make()
    given = {"plan": RULES, "compile": "compile" in sys.argv[2:], "check_replicas": True}
    with syncwright.distribute(step, model, optimizer, deadlines=Deadlines(wait=60), **given) as trainer:
        losses = [float(trainer.step(*parts(number)[trainer.rank])) for number in range(STEPS)]  # type: ignore[arg-type]
    report = {"groups": trainer.plan.groups.hosts, "losses": losses, "model": dict(model.state_dict())}
    torch.save(report, Path(sys.argv[1]) / f"{trainer.rank}.pt")
