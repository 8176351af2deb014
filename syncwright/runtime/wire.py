"""Messages as frames of bytes, and back: everything that arrives is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import torch

from syncwright.errors import JobError
from syncwright.runtime.messages import (
    HEADERS,
    AnyHeader,
    Go,
    Leave,
    Message,
    Order,
    Part,
    Place,
    Pull,
    PullRows,
    Push,
    Resume,
    Rows,
    Start,
    Taken,
    Tick,
    Value,
)

CHUNK_NBYTES = 4 << 20
"""The most bytes of a tensor in one frame: frames of 1 to 4 MB are copied and sent at the same time."""

ALIGNMENT = 64

HEADER_NBYTES = 1 << 20
"""The most bytes of a first frame."""

LARGEST = 2**63 - 1

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64, torch.complex128),
    )
}
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

Limit = Mapping[str, tuple[tuple[int | range, ...], torch.dtype]]
"""For every channel that may arrive, the shape and the dtype that its tensors have; a range: one of these sizes."""
WITH_TENSOR = (Push, PullRows, Rows, Order, Part, Value)
PACKED_NBYTES = 4 << 20
"""The most bytes of packed tensors in one message (see `packed`)."""
Find = Callable[[Place, int], np.ndarray]
"""The bytes of a tensor that lies elsewhere, and how many; raises `WireError` where there are none."""


class WireError(JobError):
    """Frames that are not a message, or a message that cannot become frames."""


class TensorHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the payload frames are."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class FirstFrame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All of a message but the bytes of its tensor."""

    header: AnyHeader
    tensor: TensorHeader | None
    job: int = 0
    place: Place | None = None


