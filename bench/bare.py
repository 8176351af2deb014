"""The memory that everybody pays: torch imported and the model built; then with Inductor imported as well."""

from __future__ import annotations

import argparse
import importlib
import socket

import torch

from bench.proc import peak_mb
from bench.wire import Channel
from bench.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--workload", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    channel = Channel(socket.socket(fileno=given.socket))
    model = WORKLOADS[given.workload].model()
    bare = peak_mb("self")
    importlib.import_module("torch._inductor.compile_fx")
    parameters = sum(p.numel() for p in model.parameters())
    channel.send({"answer": "bare", "bare_mb": bare, "with_inductor_mb": peak_mb("self"), "parameters": parameters})
    channel.receive()


if __name__ == "__main__":
    main()
