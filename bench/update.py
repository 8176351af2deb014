"""The optimizer's update alone, on the GPT's parameters: torch's own, and ours once there is one.

To plug ours in, let `ours` return a callable that runs one update in place over the model's parameters, whose
gradients are in `.grad`, with the optimizer's hyper-parameters.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable

import torch
from torch import nn

from bench.contestants import NotAvailable
from bench.wire import Channel
from bench.workloads import WORKLOADS

Update = Callable[[], object]


def torch_fused(model: nn.Module) -> Update:
    return WORKLOADS["gpt"].optimizer(model, True).step


def torch_default(model: nn.Module) -> Update:
    return WORKLOADS["gpt"].optimizer(model, False).step


def torch_foreach(model: nn.Module) -> Update:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, foreach=True).step


def ours(model: nn.Module) -> Update:
    raise NotAvailable("no public way yet to compile the captured update alone")


UPDATES: dict[str, Callable[[nn.Module], Update]] = {
    "torch fused AdamW": torch_fused,
    "torch AdamW": torch_default,
    "torch foreach AdamW": torch_foreach,
    "syncwright": ours,
}


def prepare(build: Callable[[nn.Module], Update]) -> Update:
    model = WORKLOADS["gpt"].model()
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source) * 1e-3
    return build(model)


def seconds_of(update: Update, count: int) -> float:
    """Seconds per update, the mean of `count` after an untimed one."""
    update()
    began = time.perf_counter()
    for _ in range(count):
        update()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    channel = Channel(socket.socket(fileno=given.socket))
    updates, missing = {}, {}
    for name, build in UPDATES.items():
        try:
            updates[name] = prepare(build)
        except NotAvailable as error:
            missing[name] = str(error)
    channel.send({"answer": "prepared", "missing": missing})
    while (request := channel.receive()) not in (None, {"ask": "close"}):
        seconds = {name: seconds_of(update, request["count"]) for name, update in updates.items()}
        channel.send({"answer": request["ask"], "seconds": seconds})


if __name__ == "__main__":
    main()
