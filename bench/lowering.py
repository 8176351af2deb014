"""What it costs to capture a step and to lower it for many roles, and how both grow with the step.

    python bench/lowering.py                                        # 5,000, 10,000 and 20,000 nodes: some minutes
    python bench/lowering.py --quick                                # does it work at all?
    python bench/lowering.py --json lowering.json --plot lowering.png

The step is a stack of transformer blocks, cross entropy, a clipped global norm and AdamW. Times are CPU seconds of this
process on one thread, so that other work on the machine counts less; the median of `--repeats`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import syncwright
from bench.report import Show
from bench.table import console, new_table, show_table
from syncwright import Program
from syncwright.capture.state import Binding
from syncwright.lower import lower
from syncwright.passes import COMPILED, PIPELINE
from syncwright.planning import make_plan

VOCABULARY, WIDTH, HEADS, LENGTH = 512, 128, 4, 16
TRAINERS, SERVERS = 64, 8
NODES_PER_LAYER = 380
LOWERING_BAR = 0.25
CAPTURE_BAR = 1.5
GROWTH_BAR = 1.2
PLANS = {
    "all_reduce": ("all_reduce", PIPELINE),
    "all_reduce, compiled": ("all_reduce", COMPILED),
    "parameter_server_partitioned": ("parameter_server_partitioned", PIPELINE),
    "parallax": ("parallax", PIPELINE),
}


class Block(nn.Module):
    """Attention and a feed-forward part, each behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def trace_alone(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, ...]) -> int:
    """`make_fx` over forward, backward and optimizer, and nothing else: one trace, no functions made of it."""
    binding = Binding(model, optimizer)
    mode = FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=True), static_shapes=True)
    names, hypers = list(binding.values()), binding.hyper_values()
    flat = [mode.from_tensor(v, static_shapes=True) for v in (*binding.values().values(), *batch)]  # type: ignore[arg-type]
    for name, value in zip(names, flat, strict=False):
        if name in binding.modules:
            value.requires_grad_(binding.modules[name][0].get().requires_grad)

    def run(*values: torch.Tensor) -> torch.Tensor:
        with binding.swapped(dict(zip(names, values, strict=False)), hypers):
            return step(model, optimizer, *values[len(names) :]).detach()

    with mode:
        return len(make_fx(run)(*flat).graph.nodes)


@dataclass(frozen=True, slots=True)
class Size:
    """One step: its layers, the nodes of its program, and CPU seconds of everything that was measured."""

    layers: int
    nodes: int
    server_nodes: int
    seconds: dict[str, float]


def measure(layers: int, repeats: int) -> Size:
    torch.manual_seed(0)
    batch = (torch.randint(0, VOCABULARY, (2, LENGTH)), torch.randint(0, VOCABULARY, (2, LENGTH)))
    times: dict[str, list[float]] = {}
    program, server_nodes = None, 0
    for _ in range(repeats):
        model = Model(layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        timed(times, "make_fx alone", lambda m=model, o=optimizer: trace_alone(m, o, batch))
        program = timed(times, "capture", lambda m=model, o=optimizer: syncwright.capture(step, m, o, *batch))
        for name, (strategy, passes) in PLANS.items():
            plan = make_plan(strategy, program, TRAINERS, SERVERS)
            job = timed(times, name, lambda p=program, q=plan, s=passes: lower(p, q, passes=s))
            nodes = sum(len(each.graph.nodes) for part in job.servers for each in part.programs)
            server_nodes = max(server_nodes, nodes)
    assert isinstance(program, Program), "at least one repeat"
    return Size(layers, len(program.graph.nodes), server_nodes, {n: statistics.median(t) for n, t in times.items()})


def timed(times: dict[str, list[float]], name: str, work: Callable):
    gc.collect()
    began = time.process_time()
    result = work()
    times.setdefault(name, []).append(time.process_time() - began)
    print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr)
    return result


def growth(sizes: list[Size], name: str) -> float:
    """The exponent e in seconds ~ nodes ** e, from the smallest step to the largest: 1 is linear."""
    first, last = sizes[0], sizes[-1]
    return math.log(last.seconds[name] / first.seconds[name]) / math.log(last.nodes / first.nodes)


def shows(sizes: list[Size]) -> list[Show]:
    last = sizes[-1]
    found = [(f"lowering / capture, {n}", last.seconds[n] / last.seconds["capture"], LOWERING_BAR) for n in PLANS]
    found.append(("capture / make_fx alone", last.seconds["capture"] / last.seconds["make_fx alone"], CAPTURE_BAR))
    if len(sizes) > 1:
        found += [(f"growth, {name}", growth(sizes, name), GROWTH_BAR) for name in ("capture", *PLANS)]
    return [Show(name, value, bar, value <= bar) for name, value, bar in found]


def save_plot(sizes: list[Size], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.5))
    for name in sizes[0].seconds:
        axes.loglog([s.nodes for s in sizes], [s.seconds[name] for s in sizes], "o-", label=name)
    axes.set_xlabel("nodes of the captured step")
    axes.set_ylabel("CPU seconds (lower is better)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[5_000, 10_000, 20_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one small step")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure(1, 1)  # everything that torch imports late
    wanted = [1_000] if given.quick else given.nodes
    sizes = [measure(max(1, round(nodes / NODES_PER_LAYER)), given.repeats) for nodes in wanted]
    printer = console()
    table = new_table(
        f"CPU seconds, one thread; lowering for {TRAINERS} trainers and {SERVERS} servers",
        ("nodes", "of servers, partitioned", *sizes[0].seconds),
    )
    for size in sizes:
        seconds = [f"{value:.2f}" for value in size.seconds.values()]
        table.add_row(f"{size.nodes:,}", f"{size.server_nodes:,}", *seconds)
    printer.print(table)
    found = shows(sizes)
    printer.print(show_table(found))
    if given.json:
        document = {
            "torch": torch.__version__,
            "sizes": [asdict(s) for s in sizes],
            "shows": [asdict(s) for s in found],
        }
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if given.plot:
        save_plot(sizes, given.plot)


if __name__ == "__main__":
    main()
