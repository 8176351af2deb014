"""Frames that nobody should send, to a real server: `python -m tests.fuzz.frames --frames 1000000 --seed 1`.

A server of a small job runs in a process of its own. It is sent random and mutated messages: by trainer 1, by somebody who
knows the job's secret but is not of the job, and by outsiders who do not know it. What would be a message of the job is sent
by the second only, so nothing may change. Then the server must be alive, give its values back bit for bit, have dropped and
counted every message, for the right reason, and have needed little memory; and a right step must give what it should.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import torch
import zmq
from torch.distributed import TCPStore

import syncwright
from syncwright.job import Job
from syncwright.runtime import parcels
from syncwright.runtime.bundles import MARK, opened
from syncwright.runtime.deadlines import Deadlines
from syncwright.runtime.guard import present
from syncwright.runtime.limits import Limits, limits_of
from syncwright.runtime.meeting import Meeting
from syncwright.runtime.membership import membership
from syncwright.runtime.messages import (
    Accepted,
    Address,
    Failure,
    Go,
    Hello,
    Kind,
    Leave,
    Message,
    Offer,
    Order,
    Part,
    Pull,
    Push,
    Resume,
    Rows,
    Start,
    Value,
)
from syncwright.runtime.metrics import url_key
from syncwright.runtime.parcels import MARKS_NBYTES, PAGE, SPACE_NBYTES, Memory, Parcels
from syncwright.runtime.rendezvous import Endpoint, Rendezvous
from syncwright.runtime.server import Server
from syncwright.runtime.sockets import SocketTransport, identity
from syncwright.runtime.traffic import MALFORMED, OVERSIZED, REFUSED, STRANGER
from syncwright.runtime.wire import CHUNK_NBYTES, Find, WireError, encode

T0, T1, S0 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1), Address(Kind.SERVER, 0)
LARGEST_GROWTH_NBYTES = 64 << 20
PATIENT = Deadlines(join=120.0, wait=1800.0)
ROOT = Path(__file__).parents[2]

Frames = list[bytes]


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def serve() -> None:
    """What the server's process runs."""
    with syncwright.distribute(step, *build(), plan="parameter_server", compile=False, deadlines=PATIENT) as trainer:
        trainer.step(torch.ones(2, 6), torch.ones(2, 2))


def small_job() -> Job:
    loopback = syncwright.loopback(step, *build(), plan="parameter_server", trainers=2, servers=1)
    loopback.step([(torch.ones(2, 6), torch.ones(2, 2))] * 2)
    assert loopback.job is not None
    return loopback.job


# --- what is sent --------------------------------------------------------------------------------------


def right_messages(job: Job, limits: Limits, at: int) -> list[Message]:
    """One message of every kind and channel, as trainers send them at a step."""
    generator = torch.Generator().manual_seed(at)

    def filled(name: str) -> torch.Tensor:
        shape, dtype = limits.forms[name]
        return torch.randn(shape, generator=generator).to(dtype)

    pushes = [Message(Push(n, at, 1.0, dict.fromkeys(h, 0.1)), filled(n)) for n, h in limits.pushed.items()]
    pulls = [Message(Pull(name, at)) for name in sorted(limits.pulled)]
    values = [Message(Value(name, at), filled(name)) for name in limits.given]
    return [*pushes, *pulls, *values, Message(Hello(job.digest)), Message(Resume(at))]


