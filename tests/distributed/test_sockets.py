"""Sockets between roles: order, strangers, loss, and nothing left behind. Threads where they are enough."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import zmq

from syncwright.errors import ClusterError, DeadlineExceeded, JobError, PeerLost
from syncwright.runtime.guard import present
from syncwright.runtime.launch import Patience, launch
from syncwright.runtime.limits import Limits
from syncwright.runtime.membership import Host, Membership, StoreAddress, membership
from syncwright.runtime.messages import Address, Hello, Kind, Leave, Message, Pull, Push, Resume, Value
from syncwright.runtime.rendezvous import FAILED, Rendezvous
from syncwright.runtime.sockets import Deadlines, SocketTransport, identity
from syncwright.runtime.wire import encode

T0, T1 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1)
S0, S1 = Address(Kind.SERVER, 0), Address(Kind.SERVER, 1)
JOB = Path(__file__).with_name("exchange_job.py")

Open = Callable[..., SocketTransport]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; short, since sockets live there, and empty at the end."""
    with tempfile.TemporaryDirectory(prefix="t") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)
        assert list(Path(short).iterdir()) == []


@pytest.fixture
def place() -> Membership:
    return dataclasses.replace(membership({}), trainers=2, servers=2)


@pytest.fixture
def rendezvous(place: Membership) -> Rendezvous:
    return Rendezvous(place, 0)


@pytest.fixture
def transport(rendezvous: Rendezvous, folder: Path) -> Iterator[Open]:
    made: list[SocketTransport] = []

    def opened(me: Address, *, servers: int = 1, **options: object) -> SocketTransport:
        deadlines = Deadlines(join=0.1, wait=1, linger=0.5)
        made.append(SocketTransport(me, rendezvous, servers, deadlines=deadlines, **options))  # type: ignore[arg-type]
        return made[-1]

    yield opened
    for each in reversed(made):
        each.close()
        each.close()


def heard(transport: SocketTransport) -> tuple[Address, Message]:
    got = transport.receive(5)
    assert got is not None
    return got


def tell(transport: SocketTransport, to: Address, message: Message) -> None:
    """Sends a message at once: a small one would wait for others."""
    transport.send(to, message)
    transport.flush()


def test_what_is_sent_arrives_in_order_and_is_answered(transport: Open, folder: Path) -> None:
    server, zero = transport(S0), transport(T0)
    assert [path.name[:11] for path in folder.iterdir()] == ["syncwright-"]
    for step in range(50):
        tell(zero, S0, Message(Push("w", step, 1.0), torch.full((step,), float(step))))
    for step in range(50):
        peer, message = heard(server)
        assert (peer, message.header) == (T0, Push("w", step, 1.0))
        assert message.tensor is not None
        assert message.tensor.tolist() == [float(step)] * step
    assert server.receive(0) is None
    tell(server, T0, Message(Value("w", 50), torch.ones(3_000_000, dtype=torch.bfloat16)))
    peer, message = heard(zero)
    assert (peer, message.header) == (S0, Value("w", 50))
    assert message.tensor is not None
    assert bool((message.tensor == 1).all())


def test_receive_waits_no_longer_than_it_was_told(transport: Open) -> None:
    server = transport(S0)
    begun = time.monotonic()
    assert server.receive(0.1) is None
    assert 0.1 <= time.monotonic() - begun < 0.5


def test_all_who_send_are_heard_in_turn(transport: Open) -> None:
    servers = [transport(S0, servers=2), transport(S1, servers=2)]
    zero = transport(T0, servers=2)
    for server in servers:
        tell(zero, server.me, Message(Hello("x")))
        heard(server)
        for step in range(3):
            tell(server, T0, Message(Value("w", step), torch.ones(1)))
    time.sleep(0.1)
    assert sorted(str(heard(zero)[0]) for _ in range(6)) == ["server 0"] * 3 + ["server 1"] * 3


def test_servers_talk_to_each_other_and_may_end_one_before_the_other(transport: Open) -> None:
    zero, one = transport(S0, servers=2), transport(S1, servers=2)
    tell(zero, S1, Message(Value("norm", 1), torch.tensor(3.0)))
    tell(one, S0, Message(Value("norm", 1), torch.tensor(4.0)))
    assert heard(one)[0] == S0
    assert heard(zero)[0] == S1
    one.close()
    assert zero.receive(0.1) is None
    with pytest.raises(PeerLost, match=r"server 0 cannot send to server 1: server 1 .* has ended"):
        tell(zero, S1, Message(Leave(1)))


