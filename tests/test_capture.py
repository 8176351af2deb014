"""A captured step, interpreted, is the eager step to the bit; and leaves the user's objects alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.utils.checkpoint import checkpoint

from syncwright.capture import Captured, capture_step
from syncwright.capture.state import Binding
from syncwright.dead import is_random
from syncwright.errors import CaptureError
from syncwright.program import Role
from syncwright.runtime.loopback import loopback
from syncwright.update import find_updates
from tests import zoo

STEPS = 8
"""Enough for RAdam to rectify and for ASGD to average."""

Step = Callable[..., torch.Tensor]


def zero_grad_step(model: nn.Module, optimizer: zoo.OptimizerTree, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for each in zoo.as_tuple(optimizer):
        each.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    for each in zoo.as_tuple(optimizer):
        each.step()
    return loss


def compare(
    step: Step,
    make: Callable[[], tuple[nn.Module, zoo.OptimizerTree]],
    batches: list[tuple],
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    tolerance: float = 0.0,
) -> Captured:
    """Runs a step eagerly and captured, from the same values and random state; equal to the bit, or to `tolerance`."""
    eager, captured_losses = [], []
    torch.manual_seed(11)
    model, optimizer = make()
    advance = _advance(optimizer, schedule)
    torch.manual_seed(12)
    for batch in batches:
        eager.append(step(model, optimizer, *batch).detach())
        advance()
    torch.manual_seed(11)
    ours, our_optimizer = make()
    advance = _advance(our_optimizer, schedule)
    binding = Binding(ours, our_optimizer)
    captured = capture_step(step, binding, our_optimizer, batches[0])
    torch.manual_seed(12)
    for batch in batches:
        captured_losses.append(run(captured, binding, batch))
        advance()
    _assert_same("losses", torch.stack(captured_losses), torch.stack(eager), tolerance)
    expected = Binding(model, optimizer).values()
    for name, value in binding.values().items():
        _assert_same(name, torch.as_tensor(value), torch.as_tensor(expected[name]), tolerance)
    return captured


def run(captured: Captured, binding: Binding, batch: tuple) -> torch.Tensor:
    """One captured step on the user's own values; returns the loss."""
    hypers = binding.hyper_values()
    broken = [guard.expression for guard in captured.program.guards if not guard.holds(hypers)]
    assert not broken, f"guards are broken: {broken}"
    given = {**binding.values(), **hypers, **captured.constants}
    given |= dict(zip([v.name for v in captured.program.of_role(Role.INPUT)], batch, strict=True))
    with torch.no_grad():
        results = captured.program.run(given)
    binding.write({name: value for name, value in results.items() if name in binding.variables})
    return results["loss"]


def _advance(optimizer: zoo.OptimizerTree, schedule: Callable | None) -> Callable[[], object]:
    schedules = [schedule(each) for each in zoo.as_tuple(optimizer)] if schedule else []
    return lambda: [each.step() for each in schedules]


def _assert_same(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    if tolerance:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")
    else:
        assert torch.equal(found, expected), f"{name} differs by {(found.double() - expected.double()).abs().max():.1e}"


def regression(n: int = STEPS, dtype: torch.dtype = torch.float32) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, generator=generator).to(dtype), torch.randn(4, 3, generator=generator).to(dtype))
        for _ in range(n)
    ]


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).to(dtype)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", zoo.OPTIMIZERS)
def test_every_optimizer(optimizer: str, dtype: torch.dtype) -> None:
    def make():
        model = mlp(dtype)
        return model, zoo.OPTIMIZERS[optimizer](model)

    rounding = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] if optimizer in zoo.ROUNDED else 0.0
    compare(zero_grad_step, make, regression(dtype=dtype), tolerance=rounding)


@pytest.mark.parametrize("model", zoo.MODELS)
def test_every_model(model: str) -> None:
    batches = zoo.make_batches(model, torch.float32, 4, 3)
    compare(zoo.make_step(model, True), lambda: zoo.make_model(model, "AdamW", torch.float32), batches)


