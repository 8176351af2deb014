"""What a job is compared with: the user's step in plain PyTorch, on the parts of a batch or on the whole of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch

from syncwright.capture.state import Binding
from syncwright.deferred.tensor import real
from syncwright.plan import Collective, ParameterServer, Plan
from syncwright.runtime.intercept import FirstStep
from syncwright.runtime.replica import count_examples, random_stream
from syncwright.runtime.sharding import part_of

Values = dict[str, torch.Tensor]
_MOST_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Gradients:
    """The complete gradients of one step: put together as the plan says, and each part's own."""

    reduced: Values
    parts: tuple[Values, ...]


class Kept:
    """What the user's objects hold at one moment, to be put back, to the bit. Never changes."""

    def __init__(self, binding: Binding):
        slots = [slot for slots in binding.modules.values() for slot in slots]
        self._tensors = [(slot, slot.get(), slot.get().detach().clone()) for slot in slots]
        self._grads = [(tensor, copy.deepcopy(tensor.grad)) for _, tensor, _ in self._tensors]
        self._optimizers = [(o, _copied_state(o), _copied_groups(o)) for o in binding.optimizers.values()]
        self._scalers = [(slot, slot.get().clone()) for slot in binding.scaled.values()]
        self._random = torch.get_rng_state()

    @torch.no_grad()
    def put_back(self) -> None:
        """The user's own tensors, gradients, optimizer state, settings, loss scales and random stream are as they were."""
        for slot, tensor, value in self._tensors:
            slot.set(tensor)
            tensor.copy_(value)
        for tensor, grad in self._grads:
            tensor.grad = copy.deepcopy(grad)
        for optimizer, state, groups in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update({parameter: _copied(held) for parameter, held in state.items()})
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(_copied(settings))
        for slot, number in self._scalers:
            slot.write(number)
        torch.set_rng_state(self._random)


def values_of(binding: Binding) -> Values:
    """Every parameter, buffer and optimizer state that the user's objects hold now, copied."""
    return {name: real(torch.as_tensor(value)) for name, value in binding.values().items()}


def concatenated(first: FirstStep, binding: Binding, steps: int) -> Iterator[Values]:
    """Takes `steps` steps on the whole batch; gives the complete gradients of each."""
    for _ in range(steps):
        with _watched(binding, {}, {}) as seen:
            first.step(first.model, first.optimizer, *first.batch)
        yield seen.gradients


def split(first: FirstStep, binding: Binding, plan: Plan, steps: int) -> Iterator[Gradients]:
    """Takes `steps` steps on the parts of the batch, as SEMANTICS section 0 says; gives the gradients of each.

    The parts run one after another from the same values, each with its trainer's random stream; gradients are averaged
    in the order of trainers and stand in for a part's own where they are complete, before anything reads them.
    """
    parts = [part_of(first.batch, plan.trainers, k) for k in range(plan.trainers)]
    examples = [count_examples(part, first.examples) for part in parts]  # type: ignore[arg-type]
    taking = [k for k, count in enumerate(examples) if count]
    weights = [examples[k] / (examples[0] or 1.0) for k in taking]
    streams = {k: random_stream(k) for k in taking}
    reduction = _Reduction(binding, plan, weights)
    for _ in range(steps):
        yield _split_step(first, binding, {k: parts[k] for k in taking}, streams, reduction)


def _split_step(
    first: FirstStep,
    binding: Binding,
    parts: Mapping[int, object],
    streams: dict[int, torch.Tensor],
    reduction: _Reduction,
) -> Gradients:
    """One step. A gradient may depend on an update before it (a step with two optimizers): so the parts run until the
    averages no longer change; where there is one update they run twice."""
    kept, known, counts = Kept(binding), {}, {}
    for _ in range(_MOST_ROUNDS):
        runs, ends = {}, {}
        for k, part in reversed(list(parts.items())):
            kept.put_back()
            torch.set_rng_state(streams[k])
            with _watched(binding, known, counts) as seen:
                first.step(first.model, first.optimizer, *part)  # type: ignore[misc]
            runs[k], ends[k] = (seen.gradients, values_of(binding)), torch.get_rng_state()
            counts = seen.counts
        ordered = [runs[k] for k in parts]
        found = reduction.of_gradients([gradients for gradients, _ in ordered])
        if _equal(found.reduced, known):
            break
        known = found.reduced
    streams.update(ends)
    reduction.of_buffers([values for _, values in ordered])
    return found


class _Seen:
    """Gradients of one run as they were when complete, and how often each was added to. Changes while it runs."""

    def __init__(self) -> None:
        self.gradients: Values = {}
        self.counts: dict[str, int] = {}


@contextmanager
def _watched(binding: Binding, known: Values, counts: Mapping[str, int]) -> Iterator[_Seen]:
    """While open, gradients are noted; one that is complete is replaced by what is `known` of it."""
    seen = _Seen()

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def complete(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, "the hook runs when a gradient was added"
            seen.counts[name] = seen.counts.get(name, 0) + 1
            seen.gradients[name] = parameter.grad.detach().clone()
            if name in known and seen.counts[name] == counts[name]:
                parameter.grad = known[name].clone()

        return complete

    tensors = {name: slots[0].get() for name, slots in binding.modules.items()}
    handles = [t.register_post_accumulate_grad_hook(hook(name)) for name, t in tensors.items() if t.requires_grad]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Reduction:
    """How the parts' values become one under a plan, in the order and the arithmetic of a job. Never changes."""

    def __init__(self, binding: Binding, plan: Plan, weights: Sequence[float]):
        self._binding, self._trainers, self._weights = binding, plan.trainers, weights
        sharings = {s.variable: s.sync for s in plan.sharings}
        self._summed = {
            n for n, s in sharings.items() if isinstance(s, Collective | ParameterServer) and s.reduce == "sum"
        }
        self._averaged = [name for name, policy in plan.buffers if policy == "mean"]
        self._of_one = [name for name, policy in plan.buffers if policy != "mean"]
        wide = any(p.dtype is torch.float64 for p in binding.model.parameters())
        self._dtype = torch.float64 if wide else torch.float32

    def of_gradients(self, parts: Sequence[Values]) -> Gradients:
        found = {}
        for name in parts[0]:
            given = [part[name] for part in parts]
            found[name] = reduce(torch.add, given) if name in self._summed else self._mean(given)
        return Gradients(found, tuple(parts))

    @torch.no_grad()
    def of_buffers(self, parts: Sequence[Values]) -> None:
        """Writes them into the user's objects."""
        averaged = {name: self._mean([part[name] for part in parts]) for name in self._averaged}
        kept = {name: parts[0][name] for name in self._of_one}
        self._binding.write({**averaged, **kept})

    def _mean(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """SEMANTICS section 1: scaled by weight / trainers, added in order, divided by what the weights add up to."""
        if self._trainers == 1:
            return values[0]
        weights = [torch.tensor(weight, dtype=self._dtype) for weight in self._weights]
        scaled = [value * (weight / self._trainers) for value, weight in zip(values, self._weights, strict=True)]
        return reduce(torch.add, scaled) / (reduce(torch.add, weights) / self._trainers)


def _equal(a: Values, b: Values) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _copied_state(optimizer: torch.optim.Optimizer) -> dict:
    return {parameter: _copied(held) for parameter, held in optimizer.state.items()}


def _copied_groups(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [_copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]


def _copied(held: dict) -> dict:
    return copy.deepcopy(held)