DECODER = msgspec.msgpack.Decoder(FirstFrame)
ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message, place: Place | None = None) -> list[bytes | memoryview]:
    """`Push("w", step=3, ...)` and 10 MB become a header frame, then views of 4, 4 and 2 MB of the tensor.

    Nothing is copied if the tensor is contiguous and in host memory: it must not change until it is sent. Given the place
    where its receiver finds the tensor, the header frame is all.
    """
    header, tensor = message.header, message.tensor
    if not isinstance(header, HEADERS):
        raise WireError(f"cannot send a {type(header).__name__}: not one of the headers in messages.HEADERS")
    if tensor is None:
        first = FirstFrame(header, None, message.job)
        _check_header(first)
        return [_first_frame(first)]
    if tensor.dtype not in NAMES:
        raise WireError(f"cannot send {_about(header)}: dtype {tensor.dtype} is none of {', '.join(DTYPES)}")
    spec = TensorHeader(NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
    first = FirstFrame(header, spec, message.job, place)
    _check_header(first)
    if place is not None:
        return [_first_frame(first)]
    payload = _host_bytes(tensor)
    chunks = [payload[at : at + CHUNK_NBYTES] for at in range(0, payload.nbytes, CHUNK_NBYTES)]
    return [_first_frame(first), *chunks]


def decode(
    frames: Sequence[bytes | memoryview],
    limit: Limit | None = None,
    max_nbytes: int = LARGEST,
    exchanges: Sequence[Limit] = (),
    *,
    given: bool = False,
    find: Find | None = None,
) -> Message:
    """The message that `encode` made these frames from; `WireError` for anything else.

    limit: which channels are expected, and what their tensors are; None accepts any.
    exchanges: the same for each exchange of the job.
    max_nbytes: the largest tensor that is accepted.
    given: the frames are nobody else's, and the tensor may stay in their memory.
    find: gives the bytes of a tensor that lies elsewhere, where it stays: nobody may write to it.
    Any other tensor is in writable memory; new one unless it stays.
    """
    if not frames:
        raise WireError("a message of no frames; expected a header frame")
    first = _parse(frames[0])
    _check_header(first)
    _check_limit(first, limit if limit is None else _of_job(first, [limit, *exchanges]), max_nbytes)
    spec = first.tensor
    if first.place is not None:
        return _found(first, frames, find)
    _check_payload(first.header, spec.nbytes if spec else 0, [memoryview(f).nbytes for f in frames[1:]])
    tensor = None if spec is None else _tensor(first.header, spec, frames[1:], given)
    return Message(first.header, tensor, first.job)


def _found(first: FirstFrame, frames: Sequence[bytes | memoryview], find: Find | None) -> Message:
    header, spec, place = first.header, first.tensor, first.place
    if spec is None or place is None or find is None or len(frames) > 1 or not spec.nbytes:
        raise WireError(f"{_about(header)}: a tensor in another place than its frames, where none can be")
    if spec.dtype == "bool":
        raise WireError(f"{_about(header)}: a bool tensor in another place than its frames, where it may change")
    found = torch.from_numpy(find(place, spec.nbytes)).view(DTYPES[spec.dtype]).view(spec.shape)
    return Message(header, found, first.job)


def _first_frame(first: FirstFrame) -> bytes:
    encoded = ENCODER.encode(first)
    if len(encoded) > HEADER_NBYTES:
        found = f"its header takes {len(encoded)} bytes"
        raise WireError(f"cannot send {_about(first.header)}: {found}, more than {HEADER_NBYTES}")
    return encoded


def _host_bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def _parse(frame: bytes | memoryview) -> FirstFrame:
    nbytes = memoryview(frame).nbytes
    if nbytes > HEADER_NBYTES:
        raise WireError(f"a header frame of {nbytes} bytes; at most {HEADER_NBYTES} are accepted")
    try:
        return DECODER.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a header frame that cannot be read ({nbytes} bytes): {error}") from error


def _check_header(first: FirstFrame) -> None:
    header, spec = first.header, first.tensor
    if not 0 <= first.job <= LARGEST:
        raise WireError(f"{_about(header)}: its job is {first.job}; expected 0 to {LARGEST}")
    match header:
        case Push(step=number, weight=weight) if not (math.isfinite(weight) and weight >= 0):
            raise WireError(f"{_about(header)}: weight is {weight}; expected a finite number, at least 0")
        case (
            Push(step=number)
            | Leave(step=number)
            | Resume(step=number)
            | Pull(version=number)
            | Order(version=number)
            | Value(version=number)
            | Start(version=number)
            | Tick(clock=number)
            | Go(clock=number)
        ):
            if not 0 <= number <= LARGEST:
                raise WireError(f"{_about(header)}: its step or version is {number}; expected 0 to {LARGEST}")
    if isinstance(header, WITH_TENSOR) and spec is None:
        raise WireError(f"{_about(header)} without a tensor; expected one")
    if spec is None:
        return
    if not isinstance(header, WITH_TENSOR):
        raise WireError(f"{_about(header)} with a tensor of {spec.nbytes} bytes; expected none")
    _check_tensor(header, spec)


def _check_tensor(header: Push | PullRows | Rows | Order | Part | Value, spec: TensorHeader) -> None:
    if spec.dtype not in DTYPES:
        raise WireError(f"{_about(header)}: dtype {spec.dtype!r} is none of {', '.join(DTYPES)}")
    if len(spec.shape) > 64:
        raise WireError(f"{_about(header)}: a tensor of {len(spec.shape)} axes; at most 64 are accepted")
    if any(size < 0 for size in spec.shape):
        raise WireError(f"{_about(header)}: shape {spec.shape} has a negative size")
    itemsize = DTYPES[spec.dtype].itemsize
    if math.prod(max(size, 1) for size in spec.shape) * itemsize > LARGEST:
        raise WireError(f"{_about(header)}: shape {spec.shape} is larger than any memory")
    expected = math.prod(spec.shape) * itemsize
    if spec.nbytes != expected:
        found = f"{spec.nbytes} bytes for {spec.dtype} of shape {spec.shape}"
        raise WireError(f"{_about(header)}: {found}; expected {expected}")


def _of_job(first: FirstFrame, limits: Sequence[Limit]) -> Limit:
    if first.job >= len(limits):
        raise WireError(f"{_about(first.header)}: of job {first.job}; this one has {len(limits)}, which count from 0")
    return limits[first.job]


def _check_limit(first: FirstFrame, limit: Limit | None, max_nbytes: int) -> None:
    header, spec = first.header, first.tensor
    if spec is not None and spec.nbytes > max_nbytes:
        raise WireError(f"{_about(header)}: {spec.nbytes} bytes; at most {max_nbytes} are accepted")
    if limit is None or not isinstance(header, Push | Pull | PullRows | Rows | Order | Part | Value):
        return
    if header.channel not in limit:
        raise WireError(f"{_about(header)}: this job has no such channel")
    shape, dtype = limit[header.channel]
    if isinstance(header, PullRows):
        shape, dtype = shape[:1], torch.int64
    elif isinstance(header, Order | Part):
        shape, dtype = (range(PACKED_NBYTES + 1),), torch.uint8
    if spec is not None and not (_fits(spec.shape, shape) and spec.dtype == NAMES[dtype]):
        found = f"a tensor {spec.dtype} of shape {spec.shape}"
        raise WireError(f"{_about(header)}: {found}; expected {NAMES[dtype]} of shape {tuple(shape)}")


def _fits(found: tuple[int, ...], expected: tuple[int | range, ...]) -> bool:
    return len(found) == len(expected) and all(
        size in wanted if isinstance(wanted, range) else size == wanted
        for size, wanted in zip(found, expected, strict=True)
    )


def _check_payload(header: msgspec.Struct, nbytes: int, sizes: list[int]) -> None:
    expected = [min(CHUNK_NBYTES, nbytes - at) for at in range(0, min(nbytes, sum(sizes)), CHUNK_NBYTES)]
    if sum(sizes) != nbytes or sizes != expected:
        found = f"{len(sizes)} payload frames of {sum(sizes)} bytes together"
        wanted = f"{nbytes} bytes in frames of {CHUNK_NBYTES} and a last one of what remains"
        raise WireError(f"{_about(header)}: {found}; expected {wanted}")


def _tensor(
    header: msgspec.Struct, spec: TensorHeader, payload: Sequence[bytes | memoryview], given: bool
) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    if dtype is torch.bool and any(set(bytes(frame)) - {0, 1} for frame in payload):
        raise WireError(f"{_about(header)}: bytes of a bool tensor that are neither 0 nor 1")
    if given and len(payload) == 1 and (own := _own(payload[0], dtype)) is not None:
        return own.view(spec.shape)
    memory = _memory(spec.nbytes)
    at = 0
    for frame in payload:
        view = memoryview(frame).cast("B")
        memory.data[at : at + view.nbytes] = view
        at += view.nbytes
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.from_numpy(memory).view(dtype).reshape(spec.shape)


def _own(frame: bytes | memoryview, dtype: torch.dtype) -> torch.Tensor | None:
    """A tensor over a frame's memory; None where it cannot be written, or is not aligned."""
    view = memoryview(frame)
    if view.readonly or not view.nbytes:
        return None
    tensor = torch.frombuffer(view, dtype=dtype)
    return tensor if tensor.data_ptr() % dtype.itemsize == 0 else None


def _memory(nbytes: int) -> np.ndarray:
    """Aligned bytes, by numpy: it asks for huge pages, so 64 MB are filled 5 times as fast as torch's."""
    memory = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + nbytes]


def _about(header: msgspec.Struct) -> str:
    """`Push of 'w'`; a channel that came over a wire may be long."""
    name = type(header).__name__
    match header:
        case (
            Push(channel=channel)
            | Pull(channel=channel)
            | PullRows(channel=channel)
            | Rows(channel=channel)
            | Order(channel=channel)
            | Part(channel=channel)
            | Taken(channel=channel)
            | Value(channel=channel)
            | Start(channel=channel)
        ):
            return f"{name} of {channel[:80]!r}"
    return name
