"""Cluster: facts in, and every contradiction refused with a sentence that says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncwright.cluster import Cluster, Host
from syncwright.errors import ClusterError


def test_trainers_and_servers_are_spread_evenly_in_order():
    cluster = Cluster.of(3, 1, hosts=("a", "b"))
    assert cluster.hosts == (Host("a", (0, 1), (0,)), Host("b", (2,), ()))
    assert [cluster.host_of_trainer(trainer) for trainer in range(3)] == ["a", "a", "b"]
    assert cluster.host_of_server(0) == "a"


@given(st.integers(1, 40), st.integers(0, 10), st.integers(1, 6))
def test_every_role_lies_on_one_host(trainers: int, servers: int, hosts: int):
    cluster = Cluster.of(trainers, servers, hosts=[f"h{host}" for host in range(hosts)])
    assert [trainer for host in cluster.hosts for trainer in host.trainers] == list(range(trainers))
    assert [server for host in cluster.hosts for server in host.servers] == list(range(servers))
    shares = [len(host.trainers) for host in cluster.hosts]
    assert max(shares) - min(shares) <= 1


def test_a_file_names_hosts(tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "hosts:\n"
        "  node0: {trainers: 2, servers: 1}\n"
        "  node1: {trainers: 1}\n"
        "device: cuda\n"
        "bandwidth_gbps: 100\n"
        "latency_us: 5\n"
    )
    hosts = (Host("node0", (0, 1), (0,)), Host("node1", (2,), ()))
    expected = Cluster(3, 1, hosts, device="cuda", bandwidth_gbps=100.0, latency_us=5.0)
    assert Cluster.from_yaml(path) == expected
    assert Cluster.from_yaml(str(path)) == expected


def test_a_file_gives_counts_on_one_host():
    assert Cluster.from_yaml("trainers: 2\nservers: 1\n") == Cluster.of(2, 1)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Cluster.of(1)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "GROUP_RANK": "0"}, Cluster.of(2)),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, Cluster.of(4, hosts=("node0", "node1"))),
        ({"SYNCWRIGHT_TRAINERS": "3", "SYNCWRIGHT_SERVERS": "2"}, Cluster.of(3, 2)),
        ({"SYNCWRIGHT_SERVERS": "2"}, Cluster.of(1, 2)),
        ({"WORLD_SIZE": "2", "SYNCWRIGHT_TRAINERS": "2", "SYNCWRIGHT_SERVERS": "1"}, Cluster.of(2, 1)),
    ],
)
def test_the_environment_that_is_passed_is_read(environment: dict[str, str], expected: Cluster):
    assert Cluster.from_environment(environment) == expected


def test_no_other_environment_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Cluster.from_environment({}).trainers == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE: found 'two', expected a whole number of at least 1. Correct it.",
        ),
        (
            {"WORLD_SIZE": "2", "SYNCWRIGHT_TRAINERS": "3"},
            "SYNCWRIGHT_TRAINERS: found 3, expected 2 as WORLD_SIZE says. Unset one.",
        ),
        (
            {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_WORLD_SIZE: found 2, expected a divisor of the 3 trainers: with uneven hosts the "
            "environment does not tell which trainer lies where. Write a cluster file.",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            "RANK: found 2, expected less than 2. Correct it or WORLD_SIZE.",
        ),
    ],
)
def test_a_contradicting_environment_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}$"):
        Cluster.from_environment(environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "servers: 1",
            "cluster: found neither, expected `trainers`, or `hosts`. Add a line such as `trainers: 2`.",
        ),
        ("trainers: 0", "cluster: Cluster.trainers: found 0, expected a whole number of at least 1."),
        (
            "trainers: 1\ndevice: tpu",
            "cluster, line 2, at device: found 'tpu', expected one of cpu, cuda. Correct it.",
        ),
        (
            "trainers: 1\nbandwidth_gbps: 0",
            "cluster: Cluster.bandwidth_gbps: found 0.0, expected a number above 0.",
        ),
        (
            "hosts: {a: {trainers: 1}}\ntrainers: 2",
            "cluster, line 2, at trainers: found `trainers`, expected no `trainers` beside `hosts`. "
            "Take this line out: the hosts say how many there are.",
        ),
        (
            "hosts:\n  a: {trainers: x}",
            "cluster, line 2, at hosts.a.trainers: found 'x', expected a whole number of at least 0. Correct it.",
        ),
        (
            "trainers: 1\nlatency: 3",
            "cluster, line 2, at latency: found the key 'latency', expected one of trainers, servers, hosts, "
            "device, bandwidth_gbps, latency_us. Did you mean 'latency_us'?",
        ),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str):
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}$"):
        Cluster.from_yaml(text)


def test_a_trainer_on_two_hosts_is_refused():
    message = (
        "hosts: found the trainers [0, 0], expected each of the 2 trainers, which count from 0, on exactly "
        "one host. Correct the lists, or use Cluster.of."
    )
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}$"):
        Cluster(2, 0, (Host("a", (0,)), Host("b", (0,))))


def test_hosts_of_one_name_and_no_hosts_are_refused():
    with pytest.raises(ClusterError, match="expected each name once"):
        Cluster.of(2, hosts=("a", "a"))
    with pytest.raises(ClusterError, match="expected at least one name"):
        Cluster.of(2, hosts=())
    with pytest.raises(ClusterError, match=r"server: found 0, expected one of the 0, which count from 0\."):
        Cluster.of(2).host_of_server(0)
