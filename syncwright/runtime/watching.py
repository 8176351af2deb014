"""Watching: what a running job's roles say of themselves, read from its store and their metrics by somebody outside."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import msgspec
from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, TCPStore

from syncwright.errors import RequestError
from syncwright.runtime.heartbeat import ROLES, Beat, Roles, beat_of
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.metrics import url_key

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 2.0


class JobEnded(Exception):
    """The job's store is gone."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A role's metrics (docs/metrics.md), added up over its peers. Those that count since its start: `Rates` compares two.

    waiting  for whom the role waits now
    lags     of each trainer, by the pushes that came here
    """

    steps: float
    pushes: float
    pulls: float
    received_nbytes: float
    sent_nbytes: float
    dropped: float
    waiting: tuple[str, ...]
    lags: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Seen:
    """One role at one moment of this process's clock; without numbers where the job serves none."""

    seconds: float
    beat: Beat
    numbers: Numbers | None


class Watch:
    """Changes: a connection to the store of the job at `HOST:PORT`. `RequestError` if none is there."""

    def __init__(self, at: str) -> None:
        host, _, port = at.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise RequestError(f"--at: found {at!r}, expected HOST:PORT of a job's store, such as 127.0.0.1:29500.")
        self.at = at
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            patience = timedelta(seconds=CONNECT_SECONDS)
            self._store = TCPStore(
                host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=patience
            )
        except (DistNetworkError, DistStoreError) as error:
            raise RequestError(
                f"--at: found no job's store at {at}. Expected a job that runs. See who starts it: `syncwright run` tells "
                "`syncwright top` by itself, under torchrun it is MASTER_ADDR:MASTER_PORT."
            ) from error

    def look(self) -> dict[Address, Seen]:
        """All roles that have said something, servers first. `JobEnded` if the store is gone."""
        try:
            return self._look()
        except (DistNetworkError, DistStoreError) as error:
            raise JobEnded from error

    def _look(self) -> dict[Address, Seen]:
        latest = next(n for n in count() if not self._store.check([f"syncwright/{n + 1}/{ROLES}"]))
        shared = PrefixStore(f"syncwright/{latest}", self._store)
        if not shared.check([ROLES]):
            return {}
        roles = msgspec.json.decode(shared.get(ROLES), type=Roles)
        store, found = PrefixStore(str(roles.generation), shared), {}
        servers = next(n for n in count() if beat_of(store, Address(Kind.SERVER, n)) is None)
        everyone = [(Kind.SERVER, n) for n in range(servers)] + [(Kind.TRAINER, n) for n in range(roles.trainers)]
        for me in (Address(*each) for each in everyone):
            if (beat := beat_of(store, me)) is not None:
                url = store.get(url_key(me)).decode() if store.check([url_key(me)]) else None
                numbers = None if url is None or beat.ended else self._numbers(url)
                found[me] = Seen(time.monotonic(), beat, numbers)
        return found

    def _numbers(self, url: str) -> Numbers | None:
        """None if the role has ended meanwhile."""
        try:
            with self._http.open(url, timeout=ANSWER_SECONDS) as answer:
                return numbers_of(answer.read().decode())
        except OSError:
            return None


def numbers_of(text: str) -> Numbers:
    """From the text that a role serves."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(name: str) -> float:
        return sum(sample.value for sample in samples if sample.name == f"syncwright_{name}_total")

    return Numbers(
        *map(total, ("steps", "pushes", "pulls", "received_bytes", "sent_bytes", "dropped_messages")),
        waiting=tuple(sample.labels["peer"] for sample in samples if sample.name == "syncwright_waiting"),
        lags={sample.labels["peer"]: int(sample.value) for sample in samples if sample.name == "syncwright_lag_steps"},
    )
