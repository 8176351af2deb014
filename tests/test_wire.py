"""Frames: what is sent arrives equal, and nothing else is taken for a message."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import given, settings

from syncwright.runtime.messages import Failure, Hello, Leave, Message, Pull, Push, Value
from syncwright.runtime.wire import CHUNK_NBYTES, DTYPES, WireError, decode, encode

counts = st.integers(0, 2**63 - 1)
floats = st.floats(allow_nan=False)
weights = st.floats(0, 1e300)
plain_headers = st.one_of(
    st.builds(Hello, st.text(max_size=8)),
    st.builds(Pull, st.text(max_size=8), counts),
    st.builds(Leave, counts),
    st.builds(Failure, st.text(max_size=30)),
)
tensor_headers = st.one_of(
    st.builds(Push, st.text(max_size=8), counts, weights, st.dictionaries(st.text(max_size=4), floats, max_size=3)),
    st.builds(Value, st.text(max_size=8), counts),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, DTYPES[dtype].itemsize), generator=generator)
    made = raw.to(torch.uint8).contiguous().view(DTYPES[dtype]).reshape(shape)
    return made.transpose(0, 1) if draw(st.booleans()) and len(shape) > 1 else made


messages = st.one_of(st.builds(Message, plain_headers), st.builds(Message, tensor_headers, tensors()))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=150, deadline=None)
@given(messages)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    got = decode([bytes(frame) for frame in encode(message)])
    assert got.header == message.header
    if message.tensor is None:
        assert got.tensor is None
        return
    assert got.tensor is not None
    assert (got.tensor.shape, got.tensor.dtype) == (message.tensor.shape, message.tensor.dtype)
    assert raw_bytes(got.tensor) == raw_bytes(message.tensor)


def test_a_large_tensor_is_cut_and_not_copied() -> None:
    tensor = torch.arange(CHUNK_NBYTES // 4 * 2 + 3, dtype=torch.float32)
    frames = encode(Message(Value("w", 1), tensor))
    assert [memoryview(frame).nbytes for frame in frames[1:]] == [CHUNK_NBYTES, CHUNK_NBYTES, 12]
    tensor[0] = 7.0
    assert memoryview(frames[1]).cast("f")[0] == 7.0
    got = decode(frames).tensor
    assert got is not None
    assert torch.equal(got, tensor)
    got[0] = 8.0
    assert tensor[0] == 7.0


def test_a_parameter_can_be_sent() -> None:
    got = decode(encode(Message(Value("w", 0), torch.nn.Parameter(torch.ones(2, 2))))).tensor
    assert got is not None
    assert not got.requires_grad
    assert torch.equal(got, torch.ones(2, 2))


def frames_of(header: object, tensor: object, *payload: bytes) -> list[bytes]:
    return [msgspec.msgpack.encode([header, tensor]), *payload]


VALUE = {"type": "value", "channel": "w", "version": 1}
PUSH = {"type": "push", "channel": "w", "step": 1, "weight": 1.0}
WRONG = [
    ([], "no frames"),
    ([b""], "cannot be read"),
    ([b"\x91" * 100_000], "cannot be read"),
    ([b"\xa3\xff\xff\xff"], "cannot be read"),
    ([b"\x00" * (2 << 20)], "2097152 bytes; at most"),
    (frames_of({"type": "pickle"}, None), "pickle"),
    (frames_of({**VALUE, "version": "1"}, ["float32", [], 4], b"1234"), "version"),
    (frames_of({**VALUE, "version": -1}, ["float32", [], 4], b"1234"), "-1; expected 0"),
    (frames_of({**PUSH, "weight": float("nan")}, ["float32", [], 4], b"1234"), "weight is nan"),
    (frames_of({**PUSH, "weight": -1.0}, ["float32", [], 4], b"1234"), "weight is -1.0"),
    (frames_of(VALUE, ["object", [1], 8], b"12345678"), "dtype 'object'"),
    (frames_of(VALUE, ["float32", [-1], -4]), "negative"),
    (frames_of(VALUE, ["float32", [2**40, 2**40], 0]), "larger than any memory"),
    (frames_of(VALUE, ["float32", [2**62, 0, 2**62], 0]), "larger than any memory"),
    (frames_of(VALUE, ["float32", [1] * 65, 4], b"1234"), "65 axes"),
    (frames_of(VALUE, ["float32", [2], 4], b"1234"), "expected 8"),
    (frames_of(VALUE, ["float32", [2], 8], b"1234"), "expected 8 bytes in frames"),
    (frames_of(VALUE, ["float32", [2], 8], b"1234", b"5678"), "2 payload frames"),
    (frames_of(VALUE, ["float32", [2**40], 2**42], b"1234"), "1 payload frames"),
    (frames_of(VALUE, ["float32", [0], 0], b""), "1 payload frames"),
    (frames_of(VALUE, ["bool", [2], 2], b"\x00\x02"), "neither 0 nor 1"),
    (frames_of(VALUE, None), "without a tensor"),
    ([msgspec.msgpack.encode([{"type": "leave", "step": 1}, None, -1])], "its job is -1; expected 0"),
    ([msgspec.msgpack.encode([{"type": "leave", "step": 1}, None, "1"])], "Expected `int`, got `str`"),
    (frames_of({"type": "leave", "step": 1}, ["float32", [], 4], b"1234"), "with a tensor"),
    (frames_of({"type": "leave", "step": 1}, None, b"1234"), "1 payload frames"),
]


def test_a_message_says_of_which_job_it_is_and_is_held_to_its_limits() -> None:
    limits = {"w": ((2,), torch.float32)}, {"w": ((3,), torch.float32)}
    frames = encode(Message(Value("w", 1), torch.ones(3), job=1))
    assert decode(frames, limits[0], exchanges=limits[1:]).job == 1
    with pytest.raises(WireError, match="expected float32 of shape"):
        decode(encode(Message(Value("w", 1), torch.ones(3))), limits[0], exchanges=limits[1:])
    with pytest.raises(WireError, match="of job 1; this one has 1, which count from 0"):
        decode(frames, limits[0])


@pytest.mark.parametrize(("frames", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_no_message_is_refused_with_the_reason(frames: list[bytes], said: str) -> None:
    with pytest.raises(WireError, match=said):
        decode(frames)


def test_only_what_the_job_expects_is_accepted() -> None:
    limit = {"w": ((2,), torch.float32)}
    frames = encode(Message(Value("w", 1), torch.ones(2)))
    assert decode(frames, limit).header == Value("w", 1)
    with pytest.raises(WireError, match=r"expected bfloat16 of shape \(2,\)"):
        decode(frames, {"w": ((2,), torch.bfloat16)})
    with pytest.raises(WireError, match=r"expected float32 of shape \(3,\)"):
        decode(frames, {"w": ((3,), torch.float32)})
    with pytest.raises(WireError, match="no such channel"):
        decode(encode(Message(Pull("v", 1))), limit)
    with pytest.raises(WireError, match="at most 7"):
        decode(frames, None, max_nbytes=7)


def test_what_could_not_be_read_is_not_sent() -> None:
    with pytest.raises(WireError, match="with a tensor"):
        encode(Message(Leave(1), torch.ones(1)))
    with pytest.raises(WireError, match="without a tensor"):
        encode(Message(Value("w", 1)))
    with pytest.raises(WireError, match="dtype"):
        encode(Message(Value("w", 1), torch.ones(1).to(torch.float8_e4m3fn)))
    with pytest.raises(WireError, match="header takes"):
        encode(Message(Failure("x" * (2 << 20))))


def test_mutated_and_random_frames_raise_nothing_but_wire_errors() -> None:
    rng = random.Random(20)
    good = [
        [bytes(f) for f in encode(message)]
        for message in (
            Message(Push("layer.weight", 3, 1.0, {"lr": 0.1}), torch.arange(6.0).reshape(2, 3)),
            Message(Value("flags", 0), torch.tensor([True, False])),
            Message(Pull("layer.weight", 4)),
            Message(Failure("lost")),
        )
    ]
    refused = 0
    for _ in range(4000):
        frames = [bytearray(f) for f in rng.choice(good)]
        for _ in range(rng.randint(1, 4)):
            frame = rng.choice(frames)
            match rng.randrange(5):
                case 0 if frame:
                    frame[rng.randrange(len(frame))] = rng.randrange(256)
                case 1:
                    del frame[rng.randrange(len(frame) + 1) :]
                case 2:
                    frame.insert(rng.randrange(len(frame) + 1), rng.randrange(256))
                case 3:
                    frames.insert(rng.randrange(len(frames) + 1), bytearray(rng.randbytes(rng.randrange(40))))
                case _:
                    frames.remove(frame)
            if not frames:
                break
        try:
            decode([bytes(f) for f in frames])
        except WireError:
            refused += 1
    assert refused > 2000
