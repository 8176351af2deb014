"""A step whose plan scales its loss: the user's step, run so that a `GradScaler` of ours is used where it uses none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from syncwright.capture import private
from syncwright.capture.lines import current_line
from syncwright.capture.state import named_optimizers
from syncwright.capture.stepping import restore
from syncwright.errors import CaptureError
from syncwright.plan import Dynamic


class ScaledStep:
    """`step(model, optimizer, *batch)`, its loss scaled around every `backward()`. Changes: its scaler, with a step that runs.

        before  loss.backward()                       after  scaler.scale(loss).backward(); scaler.unscale_(optimizer)
                optimizer.step()                             scaler.step(optimizer)
                                                             scaler.update(), once, at the end

    So what the step reads of a gradient, and clips, is unscaled. `torch.autograd.grad` is left as it is. Raises `CaptureError`
    where the step scales its loss itself.
    """

    def __init__(self, step: Callable, scale: Dynamic):
        self.step, self.scale = step, scale
        self._scaler: GradScaler | None = None

    def __call__(self, model: object, optimizer: object, *batch: object) -> object:
        optimizers = list(named_optimizers(optimizer).values())
        scaler = self._scaler = self._scaler or _scaler_for(optimizers, self.scale)
        with ExitStack() as undo:
            scaling = _Scaling(scaler, optimizers, undo)
            returned = self.step(model, optimizer, *batch)
        if scaling.stepped:
            scaler.update()
        return returned


def scaled_by(step: Callable, scale: Dynamic | None) -> Callable:
    """The step as it is scaled by this plan's `loss_scale`, in place of another plan's."""
    if isinstance(step, ScaledStep):
        if step.scale == scale:
            return step
        step = step.step
    return step if scale is None else ScaledStep(step, scale)


def _scaler_for(optimizers: Sequence[torch.optim.Optimizer], scale: Dynamic) -> GradScaler:
    device = next((parameter.device.type for each in optimizers for parameter in _parameters(each)), "cpu")
    return GradScaler(device, scale.init_scale, scale.growth_factor, scale.backoff_factor, scale.growth_interval)


class _Scaling:
    """One run of the step. Changes: gradients as they are with the scale, by parameter, and what stands for them in `grad`."""

    def __init__(self, scaler: GradScaler, optimizers: Sequence[torch.optim.Optimizer], undo: ExitStack):
        self.stepped: list[torch.optim.Optimizer] = []
        self._scaler, self._optimizers = scaler, optimizers
        self._gradients: dict[torch.Tensor, _Gradient] = {}
        self._backward, self._scale = torch.autograd.backward, GradScaler.scale
        undo.callback(setattr, torch.autograd, "backward", self._backward)
        torch.autograd.backward = self._scaled_backward
        undo.callback(setattr, GradScaler, "scale", self._scale)
        GradScaler.scale = _refuse  # type: ignore[method-assign, assignment]
        for each in optimizers:
            undo.callback(restore, each, "step", vars(each).get("step"))
            each.step = partial(self._step_of, each, each.step)  # type: ignore[method-assign]

    def _scaled_backward(self, tensors: Any, *args: object, **kwargs: object) -> None:
        before = {parameter: parameter.grad for each in self._optimizers for parameter in _parameters(each)}
        for parameter, grad in before.items():
            known = self._gradients.get(parameter)
            parameter.grad = known.scaled if known is not None and known.stands_as(grad) else None
        with _completed(before) as new:
            self._backward(self._scale(self._scaler, tensors), *args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            for each in self._optimizers:
                self._unscale(each, {parameter: before[parameter] for parameter in _parameters(each)}, new)

    def _unscale(
        self,
        optimizer: torch.optim.Optimizer,
        before: Mapping[torch.Tensor, torch.Tensor | None],
        new: Set[torch.Tensor],
    ) -> None:
        """Gradients of one more `backward()`, with those of the ones before; what is not finite is looked for in the sums, which
        are what trainers reduce. One that the step has written to since stays as it is, and the new one is added."""
        if not any(parameter in new for parameter in before):
            for parameter, grad in before.items():
                parameter.grad = grad
            return
        apart = {}
        for parameter, grad in before.items():
            known = self._gradients.get(parameter)
            if parameter in new:
                if grad is not None and (known is None or not known.stands_as(grad)):
                    apart[parameter] = grad
                assert parameter.grad is not None, "it is new"
                self._gradients[parameter] = _Gradient(parameter.grad)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        if any(each is optimizer for each in self.stepped):
            inverse = private.scaler_number(self._scaler, "scale").double().reciprocal().float()
            for parameter in (each for each in before if each in new):
                parameter.grad = self._gradients[parameter].scaled * inverse
        else:
            private.unscale_anew(self._scaler, optimizer)
        for parameter, grad in before.items():
            if parameter not in new:
                parameter.grad = grad
            elif parameter in apart:
                parameter.grad = apart[parameter] + parameter.grad
            else:
                self._gradients[parameter].stand_as(parameter.grad)

    def _step_of(self, each: torch.optim.Optimizer, original: Callable, *args: object, **kwargs: object) -> object:
        if any(each is one for one in self.stepped) or not private.is_unscaled(self._scaler, each):
            return original(*args, **kwargs)
        self.stepped.append(each)
        return self._scaler.step(each, *args, **kwargs)


class _Gradient:
    """Changes once: with the scale, and what stands for it in `grad`, unscaled."""

    def __init__(self, scaled: torch.Tensor):
        self.scaled = scaled
        self._stands: tuple[torch.Tensor, int] | None = None

    def stand_as(self, grad: torch.Tensor | None) -> None:
        assert grad is not None, "there is a gradient"
        self._stands = grad, grad._version

    def stands_as(self, grad: torch.Tensor | None) -> bool:
        """Whether this is what was put there, and nobody has written to it."""
        return (
            grad is not None
            and self._stands is not None
            and grad is self._stands[0]
            and grad._version == self._stands[1]
        )


@contextmanager
def _completed(parameters: Iterable[torch.Tensor]) -> Iterator[set[torch.Tensor]]:
    """The parameters of which a gradient is complete while this is open, as they are."""
    found: set[torch.Tensor] = set()
    with ExitStack() as undo:
        for parameter in parameters:
            if parameter.requires_grad:
                undo.callback(parameter.register_post_accumulate_grad_hook(found.add).remove)
        yield found


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _refuse(scaler: GradScaler, outputs: object) -> None:
    raise CaptureError(
        f"{current_line()}: found {type(scaler).__name__}.scale(), and loss_scale in the plan. Expected one of both. Take "
        "loss_scale out of the plan, or the scaler out of the step."
    )
