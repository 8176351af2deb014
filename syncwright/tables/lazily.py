"""Zeros that take memory when they are touched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Zeros; on the host, a page of them takes memory when it is first written to. (`torch.zeros` writes all of them.)

    So a table may be made for a hundred million rows before there are any.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if not count or (device is not None and device.type != "cpu"):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype).view(*shape)