def test_groups() -> None:
    """Every group has hyper-parameters of its own."""

    def make():
        model = mlp()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "momentum": 0.5}]
        return model, torch.optim.SGD(groups, lr=0.01, momentum=0.9)

    captured = compare(zero_grad_step, make, regression())
    hypers = {v.name for v in captured.program.of_role(Role.HYPER)}
    assert {"optimizer.0.lr", "optimizer.1.lr", "optimizer.0.momentum", "optimizer.1.momentum"} <= hypers


def test_frozen_parameters() -> None:
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return model, adamw(model)

    captured = compare(zero_grad_step, make, regression())
    assert {v.name for v in captured.program.of_role(Role.PARAM)} & set(captured.program.writes) == {
        "3.weight",
        "3.bias",
    }


def test_tied_weights_are_one_variable() -> None:
    captured = compare(
        zoo.make_step("tied", False),
        lambda: zoo.make_model("tied", "Adam", torch.float32),
        zoo.make_batches("tied", torch.float32, 4, 3),
    )
    assert captured.program.variables["table.weight"].aliases == ("output.weight",)
    assert "output.weight" not in captured.program.variables


def test_autocast() -> None:
    def step(model, optimizer, x, y):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    captured = compare(step, lambda: (m := mlp(), adamw(m)), regression())
    assert any(
        isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].dtype is torch.bfloat16
        for n in captured.program.graph.nodes
    )
    marks = find_updates(captured.program).marks
    assert {m.meta["val"].dtype for m in marks.values()} == {torch.float32}


def test_dropout() -> None:
    compare(zero_grad_step, lambda: (m := mlp(dropout=0.5), adamw(m)), regression())


class Checkpointed(nn.Module):
    """A block whose forward is computed again in backward."""

    def __init__(self, dropout: float, use_reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 6), mlp(dropout=dropout), nn.Dropout(dropout)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant))


def test_checkpoint() -> None:
    compare(zero_grad_step, lambda: (m := Checkpointed(0.0), adamw(m)), regression())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_with_dropout_draws_every_mask_once(use_reentrant: bool) -> None:
    """Recomputed with the same mask, to the bit; the mask is one node of the graph."""

    def make():
        model = Checkpointed(0.5, use_reentrant)
        return model, adamw(model)

    captured = compare(zero_grad_step, make, regression())
    masks = [n for n in captured.program.graph.nodes if is_random(n)]
    assert len(masks) == 2


def test_one_cycle_changes_momentum() -> None:
    def cycle(optimizer):
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS + 2)

    for kind in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), torch.optim.AdamW):
        compare(zero_grad_step, lambda kind=kind: (m := mlp(), kind(m.parameters())), regression(), cycle)


@pytest.mark.parametrize("optimizer", zoo.OPTIMIZERS)
def test_hypers_are_never_frozen(optimizer: str) -> None:
    """Learning rates differ at every step from those at capture."""

    def make():
        model = mlp()
        return model, zoo.OPTIMIZERS[optimizer](model)

    def schedule(each):
        return LambdaLR(each, lambda step: 1 / (1 + step))

    compare(zero_grad_step, make, regression(5), schedule, 1e-5 if optimizer in zoo.ROUNDED else 0.0)