@dataclass(slots=True)
class Mutations:
    """Changes: draws messages that are wrong in one of many ways."""

    random: random.Random
    right: Sequence[Frames]

    def draw(self) -> Frames:
        chosen = list(self.random.choice(self.right))
        kinds = (
            self.noise,
            self.flipped,
            self.flipped,
            self.cut,
            self.moved,
            self.huge,
            self.deep,
            self.many,
            self.other,
            self.elsewhere,
        )
        drawn = self.random.choice(kinds)(chosen)
        return self.bundled(drawn) if self.random.random() < 0.1 else drawn

    def bundled(self, frames: Frames) -> Frames:
        """In a bundle, that may be damaged."""
        return self.random.choice([list, list, self.flipped, self.cut])([MARK + msgspec.msgpack.encode([frames])])

    def elsewhere(self, frames: Frames) -> Frames:
        """A tensor that would lie in memory that was offered."""
        header, tensor, job, _ = msgspec.msgpack.decode(frames[0])
        numbers = [0, PAGE, MARKS_NBYTES, MARKS_NBYTES + PAGE, SPACE_NBYTES - 4, SPACE_NBYTES, 2**63 - 1, 2**64 - 1, -1]
        place = [self.random.choice(numbers), self.random.choice([0, 5, *numbers])]
        return [msgspec.msgpack.encode([header, tensor, job, place]), *self.random.choice([[], frames[1:]])]

    def noise(self, _: Frames) -> Frames:
        return [self.random.randbytes(self.random.randrange(200)) for _ in range(self.random.randint(1, 3))]

    def flipped(self, frames: Frames) -> Frames:
        at = self.random.choice([0, 0, len(frames) - 1])
        frame = bytearray(frames[at])
        for _ in range(self.random.randint(1, 8)):
            frame[self.random.randrange(len(frame))] ^= 1 << self.random.randrange(8)
        return [*frames[:at], bytes(frame), *frames[at + 1 :]]

    def cut(self, frames: Frames) -> Frames:
        at = self.random.randrange(len(frames))
        return [*frames[:at], frames[at][: self.random.randrange(len(frames[at]) + 1)], *frames[at + 1 :]]

    def moved(self, frames: Frames) -> Frames:
        """Frames twice, left out, in another order, or another message's behind them."""
        more = [*frames, *self.random.choice([frames, self.random.choice(self.right)])]
        self.random.shuffle(more)
        return more[: self.random.randint(1, len(more))]

    def huge(self, frames: Frames) -> Frames:
        """Numbers in the header that are too large, negative, or of another type."""
        header, tensor, job, place = msgspec.msgpack.decode(frames[0])
        number = self.random.choice([2**31, 2**62, 2**63 - 1, 2**64 - 1, -1, -(2**63), 1e308, float("nan"), "9", None])
        if self.random.random() < 0.2:
            job = number
        elif tensor is not None and self.random.random() < 0.5:
            tensor = self.random.choice(
                [[tensor[0], [number], tensor[2]], [tensor[0], tensor[1], number], [number] * 3]
            )
        else:
            name = self.random.choice(list(header))
            header[name] = number
        return [msgspec.msgpack.encode([header, tensor, job, place]), *frames[1:]]

    def deep(self, frames: Frames) -> Frames:
        opened = self.random.choice([b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"])
        return [opened * self.random.randrange(1, 3000), *frames[1:]]

    def many(self, frames: Frames) -> Frames:
        return [frames[0], *[b"x" * self.random.randrange(3)] * self.random.randrange(3, 60)]

    def other(self, _: Frames) -> Frames:
        """What is well formed, and not for trainer 1 to send."""
        drawn = self.random
        name = drawn.choice(["w", "0.weight", "0.weight.grad", "loss", "x" * 1000])
        header = drawn.choice(
            [
                Push(name, drawn.randrange(5), 1.0, {"optimizer.0.lr": 1.0, name: 2.0}),
                *(Pull(f"{name}!", drawn.randrange(5)), Value(name, drawn.randrange(5)), Resume(drawn.randrange(99))),
                *(Order(name, "shrink", 0, "now", 1), Part(name, 1), Start(name, 0, "", 1.0), Rows(name, 1), Go(1)),
                Offer(os.getpid(), drawn.randrange(64), drawn.randrange(2**40), drawn.choice([0, 4096, SPACE_NBYTES])),
            ]
        )
        given = isinstance(header, Push | Value | Order | Part | Rows)
        tensor = torch.ones(drawn.randrange(1, 20)) if given else None
        return [bytes(frame) for frame in encode(Message(header, tensor))]


def reason_to_drop(frames: Frames, limits: Limits, find: Find) -> str | None:
    """Why a server drops this when it comes from trainer 1; None if it is a message of the job, or several."""
    if len(frames) > limits.frames:
        return OVERSIZED
    try:
        together = opened(frames)
        if len(together) > 1:
            return None
        message = limits.read(together[0], find=find)
        if isinstance(message.header, Offer):
            parcels.opened(message.header)
    except WireError:
        return MALFORMED
    try:
        limits.check(T1, message.header, message.job)
    except WireError:
        return REFUSED
    return None


# --- who sends it --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Attack:
    """Changes: the sockets of trainer 1 (whose secret is known), of a foreigner who knows it too, and of outsiders."""

    context: zmq.Context
    endpoint: Endpoint
    limits: Limits
    find: Find
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    guesses: int = 0

    def connected(self, name: bytes, secret: str) -> zmq.Socket:
        made = self.context.socket(zmq.DEALER)
        made.linger = 0
        made.setsockopt(zmq.IDENTITY, name)
        present(made, T1, secret)
        made.connect(self.endpoint.url)
        return made

    def send_all(self, mutations: Mutations, count: int, member: zmq.Socket) -> None:
        foreigner = self.connected(identity(Address(Kind.TRAINER, 9), self.endpoint.token), self.endpoint.token)
        for number in range(count):
            frames = mutations.draw()
            reason = reason_to_drop(frames, self.limits, self.find)
            if reason is None or mutations.random.random() < 0.1:
                foreigner.send_multipart(frames)
                self.sent[STRANGER, STRANGER] += 1
            else:
                member.send_multipart(frames)
                self.sent[str(T1), reason] += 1
            if number % 2_000 == 0:
                self.come_from_outside(mutations.random)
        foreigner.close(linger=30_000)

    def come_from_outside(self, drawn: random.Random) -> None:
        """Bytes that are no ZeroMQ, a secret that is wrong, a frame that is too long."""
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + drawn.choice([b"PLAIN", b"NULL\0", b"CURVE"]).ljust(20, b"\0")
        noise = drawn.randbytes(drawn.randrange(3000))
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as outsider:
            outsider.connect(self.endpoint.url.removeprefix("ipc://"))
            long = b"\x06" + struct.pack(">Q", drawn.choice([2**62, 5 << 20]))
            outsider.sendall(drawn.choice([noise, greeting.ljust(64, b"\0") + drawn.choice([noise, long])]))
        guess = self.connected(b"guess", drawn.randbytes(16).hex())
        with contextlib.suppress(zmq.Again):  # it was turned away already
            guess.send_multipart([b"x"] * 1000, flags=zmq.DONTWAIT)
        guess.close(linger=200)
        self.guesses += 1
        large = self.connected(b"large", self.endpoint.token)
        with contextlib.suppress(zmq.Again):
            large.send(bytes(CHUNK_NBYTES + 1), flags=zmq.DONTWAIT)
        large.close(linger=200)


# --- the server ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What one run found; sizes in bytes."""

    messages: int
    seconds: float
    growth_nbytes: int
    expected: Mapping[tuple[str, str], int]
    dropped: Mapping[tuple[str, str], int]
    guesses: int
    refused_connections: int
    unchanged: bool
    step_is_right: bool
    status: int

    def faults(self) -> list[str]:
        found = []
        if self.dropped != self.expected:
            found.append(f"dropped {dict(self.dropped)}, expected {dict(self.expected)}")
        if self.refused_connections < self.guesses // 2:
            found.append(f"{self.refused_connections} visitors were turned away, {self.guesses} guessed the secret")
        if self.growth_nbytes > LARGEST_GROWTH_NBYTES:
            found.append(f"memory grew by {self.growth_nbytes} bytes, expected at most {LARGEST_GROWTH_NBYTES}")
        for name, right in (("values are unchanged", self.unchanged), ("the step is right", self.step_is_right)):
            if not right:
                found.append(f"not so: {name}")
        return found + ([f"the server ended with status {self.status}"] if self.status else [])


@contextlib.contextmanager
def server_process(environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "tests.fuzz.frames", "--serve"]
    process = subprocess.Popen(command, cwd=ROOT, env={**environment, "SYNCWRIGHT_ROLE": "server"})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run(messages: int, seed: int) -> Report:
    """Starts a server, sends it `messages` wrong messages, and looks at what they did."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="syncwright-") as folder:
        named = {"TRAINERS": "2", "SERVERS": "1", "RANK": "0", "STORE": f"127.0.0.1:{store.port}", "SOCKETS": folder}
        own = {f"SYNCWRIGHT_{name}": text for name, text in named.items()} | {"SYNCWRIGHT_METRICS": "1"}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **own}
        place = membership({**own, "SYNCWRIGHT_ROLE": "trainer", "SYNCWRIGHT_METRICS": "0"})
        with server_process(environment) as process, zmq.Context() as context:
            return attacked(process, Rendezvous(place, 0), context, messages, seed)


def attacked(
    process: subprocess.Popen, rendezvous: Rendezvous, context: zmq.Context, messages: int, seed: int
) -> Report:
    job = small_job()
    limits, meeting = limits_of(job, S0), Meeting(rendezvous, PATIENT)
    meeting.agree(job)
    how = {"limit": limits_of(job, T0), "deadlines": PATIENT, "heartbeat": meeting.heartbeat}
    zero = SocketTransport(T0, rendezvous, 1, **how)
    given = [m for m in right_messages(job, limits, 0) if isinstance(m.header, Hello | Value | Resume)]
    for message in given:
        zero.send(S0, message)
        zero.flush()
    before = pulled(zero, limits, 0)
    start, begun = memory_nbytes(process.pid, "VmRSS", reset=True), time.monotonic()
    endpoint = msgspec.json.decode(rendezvous.client().get(f"present/{S0}"), type=Endpoint)
    memory, seen = Memory(), Parcels(S0)
    seen.take(T1, memory.offer)
    attack = Attack(context, endpoint, limits, partial(seen.find, T1))
    member = attack.connected(identity(T1, endpoint.token), endpoint.token)
    member.send_multipart([bytes(frame) for frame in encode(Message(memory.offer))])
    right = [[bytes(frame) for frame in encode(message)] for message in right_messages(job, limits, 0)]
    leaving = [
        [bytes(frame) for frame in encode(Message(header))]
        for header in (Leave(0), Failure("x"), Accepted(), memory.offer)
    ]
    attack.send_all(Mutations(random.Random(seed), [*right, *leaving]), messages, member)
    url = rendezvous.client().get(url_key(S0)).decode()
    dropped, refused = counted(url, messages)
    seconds, growth = time.monotonic() - begun, memory_nbytes(process.pid, "VmHWM") - start
    unchanged = same(pulled(zero, limits, 0), before)
    correct = same(stepped(job, limits, zero, member), alone(job, limits, given))
    zero.send(S0, Message(Leave(1)))
    zero.flush()
    member.send_multipart([bytes(frame) for frame in encode(Message(Leave(1)))])
    status = process.wait(60)
    member.close()
    zero.close()
    found = (messages, seconds, growth, dict(attack.sent), dropped, attack.guesses, refused)
    return Report(*found, unchanged, correct, status)


def pulled(zero: SocketTransport, limits: Limits, version: int) -> dict[str, torch.Tensor]:
    """What trainer 0 gets for everything that it may ask for."""
    names = sorted(limits.pulled & limits.given.keys())
    for name in names:
        zero.send(S0, Message(Pull(name, version)))
        zero.flush()
    found = {}
    for _ in names:
        got = zero.receive(60.0)
        assert got is not None, "the server did not answer"
        found[got[1].header.channel] = got[1].tensor  # type: ignore[union-attr]
    assert sorted(found) == names
    return found


def stepped(job: Job, limits: Limits, zero: SocketTransport, member: zmq.Socket) -> dict[str, torch.Tensor]:
    """The values after a step of both trainers."""
    for message in pushes(job, limits):
        zero.send(S0, message)
        zero.flush()
        member.send_multipart([bytes(frame) for frame in encode(message)])
    return pulled(zero, limits, 1)


def alone(job: Job, limits: Limits, given: Sequence[Message]) -> dict[str, torch.Tensor]:
    """The same of a server without sockets, which nobody has attacked."""
    server = Server(job, 0)
    for message in given:
        server.handle(T0, message)
    for sender in (T0, T1):
        for message in pushes(job, limits):
            server.handle(sender, message)
    answers = {}
    for name in sorted(limits.pulled & limits.given.keys()):
        for _, message in server.handle(T0, Message(Pull(name, 1))):
            answers[name] = message.tensor
    return answers


def pushes(job: Job, limits: Limits) -> list[Message]:
    return [message for message in right_messages(job, limits, 0) if isinstance(message.header, Push)]


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def counted(url: str, messages: int) -> tuple[dict[tuple[str, str], int], int]:
    """How many messages the server says it dropped, once that are all or no more come; and how many it turned away."""
    last, since = -1, time.monotonic()
    opened = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        text = opened.open(url, timeout=60).read().decode()
        rows = re.findall(r'^syncwright_dropped_messages_total\{peer="(.*?)",reason="(.*?)",.*\} (\S+)$', text, re.M)
        found = {(who, why): int(float(number)) for who, why, number in rows if number}
        total = sum(found.values())
        if total != last:
            last, since = total, time.monotonic()
        if total >= messages or time.monotonic() - since > 3.0:
            refused = re.search(r"^syncwright_refused_connections_total\{.*\} (\S+)$", text, re.M)
            return found, int(float(refused[1])) if refused else 0
        time.sleep(0.2)


def memory_nbytes(pid: int, name: str, reset: bool = False) -> int:
    """`VmRSS` or, since it was last reset, the most of it: `VmHWM`."""
    if reset:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many messages")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help="be the server (started by this program itself)")
    asked = parser.parse_args()
    if asked.serve:
        serve()
        return
    report = run(asked.frames, asked.seed)
    print(report)
    if faults := report.faults():
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
