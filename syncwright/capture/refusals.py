"""What a step may not do while it is captured, and what is said then: the line that does it, and what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch.optim.lr_scheduler import LRScheduler

from syncwright.capture import private
from syncwright.capture.lines import current_line, definition, user_line
from syncwright.capture.state import Swap
from syncwright.errors import CaptureError


@contextmanager
def refusals() -> Iterator[None]:
    """What would happen once, at capture, and never again, is refused with the line that does it."""

    def refuse_schedule(self, *args, **kwargs):
        raise CaptureError(
            f"{current_line()}: {type(self).__name__}.step() inside the training step; it would run once, at capture. "
            "Expected the schedule to advance outside. Call it after trainer.step(...)."
        )

    def refuse_print() -> str:
        raise _printed(current_line())

    kinds = [c for c in [LRScheduler, *_subclasses(LRScheduler)] if "step" in vars(c)]
    with ExitStack() as undo:
        for kind in kinds:
            undo.callback(setattr, kind, "step", vars(kind)["step"])
            kind.step = refuse_schedule  # type: ignore[method-assign]
        undo.enter_context(private.no_printing(refuse_print))
        yield


def _printed(where: str) -> CaptureError:
    return CaptureError(
        f"{where}: a tensor is printed (or formatted) inside the training step; it has no value while the step is "
        "captured. Expected a step that only computes. Return it from the step and print what trainer.step(...) gives "
        "back."
    )


def _subclasses(kind: type) -> list[type]:
    return [s for c in kind.__subclasses__() for s in [c, *_subclasses(c)]]


def check_after(swap: Swap, hypers: Mapping[str, object]) -> None:
    """Raises `CaptureError` for a step that has changed hyper-parameters, or made state that it had not made before."""
    if names := swap.changed_hypers(hypers):
        raise CaptureError(
            f"the step changes {', '.join(names)}; expected a step to read hyper-parameters only. "
            "Change them between steps: they are read at every trainer.step(...)."
        )
    if names := swap.unknown_state():
        raise CaptureError(
            f"the step makes optimizer state that the optimizer's first update did not make: {', '.join(names)}. "
            "Expected the same state after every update. Take one step before capture so that the state exists."
        )


def explain(error: Exception, step: Callable) -> CaptureError:
    """The user's own line, what stood there, and what to do."""
    where = user_line(error.__traceback__) or definition(step)
    text = str(error).strip().split("\n")[0].rstrip(".")
    if isinstance(error, private.DATA_DEPENDENT) or any(sign in text for sign in _NEEDS_A_VALUE):
        return CaptureError(
            f"{where}: the step needs a tensor's value, which is not known while it is captured. Expected the same "
            "operations for every batch. To decide by a tensor, use torch.where(condition, a, b); to look at one, "
            "return it from the step; or decide outside the step."
        )
    if "unsupported format string" in text:
        return _printed(where)
    if "convert all Tensors to FakeTensors" in str(error):
        return CaptureError(
            f"{where}: the step uses a tensor that is neither an argument nor part of the model. Expected every tensor "
            "to come in by the batch, or as a parameter or buffer of the model. Pass it in the batch, or register it "
            "with module.register_buffer(name, tensor)."
        )
    return CaptureError(
        f"{where}: found {type(error).__name__}{': ' if text else ''}{text} while the step was captured. Expected a "
        "step that runs as it is on one device. Run step(model, optimizer, *batch) once without Syncwright to see "
        "whether it does."
    )


_NEEDS_A_VALUE = ("data-dependent", ".numpy() is not supported")
