"""Where servers keep variables: in host memory, or on an accelerator of their host."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from syncwright.errors import JobError
from syncwright.job import Job, ServerPart
from syncwright.program import Program

HOST = torch.device("cpu")


def devices_of(job: Job, part: ServerPart) -> dict[str, torch.device]:
    """Of each variable that a server keeps elsewhere than in host memory, the device.

    Numbers (step counts) stay in host memory. Raises `JobError` where this host does not have the device.
    """
    syncs = job.syncs
    chosen = {variable.name: syncs[variable.name].device for variable in part.holds if variable.shape}
    found = {name: _there(device, name, part.rank) for name, device in chosen.items() if device is not None}
    return {name: device for name, device in found.items() if device != HOST}


def _there(device: str, variable: str, rank: int) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise JobError(
            f"server {rank}: '{variable}' is to be kept on the device '{device}', but its host has {', '.join(_available())}. "
            f"Expected one of these ({error}). Say another `device`, or place the variable on a server that has it."
        ) from error


def _available() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())] if accelerator else []
    return ["cpu", *found]


def device_for(program: Program, devices: Mapping[str, torch.device]) -> torch.device:
    """Where a server's program runs: where the first variable with axes is that it reads or writes."""
    return next((devices[name] for name in [*program.reads, *program.writes] if name in devices), HOST)


def moved(program: Program, device: torch.device) -> Program:
    """A program whose tensors of sizes of their own are made on `device`.

    before  %z = full([4, 2], 0.5, device=cpu), %n = add(w, %z)
    after   %z = full([4, 2], 0.5, device=cuda:0), %n = add(w, %z)
    """
    if device == HOST:
        return program
    program = program.edit()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(argument.name == "device" for argument in schema.arguments):
            continue
        val, given = node.meta["val"], any(isinstance(n.meta["val"], torch.Tensor) for n in node.all_input_nodes)
        if val.dim() and ("device" in node.kwargs or not given):
            node.update_kwarg("device", device)
    return program


def taken_to(device: torch.device, value: object) -> object:
    """A value where a program runs; numbers stay where they are."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() and value.device != device else value
