"""The optimizer's update alone, on the GPT's parameters: torch's own, and the one that our compiled step runs."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.fx import Node

from bench.contestants import NotAvailable
from bench.contestants.ours import step
from bench.wire import Channel
from bench.workloads import WORKLOADS
from syncwright.capture import capture_step
from syncwright.capture.state import Binding
from syncwright.lower import lower
from syncwright.passes import COMPILED
from syncwright.passes.flat import flat_parts
from syncwright.planning import make_plan
from syncwright.program import Program, Role, Variable
from syncwright.runtime.compiled import CompiledExecutor

Update = Callable[[], object]


def torch_fused(model: nn.Module) -> Update:
    return WORKLOADS["gpt"].optimizer(model, True).step


def torch_default(model: nn.Module) -> Update:
    return WORKLOADS["gpt"].optimizer(model, False).step


def torch_foreach(model: nn.Module) -> Update:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, foreach=True).step


def ours(model: nn.Module) -> Update:
    """The update that a compiled step runs, cut out of it: flat, in place, host arithmetic outside the kernel.

    Gradients are where the step leaves them: in the bucket, which is the flat buffer.
    """
    workload = WORKLOADS["gpt"]
    optimizer = workload.optimizer(model, False)
    binding = Binding(model, optimizer)
    captured = capture_step(step, binding, optimizer, tuple(workload.batches(0)[0]))
    plan = make_plan("independent", captured.program, trainers=2, servers=0)
    whole = lower(captured.program, plan, passes=COMPILED).trainer["step"]
    program, bucket = _update_of(whole)
    values = _laid_out(program, whole, binding)
    values[bucket.name] = torch.randn(bucket.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    executor = CompiledExecutor(program)

    def update() -> None:
        results = _finished(executor, {**values, **binding.hyper_values()})
        values.update({name: value for name, value in results.items() if name in values})

    return update


def _update_of(program: Program) -> tuple[Program, Variable]:
    """What writes parameters and state, reading the bucket of gradients as a variable."""
    parts = flat_parts(program)
    bucket = next(
        n for n in program.graph.nodes if n.target is torch.ops.aten.cat.default and _is_flat(n, parts, program)
    )
    val = bucket.meta["val"]
    variable = Variable("bucket", Role.GRAD, tuple(val.shape), val.dtype)
    kept = (Role.PARAM, Role.STATE)
    results = {name: node for name, node in program.results.items() if program.variables[name].role in kept}
    return program.slice(results, {bucket: variable}), variable


def _is_flat(node: Node, parts: dict, program: Program) -> bool:
    return any(program.variables[name].numel == node.meta["val"].numel() for name in parts)


def _laid_out(program: Program, whole: Program, binding: Binding) -> dict[str, object]:
    held = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in binding.values().items()}
    for name, members in flat_parts(whole).items():
        if whole.variables[name].shape:
            held[name] = torch.zeros(whole.variables[name].shape)
            for member in members:
                held[name][slice(*member.part)] = held[member.name].reshape(-1)
    return {name: held[name] for name in program.reads if name in held}


def _finished(executor: CompiledExecutor, values: dict[str, object]) -> dict[str, object]:
    """Runs a program without communications."""
    run = executor.run(values, None)
    try:
        next(run)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("an update on its own waits for nobody")


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
