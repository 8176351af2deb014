"""What roles count, what they serve of it, and what `syncwright top` makes of that."""

from __future__ import annotations

import logging
import os
import urllib.request

import pytest
import torch

import syncwright
from syncwright.errors import RequestError
from syncwright.runtime.announce import Announced, announce, announced
from syncwright.runtime.heartbeat import Beat
from syncwright.runtime.membership import METRICS, membership
from syncwright.runtime.messages import Address, Hello, Kind, Leave, Pull, Push, Value
from syncwright.runtime.traffic import Seldom, Traffic
from syncwright.runtime.watching import Numbers, Seen, Watch, numbers_of
from syncwright.view.tables import plain
from syncwright.view.top import HOW_TO_KNOW, notes, show_top, state, table_of

T0, T1, S0 = Address(Kind.TRAINER, 0), Address(Kind.TRAINER, 1), Address(Kind.SERVER, 0)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def served(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        return answer.read().decode()


def test_a_trainer_that_has_not_pushed_is_not_behind_and_one_that_left_neither():
    traffic = Traffic(S0, [T0, T1, S0])
    assert traffic.lags() == {}
    traffic.received(T0, Push("w", 5, 1.0), [b"1234", b"56"])
    assert traffic.lags() == {T0: 0}
    traffic.received(T1, Push("w", 3, 1.0), [b"1234"])
    assert traffic.lags() == {T0: 0, T1: 2}
    traffic.received(T0, Leave(6), [b"1"])
    assert traffic.lags() == {T1: 0}
    assert traffic.flows[T0].received[Push].nbytes == 6


def test_waits_are_those_of_the_step_that_is_done():
    traffic = Traffic(T0, [T0, S0])
    traffic.wait_for(S0)
    for number, seconds in enumerate((2.0, 3.0)):
        traffic.progress(number)
        traffic.add_wait(seconds)
        traffic.progress(number)
    assert traffic.step_waited == 2.0
    traffic.progress(2)
    assert (traffic.step_waited, traffic.waited, traffic.flows[S0].waited) == (3.0, 5.0, 5.0)


def test_a_flood_is_one_line_of_the_log_which_later_says_how_many(caplog):
    seldom = Seldom(seconds=0.0)
    quiet = Seldom(seconds=1e9)
    for _ in range(3):
        seldom.warn("a", "all")
        quiet.warn("a", "first")
    quiet.warn("b", "first of another")
    assert [record.getMessage() for record in caplog.records] == ["all", "first", "all", "all", "first of another"]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_every_role_of_a_process_serves_its_own_numbers():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"plan": "parameter_server", "compile": False, "metrics": True}
    with syncwright.distribute(step, model, optimizer, **how) as trainer:
        for _ in range(4):
            trainer.step(torch.ones(2, 3), torch.ones(2, 1))
        store = trainer._meeting.rendezvous.client()
        urls = [store.get(f"metrics/{me}").decode() for me in (T0, S0)]
        assert all(url.startswith("http://127.0.0.1:") for url in urls)
        of_trainer, of_server = map(served, urls)
    pushes = numbers_of(of_trainer).pushes
    assert pushes == 4  # weight and bias together; alone, the loss stays here
    assert f'syncwright_pushes_total{{peer="server 0",role="trainer 0"}} {pushes}' in of_trainer
    assert f'syncwright_pushes_total{{peer="trainer 0",role="server 0"}} {pushes}' in of_server
    pushed = [
        line for line in of_trainer.splitlines() if line.startswith("syncwright_sent_bytes_total") and "push" in line
    ]
    taken = [
        line for line in of_server.splitlines() if line.startswith("syncwright_received_bytes_total") and "push" in line
    ]
    assert pushed[0].split()[-1] == taken[0].split()[-1]
    assert 'syncwright_lag_steps{peer="trainer 0",role="server 0"} 0.0' in of_server
    assert 'syncwright_wait_seconds_total{peer="server 0",role="trainer 0"} ' in of_trainer
    for url in urls:
        with pytest.raises(OSError, match="refused"):
            served(url)


@pytest.mark.parametrize(
    ("environment", "asked", "found"),
    [({}, None, False), ({METRICS: "1"}, None, True), ({METRICS: "1"}, False, False), ({}, True, True)],
)
def test_who_asks_for_metrics(environment, asked, found):
    assert membership(environment, asked).metrics is found


# --- top -----------------------------------------------------------------------------------------------


def seen(at: float, step: int, numbers: Numbers | None = None, **beat: object) -> Seen:
    said: dict = {"pid": 7, "host": "a", "step": step, "node": "pull w", "number": int(at), "seconds": 4e9 + at}
    return Seen(at, Beat(**{**said, "ended": False, **beat}), numbers)


def numbers(at: float, waiting: tuple[str, ...] = (), **lags: int) -> Numbers:
    lag = {name.replace("_", " "): steps for name, steps in lags.items()}
    return Numbers(10 * at, 40 * at, 20 * at, 3e6 * at, 1.5e6 * at, 2.0, waiting, lag)


def test_a_table_says_what_was_done_between_two_looks():
    looks = [
        {
            S0: seen(at, int(10 * at), numbers(at, ("trainer 1",), trainer_0=0, trainer_1=3), node="serve"),
            T0: seen(at, int(10 * at), numbers(at, ("server 0",))),
            T1: seen(at, int(9 * at), busy="compiling the step", busy_seconds=12.4),
        }
        for at in (2.0, 4.0)
    ]
    rows = [" ".join(line.split()) for line in plain(table_of("here:1", *looks)).splitlines()[4:]]
    assert rows == [
        "server 0 40 10.0 - 40.0 20.0 3.0 1.5 2 trainer 1 serve",
        "trainer 0 40 10.0 0 40.0 20.0 3.0 1.5 2 server 0 pull w",
        "trainer 1 36 9.0 3 - - - - - - compiling the step for 12 s",
    ]
    assert notes(looks[1]) == []
    assert notes({T1: looks[1][T1]}) == [HOW_TO_KNOW]
    assert notes({}) == ["No role has come to its first step yet."]


def test_who_is_silent_or_has_ended_is_shown_so():
    assert state(seen(0.0, 1, seconds=1.0).beat).startswith("silent for ")
    assert state(seen(0.0, 1, seconds=1.0, ended=True).beat) == "ended"


def test_jobs_of_this_host_are_found_while_their_launcher_lives(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, pid in (("a", 1 << 22), ("b", os.getpid())):
        folder = tmp_path / f"syncwright-{name}"
        folder.mkdir()
        announce(str(folder), Announced(pid, f"127.0.0.1:{len(name)}", f"{name}.py"))
    (tmp_path / "syncwright-c").mkdir()
    (tmp_path / "syncwright-c" / "job.json").write_text("{")
    assert [job.script for job in announced()] == ["b.py"]


def test_top_without_a_job_says_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RequestError, match="found 0 jobs of yours on this host, expected one: none"):
        show_top(None, None, once=True)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--at: found 'there', expected HOST:PORT"):
        Watch("there")


def test_what_is_counted_costs_no_more_for_a_large_tensor():
    """Frames are counted, not looked into: any that knows its length will do."""

    class Long:
        def __len__(self) -> int:
            return 4 << 20

    traffic = Traffic(T0, [T0, S0])
    for header in (Hello("x"), Pull("w", 1), Value("w", 1)):
        traffic.sent(S0, header, [b"abc", Long(), Long()])  # type: ignore[list-item]
        assert traffic.flows[S0].sent[type(header)].nbytes == 3 + (8 << 20)