def test_guards_tell_a_branch_on_a_hyper() -> None:
    """SGD leaves momentum out where it is 0: a graph made with momentum does not stand for that."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    captured = capture_step(zero_grad_step, Binding(model, optimizer), optimizer, regression(1)[0])
    hypers = Binding(model, optimizer).hyper_values()
    assert all(guard.holds(hypers) for guard in captured.program.guards)
    assert not all(guard.holds(hypers | {"optimizer.0.momentum": 0.0}) for guard in captured.program.guards)


@pytest.mark.parametrize("optimizer", zoo.OPTIMIZERS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_objects_are_untouched(optimizer: str, scheduled: bool) -> None:
    model = mlp(dropout=0.5)
    model[1].eval()
    built = zoo.OPTIMIZERS[optimizer](model)
    schedules = zoo.make_schedules(built) if scheduled else []
    with untouched(model, built):
        capture_step(zero_grad_step, Binding(model, built), built, regression(1)[0])
    assert all(hasattr(each.optimizer.step, "_wrapped_by_lr_sched") for each in schedules)


def _print(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    print(loss)
    optimizer.step()
    return loss


def _branch(model, optimizer, x, y):
    optimizer.zero_grad()
    model.eval()
    torch.rand(3)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    if loss > 0:
        return loss
    return 2 * loss


def _raise(model, optimizer, x, y):
    optimizer.zero_grad()
    F.mse_loss(model(x), y).backward()
    optimizer.param_groups[0]["lr"] = 3.0
    optimizer.step()
    raise RuntimeError("the user's own mistake")


@pytest.mark.parametrize("step", [_print, _branch, _raise])
def test_objects_are_untouched_by_a_failure(step: Step) -> None:
    model = mlp(dropout=0.5)
    optimizer = adamw(model)
    zero_grad_step(model, optimizer, *regression(1)[0])
    with untouched(model, optimizer), pytest.raises(CaptureError):
        capture_step(step, Binding(model, optimizer), optimizer, regression(1)[0])


def test_a_step_that_changes_modes_is_left_as_it_was() -> None:
    """A step may call model.eval() for a part of itself."""

    def step(model, optimizer, x, y):
        loss = zero_grad_step(model, optimizer, x, y)
        model.eval()
        return loss

    model = mlp()
    optimizer = adamw(model)
    with untouched(model, optimizer):
        capture_step(step, Binding(model, optimizer), optimizer, regression(1)[0])


@contextmanager
def untouched(model: nn.Module, optimizer: zoo.OptimizerTree) -> Iterator[None]:
    """What the user's objects hold is afterwards what it was before: the same tensors with the same values."""
    before, values = _everything(model, optimizer)
    values = deepcopy(values)
    random = torch.get_rng_state()
    yield
    after, values_after = _everything(model, optimizer)
    assert before.keys() == after.keys()
    changed = [key for key in before if before[key] is not after[key] and before[key] != after[key]]
    assert not changed, f"changed: {changed}"
    different = [key for key in values if not torch.equal(values[key], values_after[key])]
    assert not different, f"other values: {different}"
    assert torch.equal(random, torch.get_rng_state())


def _everything(model: nn.Module, optimizer: zoo.OptimizerTree) -> tuple[dict, dict[str, torch.Tensor]]:
    held: dict[object, object] = {f"{name}.training": m.training for name, m in model.named_modules()}
    values = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held[name], held[f"{name}.grad"], values[name] = id(tensor), tensor.grad, tensor
        held[f"{name}.hooks"] = len(tensor._post_accumulate_grad_hooks or {})
        if tensor.grad is not None:
            values[f"{name}.grad"] = tensor.grad
    for index, each in enumerate(zoo.as_tuple(optimizer)):
        held[index, "keys"] = tuple(sorted(each.__dict__.keys() - {"_opt_called"}))
        held[index, "state"], held[index, "groups"] = id(each.state), id(each.param_groups)
        for number, group in enumerate(each.param_groups):
            held |= {(index, number, k): v for k, v in group.items() if k != "params"}
            held[index, number, "params"] = tuple(map(id, group["params"]))
        for number, state in enumerate(each.state.values()):
            held |= {(index, number, "state", k): id(v) for k, v in state.items()}
            values |= {f"{index}.{number}.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return held, values


def test_the_mode_that_a_step_ends_in_is_the_one_that_the_next_begins_in() -> None:
    """Dropout in the first step only, as in plain PyTorch."""

    def step(model, optimizer, x, y):
        loss = zero_grad_step(model, optimizer, x, y)
        model.eval()
        return loss

    losses = []
    for captures in (False, True):
        torch.manual_seed(11)
        model = mlp(dropout=0.5)
        optimizer = adamw(model)
        job = loopback(step, model, optimizer)
        for batch in regression(3):
            losses.append(job.step([batch]) if captures else step(model, optimizer, *batch).detach())
        assert not model.training
    assert losses[:3] == losses[3:]
