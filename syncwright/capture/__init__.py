"""From a step, a model and its optimizers to a Program: the only part that knows torch.optim."""

from syncwright.capture.step import Captured, capture, capture_step

__all__ = ["Captured", "capture", "capture_step"]
