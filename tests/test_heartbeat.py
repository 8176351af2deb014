"""Heartbeats: an error names who is silent, gone or behind."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable

import pytest

from syncwright.runtime.heartbeat import Heartbeat
from syncwright.runtime.membership import membership
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.rendezvous import FAILED, Rendezvous

T0, T1 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1)
S0 = Address(Kind.SERVER, 0)


def until(condition: Callable[[], object], seconds: float = 2.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def rendezvous() -> Rendezvous:
    place = dataclasses.replace(membership({}), host="here")
    return Rendezvous(place, 0)


def test_late_names_who_is_behind_gone_or_was_never_there(rendezvous: Rendezvous) -> None:
    zero, one = (Heartbeat(me, rendezvous, every=0.01) for me in (T0, T1))
    one.progress(3, "push fc.weight")
    zero.progress(5, "pull fc.weight")
    until(lambda: "push fc.weight" in zero.late([T1]))
    pid = os.getpid()
    assert zero.late([T1]) == (
        f"trainer 1 (pid {pid} on here) is behind, at step 3, `push fc.weight`; trainer 0 is at step 5"
    )
    assert zero.late([S0]) == "server 0 has never been heard of"
    one.progress(5, "push fc.bias")
    until(lambda: "fc.bias" in zero.late([T1]))
    assert zero.late([T1]) == "all are alive: trainer 1 is at step 5, `push fc.bias`"
    assert not zero.ended(T1)
    one.close()
    one.close()
    assert zero.ended(T1)
    assert zero.late([T1]) == f"trainer 1 (pid {pid} on here) has ended, at step 5, `push fc.bias`"
    zero.close()


def test_a_role_that_stops_beating_is_silent(rendezvous: Rendezvous) -> None:
    zero = Heartbeat(T0, rendezvous, every=0.01, silent=0.2)
    one = Heartbeat(T1, rendezvous, every=60.0)
    until(lambda: "silent" in zero.late([T1]))
    assert "has been silent for 0 s, last at step 0, `start`" in zero.late([T1])
    zero.close()
    one.close()


def test_the_clock_of_another_host_is_not_trusted(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = Heartbeat(T0, rendezvous, every=0.02)
    there = Rendezvous(dataclasses.replace(rendezvous.place, host="there"), 0)
    there._root = rendezvous._root
    one = Heartbeat(T1, there, every=0.01)
    until(lambda: "all are alive" in zero.late([T1]))
    now = time.time
    monkeypatch.setattr(zero, "_old", lambda beat: now() + 1000 - beat.seconds > 5)
    assert "all are alive" in zero.late([T1])
    one.close()
    zero.close()


def test_who_beats_no_more_is_gone(rendezvous: Rendezvous) -> None:
    zero, one = Heartbeat(T0, rendezvous, every=0.01), Heartbeat(T1, rendezvous, every=60.0)
    until(lambda: "all are alive" in zero.late([T1]))
    assert zero.lost([T1]) == f"trainer 1 (pid {os.getpid()} on here) is gone, last at step 0, `start`"
    assert one.failed is None
    one.close()
    two = Heartbeat(T1, rendezvous, every=0.001)
    until(lambda: "all are alive" in zero.late([T1]))
    assert zero.lost([T1]) == "trainer 1 cannot be reached, but still beats"
    two.close()
    zero.close()


def test_what_the_launcher_says_of_a_failed_role_is_heard(rendezvous: Rendezvous) -> None:
    zero = Heartbeat(T0, rendezvous, every=0.01)
    assert zero.failed is None
    rendezvous.clients()[1].set(FAILED, "server 0 (pid 7) was killed by SIGKILL")
    until(lambda: zero.failed)
    assert zero.failed == "server 0 (pid 7) was killed by SIGKILL"
    zero.close()


def test_a_wait_goes_on_while_a_peer_compiles_and_as_long_again_after_it(rendezvous: Rendezvous) -> None:
    zero, one = (Heartbeat(me, rendezvous, every=0.01) for me in (T0, T1))
    assert zero.wait([T1], 0.0).is_over(), "nobody compiles"
    with one.busy("compiling the step"):
        until(lambda: "compiling" in zero.late([T1]))
        wait = zero.wait([T1], 0.0)
        assert not wait.is_over()
        assert zero.wait([S0], 0.0).is_over(), "nobody who is waited for compiles"
        said = rf"trainer 1 \(pid {os.getpid()} on here\) has been compiling the step for \d+ s"
        assert re.fullmatch(f"; {said}", wait.doing())
        assert re.fullmatch(f"{said}, at step 0, `start`", zero.late([T1]))
    until(lambda: wait.doing() == "")
    assert zero._allowed([T1], 60.0) > 50.0, "60 s from the end of the compilation"
    assert zero._allowed([T1], 0.0) <= 0.0
    one.close()
    assert zero._allowed([T1], 60.0) == 0.0, "it has ended"
    zero.close()


def test_a_compilation_may_take_only_so_long(rendezvous: Rendezvous) -> None:
    zero, one = Heartbeat(T0, rendezvous, every=0.01, longest=0.05), Heartbeat(T1, rendezvous, every=0.01)
    with one.busy("capturing the step"):
        until(lambda: "more than" in zero.late([T1]))
        wait = zero.wait([T1], 0.0)
        assert wait.is_over()
        assert re.search(r"has been capturing the step for \d+ s \(more than Deadlines.compile, 0.05 s\)", wait.doing())
    one.close()
    zero.close()


def test_who_beats_no_more_is_not_waited_for_though_it_said_that_it_compiles(rendezvous: Rendezvous) -> None:
    zero, one = Heartbeat(T0, rendezvous, every=0.01, silent=0.1), Heartbeat(T1, rendezvous, every=0.01)
    with one.busy("compiling the step"):
        until(lambda: "compiling" in zero.late([T1]))
        one._stop.set()  # as when its process is stopped
        wait = zero.wait([T1], 0.0)
        assert not wait.is_over()
        until(wait.is_over)
    zero.close()
