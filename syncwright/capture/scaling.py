"""`torch.amp.GradScaler` in a trace: its scale and count are variables, and a step that is skipped is a choice of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from syncwright.capture import private
from syncwright.capture.lines import current_line
from syncwright.errors import CaptureError

aten = torch.ops.aten
NUMBERS = ("scale", "growth_tracker")


class ScalerMet(Exception):
    """The step scales its loss by a scaler of which the binding does not know yet."""

    def __init__(self, scaler: GradScaler):
        super().__init__(type(scaler).__name__)
        self.scaler = scaler


@dataclass(frozen=True, slots=True)
class ScalerSlot:
    """Where a scaler keeps one of its `NUMBERS`, in a tensor that it makes when it first scales."""

    scaler: GradScaler
    key: str

    def get(self) -> torch.Tensor:
        """A tensor of no axes; the scaler's own where there is one."""
        return private.scaler_number(self.scaler, self.key)

    def write(self, value: torch.Tensor) -> None:
        """Copies a value into the scaler."""
        own = self.get()
        own.copy_(value)
        private.set_scaler_number(self.scaler, self.key, own)

    def swap(self, value: object, undo: ExitStack) -> None:
        """Until `undo` closes, the scaler keeps `value` there."""
        before = private.set_scaler_number(self.scaler, self.key, value)
        undo.callback(private.set_scaler_number, self.scaler, self.key, before)


def factors(scaler: GradScaler) -> tuple[float, float, int]:
    """What a trace freezes."""
    return scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()


def wrap_scalers(scalers: Sequence[GradScaler], undo: ExitStack) -> None:
    """Until `undo` closes, `step` of the scalers is one that can be traced, and one that is not among them is met.

        before  if not found_inf.item(): optimizer.step()
        after   optimizer.step(); weight = where(found_inf, old weight, weight), and so on for all that the step has changed

    A skipped step changes no parameter and no state, step counts among them; all else of the scaler runs as it is.
    """

    def scale(self, outputs):
        if self.is_enabled() and not any(self is each for each in scalers):
            _check_kind(self)
            raise ScalerMet(self)
        return original(self, outputs)

    original = GradScaler.scale
    undo.callback(setattr, GradScaler, "scale", original)
    GradScaler.scale = scale  # type: ignore[method-assign]
    for each in scalers:
        undo.enter_context(private.skipping(each, _step_unless_found))


def check_updated(scalers: Sequence[GradScaler]) -> None:
    """Raises `CaptureError` for a step that ends between a scaler's `step` or `unscale_` and its `update`."""
    for each in scalers:
        if not private.is_between_steps(each):
            raise CaptureError(
                f"the step ends without {type(each).__name__}.update(), after unscale_() or step(). Expected a step that scales "
                "the loss, steps and updates the scale. Call scaler.update() at the end of the step, and not between steps."
            )


def _check_kind(scaler: GradScaler) -> None:
    kind = type(scaler)
    if changed := private.changed_scaling(kind):
        raise CaptureError(
            f"{current_line()}: found {kind.__name__}, with {changed[0]}() of its own. Expected torch.amp.GradScaler, of which a "
            "captured step does the same, and looks at the gradients of all trainers. Use it."
        )


@torch.no_grad()
def _step_unless_found(optimizer: Any, optimizer_state: Mapping[str, Any], *args: object, **kwargs: object) -> object:
    """The optimizer's step, of which nothing stays where a gradient is not finite."""
    skipped = reduce(torch.maximum, optimizer_state["found_inf_per_device"].values()) != 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [_Kept(p) for p in parameters]
    state = [(held, key, _Kept(value)) for held in optimizer.state.values() for key, value in held.items()]
    returned = optimizer.step(*args, **kwargs)
    for each in kept:
        each.put_back_where(skipped)
    for held, key, each in state:
        if held[key] is each.tensor:
            each.put_back_where(skipped)
        else:
            held[key] = torch.where(skipped, each.value, held[key])
    return returned


class _Kept:
    """A tensor and what it holds. Never changes, but the tensor does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.value, self._version = tensor, tensor.detach().clone(), tensor._version

    def put_back_where(self, condition: torch.Tensor) -> None:
        """Gives the tensor its old value again where `condition` holds; one that has not changed is left alone."""
        if self.tensor._version != self._version:
            self.tensor.copy_(torch.where(condition, self.value, self.tensor))


def _unscale(grads: list[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """`_amp_foreach_non_finite_check_and_unscale_`: 0 times what is not finite is NaN, and so is a sum with it.

    Such sums are cut, and added up over roles, as any sum is; also those of no numbers at all.
    """
    sums = [(grad * 0.0).sum() for grad in grads]
    found_inf.copy_(torch.where(torch.stack(sums).sum() == 0, found_inf, torch.ones_like(found_inf)))
    for grad in grads:
        grad.mul_(inv_scale)


def _update(
    scale: torch.Tensor, tracker: torch.Tensor, found_inf: torch.Tensor, growth: float, backoff: float, interval: int
) -> torch.Tensor:
    """`_amp_update_scale_`: smaller after a step that was skipped, larger after `interval` steps that were not."""
    skipped, count = found_inf != 0, tracker + 1
    full = count == interval
    grown = (scale.double() * growth).float()
    grown = torch.where(grown < float("inf"), grown, scale)
    backed_off = (scale.double() * backoff).float()
    scale.copy_(torch.where(skipped, backed_off, torch.where(full, grown, scale)))
    tracker.copy_(torch.where(skipped | full, torch.zeros_like(tracker), count))
    return scale


SCALING: Mapping[Any, Callable] = {
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    aten._amp_update_scale_.default: _update,
}
"""A decomposition table: what a scaler asks of gradients and does to its scale, in operations that a graph can cut."""
