"""Several named tensors in one, for what has no fixed shape: a table's export, and what a table is told."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec
import torch

from syncwright.runtime.wire import DTYPES, NAMES, PACKED_NBYTES, WireError

_LENGTH_NBYTES = 8
_Contents = list[tuple[str, str, tuple[int, ...]]]
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Contents)


def pack(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Bytes: the length of the contents, the contents (names, dtypes, shapes), then each tensor's memory."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    contents = _ENCODER.encode([(name, NAMES[t.dtype], tuple(t.shape)) for name, t in plain.items()])
    head = len(contents).to_bytes(_LENGTH_NBYTES, "little") + contents
    parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8)]
    return torch.cat([*parts, *(t.view(-1).view(torch.uint8) for t in plain.values() if t.numel())])


def unpack(packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inverse of `pack`; `WireError` for bytes that it has not made."""
    raw = packed.numpy()
    length = int.from_bytes(raw[:_LENGTH_NBYTES].tobytes(), "little")
    at = _LENGTH_NBYTES + length
    try:
        contents = _DECODER.decode(raw[_LENGTH_NBYTES:at].tobytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"packed tensors whose contents cannot be read: {error}") from error
    found: dict[str, torch.Tensor] = {}
    for name, dtype, shape in contents:
        if name in found or dtype not in DTYPES or dtype == "bool" or any(size < 0 for size in shape):
            raise WireError(f"packed tensors: {name[:80]!r} is {dtype[:20]} of shape {shape[:8]}, or there twice")
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if at + nbytes > len(raw):
            raise WireError(f"packed tensors: {name[:80]!r} ends behind the last byte")
        found[name] = packed[at : at + nbytes].clone().view(DTYPES[dtype]).view(shape)
        at += nbytes
    if at != len(raw):
        raise WireError(f"packed tensors with {len(raw) - at} bytes behind them")
    return found


def chunks(packed: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    """The bytes in parts of one message each, and whether a part is the last."""
    parts = packed.split(PACKED_NBYTES)
    for index, part in enumerate(parts):
        yield part, index == len(parts) - 1
