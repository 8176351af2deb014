"""The state that an optimizer gives a parameter before its first update, found by watching a first update."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from syncwright.capture.private import FakeTensorMode
from syncwright.capture.sparse_adam import is_sparse_adam
from syncwright.deferred.tensor import Deferred
from syncwright.errors import CaptureError

StateValue = torch.Tensor | float | int
BEGUN = "begun"
"""State that Syncwright makes where the first update ignores `dampening`: 0 before it, then 1. The user never sees it."""


LARGE = 2**16
"""Elements from which on a parameter's state is found on samples, so that no copies of the parameter are made."""


def initial_state(optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str) -> dict[str, StateValue]:
    """What `optimizer.state[parameter]` is just before the first update, exactly, for any optimizer class.

    A shadow of the optimizer updates a copy of the parameter while every tensor is photographed before it is first
    written to. State that the first update computes from the gradient (SGD's momentum) starts at zero. An experiment
    then checks that an update from the state found equals an update from none. Where the first update ignores
    `dampening`, the state found holds `BEGUN`. The user's optimizer, parameter and random state are not touched.

    A large parameter takes no part: two small samples of random numbers, of different shapes, stand for it where each
    state of both starts as one number everywhere, the same for both; the state is then that number, expanded. Of a
    deferred parameter no other state is found.

    Raises `CaptureError` for an optimizer whose first update differs, or whose state is no tensor or number.
    """
    if not parameter.requires_grad:
        return {}
    deferred = isinstance(parameter, Deferred)
    if deferred or (parameter.numel() >= LARGE and parameter.is_contiguous()):
        filled = _filled_state(optimizer, group, parameter, name)
        if filled is not None:
            return filled
    if deferred:
        raise CaptureError(
            f"{type(optimizer).__name__}, parameter '{name}': found state that its first update makes from the parameter's "
            "values or shape, but the parameter is deferred and has none yet. Expected state that begins as one number. Make "
            "it outside of deferred(), or call syncwright.deferred.build(model) first."
        )
    return _state_of(optimizer, group, parameter, name)


def _state_of(optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str) -> dict[str, StateValue]:
    with torch.random.fork_rng(devices=[]):
        fresh, other = _Shadow(optimizer, group, parameter, name), _Shadow(optimizer, group, parameter, name)
        found, elsewhere = fresh.watch(_probe_gradient(parameter, 0)), other.watch(_probe_gradient(parameter, 1))
        found = {k: v if _equal(v, elsewhere[k]) else _zero(v) for k, v in found.items()}
        undampened = ignores_dampening(optimizer, group, parameter, name)
        again = _Shadow(optimizer, group | {"dampening": 0.0} if undampened else group, parameter, name)
        again.update({key: _clone(value) for key, value in found.items()}, _probe_gradient(parameter, 0))
    _check_same(fresh, again)
    return found | ({BEGUN: torch.tensor(0.0)} if undampened else {})


def _filled_state(
    optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str
) -> dict[str, StateValue] | None:
    """The state of a large parameter from samples; None where it depends on the parameter's values or shape."""
    samples = [_probe_gradient(parameter[_corner(parameter, n)], n).requires_grad_() for n in (16, 12)]
    states = [_state_of(optimizer, group, sample, name) for sample in samples]
    begun = states[0].pop(BEGUN, None), states[1].pop(BEGUN, None)
    looks = _looks_of_state(optimizer, group, parameter, name)
    if not looks.keys() == states[0].keys() == states[1].keys():
        return None
    found: dict[str, StateValue] = {}
    for key, value in states[0].items():
        number, other = _number(value), _number(states[1][key])
        if number is None or not _equal(number, other):
            return None
        look = looks[key]
        found[key] = number.expand(look.shape) if isinstance(look, torch.Tensor) else value  # type: ignore[union-attr]
    return found if begun[0] is None else {**found, BEGUN: begun[0]}


def _corner(parameter: torch.Tensor, size: int) -> tuple[slice, ...]:
    return tuple(slice(0, size) for _ in range(parameter.dim()))


def _number(value: StateValue) -> torch.Tensor | None:
    """The one number that a state is made of."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value)
    if not value.numel():
        return None
    first = value.reshape(-1)[0]
    return first.clone() if _equal(value, first.expand(value.shape)) else None


def _looks_of_state(optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str) -> dict[str, object]:
    """The state's shapes and dtypes, from a first update of a parameter without values, as far as it gets."""
    with FakeTensorMode():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        shadow = _Shadow(optimizer, group, whole, name)
        with suppress(CaptureError):
            shadow.update({}, torch.empty_like(whole))
    return {k: v for k, v in shadow.optimizer.state[shadow.parameter].first.items() if v is not None}


