"""Optimizers that torch lacks."""

from syncwright.optim.row_wise_adagrad import RowWiseAdagrad

__all__ = ["RowWiseAdagrad"]