def test_who_has_left_a_server_may_wait_for_another_when_that_ends(transport: Open) -> None:
    servers = [transport(S0, servers=2), transport(S1, servers=2)]
    zero = transport(T0, servers=2)
    for server in servers:
        tell(zero, server.me, Message(Pull("w", 1, "end")))
        tell(zero, server.me, Message(Leave(1)))
        assert isinstance(heard(server)[1].header, Pull)
        assert isinstance(heard(server)[1].header, Leave)
    tell(servers[1], T0, Message(Value("w", 1), torch.ones(1)))
    servers[1].close()
    assert heard(zero)[0] == S1
    assert zero.receive(1.0) is None
    tell(servers[0], T0, Message(Value("w", 1), torch.ones(1)))
    assert heard(zero)[0] == S0


def test_a_connection_that_breaks_is_a_lost_peer_after_its_last_words(transport: Open) -> None:
    server, zero = transport(S0), transport(T0)
    tell(zero, S0, Message(Hello("x")))
    heard(server)
    tell(server, T0, Message(Value("w", 1), torch.ones(2)))
    for socket in server._sockets:  # as when its process is killed: no good-bye
        socket.close(linger=500)
    assert heard(zero)[1].header == Value("w", 1)
    with pytest.raises(PeerLost, match="trainer 0 lost its connection to server 0: "):
        zero.receive(5)


def test_a_message_to_a_trainer_that_is_not_there(transport: Open) -> None:
    server = transport(S0)
    with pytest.raises(PeerLost, match=r"server 0 cannot send to trainer 1, .*: trainer 1 has never been heard of"):
        tell(server, T1, Message(Leave(1)))


def test_trainers_send_to_servers_only(transport: Open) -> None:
    transport(S0)
    with pytest.raises(JobError, match="trainers send to servers only"):
        tell(transport(T0), T1, Message(Leave(1)))


@contextmanager
def visitor(server: SocketTransport, name: bytes, secret: str | None) -> Iterator[zmq.Socket]:
    """A socket that connects to `server` as anybody could."""
    assert server._binding is not None
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.IDENTITY, name)
        if secret is not None:
            present(socket, T0, secret)
        socket.connect(server._binding.url)
        yield socket


def test_who_does_not_know_the_secret_is_turned_away(transport: Open, caplog: pytest.LogCaptureFixture) -> None:
    server = transport(S0)
    with visitor(server, b"a", None) as silent, visitor(server, b"b", "guess") as guessing:
        for stranger in (silent, guessing):
            stranger.send_multipart([b"x"] * 100)
        assert server.receive(0.5) is None
    assert server._guard is not None
    assert server._guard.refused == 1  # the other one did not come so far
    assert server.traffic.drops.counts == {}
    assert "server 0 turns a visitor away that does not know the job's secret" in caplog.text


def test_who_is_not_of_the_job_is_not_heard_and_the_log_is_not_flooded(
    transport: Open, caplog: pytest.LogCaptureFixture
) -> None:
    server = transport(S0)
    with visitor(server, b"trainer 7", server._token) as stranger:
        for _ in range(500):
            stranger.send_multipart([b"hello", b"you"])
        zero = transport(T0)
        tell(zero, S0, Message(Hello("x")))
        assert heard(server)[0] == T0
        while server.receive(0.2) is not None:
            continue
    assert server.traffic.drops.counts == {("stranger", "stranger"): 500}
    assert [r.getMessage() for r in caplog.records] == [
        "server 0 drops a message of a stranger: it calls itself b'trainer 7'"
    ]


LIMITS = Limits({"w": ((2,), torch.float32)}, {"w": frozenset({"lr"})}, frozenset({"w"}), {"w": frozenset({T0})}, True)
ONES = torch.ones(2)
UNFIT = [
    (Message(Push("w", 1, 1.0, {"lr": 0.1}), torch.ones(3)), "malformed", "float32 of shape (3,); expected"),
    (Message(Push("v", 1, 1.0), ONES), "malformed", "Push of 'v': this job has no such channel"),
    (Message(Pull("v", 1)), "malformed", "Pull of 'v': this job has no such channel"),
    (Message(Push("w", 1, 1.0), ONES), "refused", "Push of 'w': its hypers are none; expected lr"),
    (Message(Push("w", 1, 1.0, {"lr": 0.1, "w": 0.0}), ONES), "refused", "its hypers are lr, w; expected lr"),
    (Message(Value("w", 1), ONES), "refused", "a Value of 'w', which trainer 1 does not send to this role"),
    (Message(Resume(3)), "refused", "a Resume, which trainer 1 does not send to this role"),
]


@pytest.mark.parametrize(("message", "reason", "said"), UNFIT, ids=[said for *_, said in UNFIT])
def test_what_does_not_fit_the_job_is_dropped_and_named_by_who_waits(
    transport: Open, message: Message, reason: str, said: str
) -> None:
    server, one = transport(S0, limit=LIMITS), transport(T1)
    tell(one, S0, message)
    tell(one, S0, Message(Push("w", 1, 1.0, {"lr": 0.1}), ONES))
    assert heard(server)[1].header == Push("w", 1, 1.0, {"lr": 0.1})
    assert server.traffic.drops.counts == {("trainer 1", reason): 1}
    late = server.late([T1])
    assert "; server 0: it dropped 1 message of trainer 1, the last: " in late
    assert said in late


