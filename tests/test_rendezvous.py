"""Roles find each other, and say who is missing when they do not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from syncwright.errors import ClusterError, DeadlineExceeded
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.membership import Host, membership
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import Endpoint, Rendezvous, look_up, names, publish

T0, T1 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1)
S0, S1, S2 = (Address(Kind.SERVER, rank) for rank in range(3))

LAUNCHER = {
    "SYNCWRIGHT_ROLE": "server",
    "SYNCWRIGHT_RANK": "1",
    "SYNCWRIGHT_TRAINERS": "4",
    "SYNCWRIGHT_SERVERS": "2",
    "SYNCWRIGHT_STORE": "127.0.0.1:4000",
    "SYNCWRIGHT_SOCKETS": "/run/job",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_without_a_launcher_a_process_is_the_whole_job() -> None:
    place = membership({})
    assert (place.me, place.trainers, place.servers, place.one_host) == (T0, 1, 0, True)
    assert place.alone
    assert place.store.hosted_by is Host.NOBODY
    assert place.hosted(2) == [S0, S1]


def test_under_the_launcher_roles_are_given() -> None:
    place = membership(LAUNCHER)
    assert (place.me, place.trainers, place.servers, place.one_host) == (S1, 4, 2, True)
    assert (str(place.store), place.store.hosted_by) == ("127.0.0.1:4000", Host.OTHER)
    assert place.sockets == Path("/run/job")
    assert place.hosted(2) == [S1]
    assert place.hosted(1) == []
    with pytest.raises(ClusterError, match=r"found 2 in the job, expected at least 3.* with --servers 3"):
        place.hosted(3)
    assert not membership({**LAUNCHER, "SYNCWRIGHT_STORE": "10.0.0.1:4000"}).one_host


def test_under_torchrun_all_are_trainers_and_host_servers() -> None:
    place = membership(TORCHRUN)
    assert (place.me, place.trainers, place.servers, place.local_rank) == (Address(Kind.TRAINER, 3), 4, 0, 1)
    assert (place.store.hosted_by, place.attempt, place.one_host) == (Host.OTHER, "2", False)
    assert place.hosted(3) == []
    assert membership({**TORCHRUN, "RANK": "0"}).hosted(5) == [S0, Address(Kind.SERVER, 4)]
    assert membership({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}).one_host
    by_hand = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert membership(by_hand).store.hosted_by is Host.TRAINER_0
    assert not membership(by_hand).one_host
    assert membership({**by_hand, "MASTER_ADDR": "127.0.0.1"}).one_host
    assert membership({**by_hand, "SYNCWRIGHT_HOST": "10.0.0.1"}).address == "10.0.0.1"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({**LAUNCHER, "SYNCWRIGHT_ROLE": "chief"}, "'chief'; expected trainer or server"),
        ({**LAUNCHER, "SYNCWRIGHT_RANK": "2"}, "this process is server 2, but the job has 2 servers"),
        ({**LAUNCHER, "SYNCWRIGHT_RANK": "-1"}, "SYNCWRIGHT_RANK is '-1'"),
        ({**LAUNCHER, "SYNCWRIGHT_TRAINERS": "0"}, "at least 1"),
        ({**LAUNCHER, "SYNCWRIGHT_STORE": "4000"}, "expected host:port"),
        ({**LAUNCHER, "SYNCWRIGHT_STORE": ""}, "SYNCWRIGHT_STORE is not set"),
        ({**TORCHRUN, "RANK": "4"}, "this process is trainer 4"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        membership(environment)


def test_servers_are_found_by_those_who_look_in_the_same_generation() -> None:
    first, place = Rendezvous(membership({}), 0), membership({})
    publish(first.client(), S0, Endpoint("inproc://0", "secret"))
    assert look_up(first.client(), T0, [S0], [T0, S0], Wait(1)) == {S0: Endpoint("inproc://0", "secret")}
    with pytest.raises(DeadlineExceeded):
        look_up(Rendezvous(place, 1).client(), T0, [S0], [T0, S0], Wait(0.02))


def test_the_error_names_who_is_missing() -> None:
    store = Rendezvous(membership({}), 0).client()
    for peer in (S0, T0, T1):
        publish(store, peer, Endpoint())
    with pytest.raises(DeadlineExceeded) as caught:
        look_up(store, T0, [S0, S1], [T0, T1, S0, S1], Wait(0.02))
    said = "trainer 0 has waited 0.02 s for server 1; server 0 and trainers 0, 1 have come."
    assert str(caught.value).startswith(said)


def test_a_store_that_is_not_there_is_named() -> None:
    place = membership({**LAUNCHER, "SYNCWRIGHT_STORE": "127.0.0.1:9"})
    with pytest.raises(DeadlineExceeded, match=r"could not reach the job's store at 127\.0\.0\.1:9 within 0\.2 s"):
        Rendezvous(place, 0, seconds=0.2).client()


def test_trainer_0_hosts_the_store_when_nobody_else_does() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    by_hand = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    zero = Rendezvous(membership({**by_hand, "RANK": "0"}), 0)
    one = Rendezvous(membership({**by_hand, "RANK": "1"}), 0)
    publish(zero.client(), T0, Endpoint("x"))
    assert look_up(one.client(), T1, [T0], [T0, T1], Wait(1)) == {T0: Endpoint("x")}


def test_names() -> None:
    assert names([]) == "nobody"
    assert names([T1, S2, T0]) == "server 2 and trainers 0, 1"
