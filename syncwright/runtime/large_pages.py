"""Memory for large tensors that a role keeps: in large pages, so that random rows of a table cost fewer page walks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

ALIGNMENT_NBYTES = 64


def memory_for(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """On the host, by numpy, which asks for huge pages. Anything may stand in it."""
    nbytes = prod(shape) * dtype.itemsize
    flat = torch.from_numpy(np.empty(nbytes + ALIGNMENT_NBYTES, np.uint8))
    begin = -flat.data_ptr() % ALIGNMENT_NBYTES
    return flat[begin : begin + nbytes].view(dtype).view(tuple(shape))