def test_a_message_of_too_many_frames_is_dropped_whole(transport: Open) -> None:
    server = transport(S0, limit=LIMITS)
    with visitor(server, identity(T1, server._token), server._token) as member:
        member.send_multipart([b"x"] * 100_000)
        member.send_multipart([bytes(frame) for frame in encode(Message(Leave(3)))])
        assert heard(server)[1].header == Leave(3)
    assert server.traffic.drops.counts == {("trainer 1", "oversized"): 1}
    assert "it has 100000 frames; expected at most 2" in server.late([])


def test_a_trainer_takes_values_of_their_server_only(transport: Open) -> None:
    server = transport(S0)
    zero = transport(T0, limit=Limits({"w": ((2,), torch.float32)}, given={"w": frozenset({S1})}))
    tell(zero, S0, Message(Hello("x")))
    heard(server)
    for message in (Message(Value("w", 1), ONES), Message(Leave(1)), Message(Push("w", 1, 1.0), ONES)):
        tell(server, T0, message)
    assert zero.receive(0.3) is None
    assert zero.traffic.drops.counts == {("server 0", "refused"): 3}


def test_a_server_that_is_missing_is_named(transport: Open) -> None:
    transport(S0, servers=2)
    with pytest.raises(DeadlineExceeded, match=r"trainer 0 has waited 0\.1 s for server 1; server 0 "):
        transport(T0, servers=2)


def test_the_launchers_word_ends_a_wait(rendezvous: Rendezvous, transport: Open) -> None:
    server = transport(S0)
    rendezvous.clients()[1].set(FAILED, "trainer 1 (pid 7) was ended by SIGKILL")
    with pytest.raises(PeerLost, match=r"server 0 cannot go on: trainer 1 \(pid 7\) was ended by SIGKILL"):
        server.receive(5)


def test_across_hosts_a_server_listens_on_the_address_that_it_was_given(place: Membership) -> None:
    there = dataclasses.replace(place, one_host=False, address="127.0.0.1")
    rendezvous = Rendezvous(there, 0)
    server = SocketTransport(S0, rendezvous, 1)
    zero = SocketTransport(T0, rendezvous, 1)
    assert server._binding is not None
    assert server._binding.url.startswith("tcp://127.0.0.1:")
    tell(zero, S0, Message(Hello("x")))
    assert heard(server)[1].header == Hello("x")
    zero.close()
    server.close()


def test_an_address_that_others_cannot_reach_is_refused(place: Membership) -> None:
    at = StoreAddress("127.0.0.1", 9, Host.NOBODY)
    there = dataclasses.replace(place, one_host=False, host="localhost", store=at)
    with pytest.raises(ClusterError, match="set SYNCWRIGHT_HOST to this host's address"):
        SocketTransport(S0, Rendezvous(there, 0), 1)


def test_an_embedded_server_is_a_thread_of_the_process(folder: Path) -> None:
    rendezvous = Rendezvous(membership({}), 0)
    with zmq.Context() as context:

        def serve() -> None:
            server = SocketTransport(S0, rendezvous, 1, context=context)
            peer, message = heard(server)
            tell(server, peer, Message(Value("w", 1), message.tensor))
            server.close()

        thread = threading.Thread(target=serve)
        thread.start()
        zero = SocketTransport(T0, rendezvous, 1, context=context)
        tell(zero, S0, Message(Push("w", 0, 1.0), torch.ones(2)))
        assert heard(zero)[1].header == Value("w", 1)
        ones = torch.ones(2)
        assert zero.all_reduce(ones, "ones").done()
        zero.broadcast(ones, "ones")
        assert ones.tolist() == [1, 1]
        assert list(folder.iterdir()) == []
        zero.close()
        thread.join()


@pytest.mark.processes
def test_processes_exchange_and_sum(environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(str(JOB), ["exchange"], trainers=2, servers=1, environment=environment) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "[trainer 0] sum [3.0, 3.0, 3.0] first 5",
        "[trainer 1] sum [3.0, 3.0, 3.0] first 5",
    ]


@pytest.mark.processes
def test_a_killed_server_is_named(environment: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert launch(str(JOB), ["lose"], 1, 1, environment=environment, patience=Patience(end=8)) == 128 + 9
    assert time.monotonic() - begun < 60
    said = capsys.readouterr()
    assert "server 0 (pid " in said.err
    assert "was ended by SIGKILL" in said.err
    assert "PeerLost: trainer 0 " in said.out
    assert "server 0 (pid " in said.out.splitlines()[-1]