def ignores_dampening(optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str) -> bool:
    """Whether the first update of a parameter is the one without `dampening`, and the second is not.

    SGD's momentum starts as the gradient itself: buf = g, and from then on buf = momentum * buf + (1 - dampening) * g.
    """
    if not group.get("dampening"):
        return False
    probe = torch.ones(2, dtype=parameter.dtype, device=parameter.device)
    dampened, plain = (_Shadow(optimizer, group | more, probe, name) for more in ({}, {"dampening": 0.0}))
    gradient = _probe_gradient(probe, 0)
    same = []
    for _ in range(2):
        dampened.update({}, gradient)
        plain.update({}, gradient)
        same.append(_equal(dampened.parameter, plain.parameter))
    return same == [True, False]


def _probe_gradient(parameter: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).to(parameter.device)


class _Shadow:
    """A copy of an optimizer with one parameter and a state of its own."""

    def __init__(self, optimizer: Optimizer, group: dict, parameter: torch.Tensor, name: str):
        self.about = f"{type(optimizer).__name__}, parameter '{name}'"
        self.parameter = parameter.detach().clone().requires_grad_()
        shadow = object.__new__(type(optimizer))
        shadow.__dict__.update(optimizer.__dict__)
        shadow.__dict__.pop("step", None)  # a schedule's counter, which would update the user's own
        hooks = [key for key, value in vars(optimizer).items() if isinstance(value, OrderedDict)]
        shadow.__dict__.update({key: OrderedDict() for key in hooks})
        shadow.param_groups = [_own_copy(group) | {"params": [self.parameter]}]
        shadow.state = defaultdict(_Recorder)
        self.optimizer = shadow

    def watch(self, gradient: torch.Tensor) -> dict[str, StateValue]:
        with _Photographs() as photographs:
            self._step(gradient)
        recorder = self.optimizer.state[self.parameter]
        for key, value in recorder.first.items():
            self._check_kind(key, value)
        return {k: photographs.before(v) for k, v in recorder.first.items() if v is not None}  # type: ignore[arg-type]

    def update(self, state: Mapping[str, StateValue], gradient: torch.Tensor) -> None:
        self.optimizer.state[self.parameter].update(state)
        self._step(gradient)

    def _step(self, gradient: torch.Tensor) -> None:
        self.parameter.grad = gradient.to_sparse(1) if is_sparse_adam(self.optimizer) else gradient.clone()
        try:
            self.optimizer.step()
        except Exception as error:
            raise CaptureError(
                f"{self.about}: found {type(error).__name__} in its first update: {error}. Expected an optimizer whose "
                "step() needs no closure and works from one gradient alone. Use another optimizer (not LBFGS), or take "
                "one step before capture so that its state exists."
            ) from error

    def _check_kind(self, key: str, value: object) -> None:
        if value is not None and not isinstance(value, torch.Tensor | int | float):
            raise CaptureError(
                f"{self.about}: found a {type(value).__name__} in its state under '{key}', expected tensors and "
                "numbers. Keep the value in a tensor, or outside of the optimizer's state."
            )


class _Recorder(dict):
    """One parameter's state, remembering what each key was first set to."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, object] = {}

    def __setitem__(self, key: str, value: object) -> None:
        self.first.setdefault(key, value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: object = None) -> object:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others, **more) -> None:
        for key, value in dict(*others, **more).items():
            self[key] = value


class _Photographs(TorchDispatchMode):
    """Keeps what every tensor was before it was first written to."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for declared in func._schema.arguments:
            if declared.alias_info is not None and declared.alias_info.is_write:
                given = named[declared.name]
                for tensor in given if isinstance(given, list | tuple) else [given]:
                    self._keep(tensor)
        return func(*args, **(kwargs or {}))

    def _keep(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = (tensor, tensor.detach().clone())

    def before(self, value: StateValue) -> StateValue:
        if isinstance(value, torch.Tensor):
            kept = self._kept.get(id(value))
            return kept[1] if kept is not None else value.detach().clone()
        return value


def _check_same(fresh: _Shadow, again: _Shadow) -> None:
    ours, theirs = again.optimizer.state[again.parameter], fresh.optimizer.state[fresh.parameter]
    differing = [key for key in theirs if not _equal(theirs[key], ours.get(key))]
    if not _equal(fresh.parameter, again.parameter) or differing:
        raise CaptureError(
            f"{fresh.about}: found a first update that differs from all others "
            f"({', '.join(differing) or 'its result'}), so no initial state stands for it. Expected a state from which "
            "the first update is like the rest. Take one step before capture so that the state exists."
        )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach()))
    return a == b


def _clone(value: StateValue) -> StateValue:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _zero(value: StateValue) -> StateValue:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else type(value)(0)


def _own_copy(group: dict) -> dict:
    return {key: copy.copy(value) for key, value in group.items() if key != "params"}
