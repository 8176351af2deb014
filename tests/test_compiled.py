"""Compiled steps: flat updates are the same bit for bit, segments keep the order of communications, results agree."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from syncwright import ops
from syncwright.capture import capture_step
from syncwright.capture.state import Binding
from syncwright.lower import communications, lower
from syncwright.optim import RowWiseAdagrad
from syncwright.passes import COMPILED, PIPELINE
from syncwright.passes.flat import flat_parts
from syncwright.planning import make_plan
from syncwright.program import Program, Role
from syncwright.regions import forward
from syncwright.runtime import compiled
from syncwright.runtime.compiled import Compiled, CompiledExecutor
from syncwright.runtime.executor import Executor
from syncwright.runtime.flat_values import apart, equal, laid_flat
from syncwright.runtime.inductor import is_available, obstacle
from syncwright.runtime.segments import Segment, cut

aten = torch.ops.aten
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "row-wise adagrad": lambda p: RowWiseAdagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.hidden = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        return self.head(F.dropout(F.relu(self.norm(self.hidden(self.table(ids)))), 0.1, self.training))


class Checkpointed(Model):
    """Computes all of its forward but the lookup again in backward, with dropout."""

    def forward(self, ids):
        return checkpoint(self.top, self.table(ids), use_reentrant=False)

    def top(self, x):
        return self.head(F.dropout(torch.tanh(self.hidden(x)), 0.5, self.training))


def step(model, optimizer, ids, targets):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(ids), targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


class Alone:
    """A port for a trainer whose peers do as it does: a sum over two is twice its own."""

    def __init__(self) -> None:
        self.started: dict[str, torch.Tensor] = {}

    def start(self, channel: str, tensor: torch.Tensor) -> None:
        self.started[channel] = tensor * 2

    def finish(self, channel: str) -> torch.Tensor:
        return self.started.pop(channel)


def lowered(kind: str, trainers: int, passes, build: type[nn.Module] = Model) -> tuple[Program, dict[str, object]]:
    torch.manual_seed(0)
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())
    batch = (torch.randint(0, 20, (6,)), torch.randint(0, 5, (6,)))
    binding = Binding(model, optimizer)
    captured = capture_step(step, binding, optimizer, batch)
    plan = make_plan("all_reduce", captured.program, trainers, 0)
    program = lower(captured.program, plan, passes=passes).trainer["step"]
    inputs = {v.name: leaf for v, leaf in zip(captured.program.of_role(Role.INPUT), batch, strict=True)}
    fixed = {**binding.hyper_values(), **captured.constants, **inputs, "batch.weight": 1.0, "trainer.first": 1}
    held = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in binding.values().items()}
    return program, {**held, **fixed}


def laid_out(program: Program, values: dict[str, object]) -> dict[str, object]:
    found = dict(values)
    for name, parts in flat_parts(program).items():
        flat = program.variables[name]
        found[name] = laid_flat(flat, parts, found) if flat.shape else equal(parts, found)
    return found


def taken_apart(program: Program, values: dict[str, object]) -> dict[str, object]:
    joined = flat_parts(program)
    return values | apart({name: values[name] for name in joined}, joined)  # type: ignore[arg-type]


def run(executor, program: Program, values: dict[str, object], steps: int) -> dict[str, object]:
    values = laid_out(program, values)
    torch.manual_seed(7)
    for _ in range(steps):
        running = executor.run(values, Alone())
        try:
            next(running)
        except StopIteration as stop:
            values.update({name: value for name, value in stop.value.items() if name in values or name == "loss"})
    return taken_apart(program, values)


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_flat_updates_are_the_same_bit_for_bit(kind, trainers):
    plain, values = lowered(kind, trainers, PIPELINE)
    flat, _ = lowered(kind, trainers, COMPILED)
    assert bool(flat_parts(flat)) == (kind != "adafactor"), (
        "updates are joined, but for those that read a parameter's norm"
    )
    expected = run(Executor(plain), plain, values, 3)
    found = run(Executor(flat), flat, values, 3)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("trainers", [1, 2])
def test_flat_parts_begin_at_multiples_of_64_bytes(trainers):
    flat, _ = lowered("adam", trainers, COMPILED)
    for parts in flat_parts(flat).values():
        assert all(p.part is None or p.part[0] * p.dtype.itemsize % 64 == 0 for p in parts)


@pytest.mark.parametrize("passes", [PIPELINE, COMPILED])
def test_segments_keep_the_order_of_sends_and_move_no_wait_forward(passes):
    program, _ = lowered("adam", 2, passes)
    items = [item for item in cut(program).items if not isinstance(item, Segment)]
    order = [n for n in items if n.target in ops.COMMUNICATION]
    assert order == communications(program)


def test_every_node_is_in_one_segment_or_runs_alone():
    program, _ = lowered("adam", 2, COMPILED)
    pieces = cut(program)
    placed = [n for item in pieces.items for n in (item.nodes if isinstance(item, Segment) else [item])]
    calls = {n for n in program.graph.nodes if n.op == "call_function"}
    assert len(placed) == len(set(placed))
    assert set(placed) | pieces.views == calls


class Deep(nn.Module):
    """Equal blocks: what is compiled for one serves them all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.head = nn.Linear(64, 5)

    def forward(self, ids):
        return self.head(self.blocks(self.table(ids)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_a_long_step_is_cut_where_backward_begins():
    """Also where the loss rides in a bucket with gradients, of which it is not made."""
    program, _ = lowered("adam", 2, COMPILED, Deep)
    ahead = forward(program)
    assert {aten.nll_loss_forward.default} == {n.target for n in ahead if "nll_loss" in str(n.target)}
    segments = [item.nodes for item in cut(program).items if isinstance(item, Segment)]
    assert aten.nll_loss_forward.default in {n.target for n in segments[0]}
    assert aten.nll_loss_backward.default in {n.target for n in segments[1]}


def test_a_segment_reads_parts_of_flat_variables_as_tensors_of_their_own(monkeypatch):
    """Made once for as long as the variable is the same tensor, and of the new one when it is another."""
    monkeypatch.setattr(compiled, "compile_graphs", lambda graphs: [module for module, _ in graphs])
    program, values = lowered("adam", 2, COMPILED, Deep)
    executor = CompiledExecutor(program)
    first = next(item for item in executor._items if isinstance(item, Compiled))
    assert not any(node.meta.get("variable", "").startswith("flat") for node in first.inputs)
    expected = run(Executor(program), program, values, 3)
    for _ in range(2):
        found = run(executor, program, values, 3)
        torch.testing.assert_close(found["head.weight"], expected["head.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not is_available(), reason=str(obstacle()))
@pytest.mark.parametrize(
    ("build", "more"), [(Model, "norm.running_var"), (Checkpointed, "norm.running_var"), (Deep, "blocks.1.up.weight")]
)
def test_compiled_agrees_with_interpreted_and_draws_the_same_masks(build, more):
    program, values = lowered("adam", 2, COMPILED, build)
    expected = run(Executor(program), program, values, 3)
    found = run(CompiledExecutor(program), program, values, 3)
    assert abs(expected["loss"] - found["loss"]) < 1e-6
    for name in ("table.weight", "head.weight", "head.weight.exp_avg", more):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_values_that_nothing_reads_any_more_are_freed_once(monkeypatch):
    """Each right behind its last reader: the run still finds all that it reads."""
    monkeypatch.setattr(compiled, "compile_graphs", lambda graphs: [module for module, _ in graphs])
    program, values = lowered("adam", 2, COMPILED)
    executor = CompiledExecutor(program)
    made = [n for item in executor._items for n in (item.outputs if isinstance(item, Compiled) else [item])]
    freed = [node for frees in executor._frees for node in frees]
    results, views = set(program.results.values()), executor._cut.views
    kept = {n for n in made if n in results or any(v in results and v.args[0] is n for v in views)}
    assert sorted(freed) == sorted(set(made) - kept)
    expected = run(Executor(program), program, values, 2)
    found = run(executor, program, values, 2)
    torch.testing.assert_close(found["head.weight"], expected["head.weight"], rtol=1e-5, atol=1e-7)
