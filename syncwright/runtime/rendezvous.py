"""How the roles of a job find each other: the store they share, and who listens where."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import msgspec
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from syncwright.errors import ClusterError, DeadlineExceeded, PeerLost
from syncwright.runtime.deadlines import Wait
from syncwright.runtime.membership import Host, Membership
from syncwright.runtime.messages import Address, Kind

FAILED = "failed"
"""The key where a role says that it cannot go on (in its generation), or the launcher that one ended badly (above)."""

SURVIVES = "survives"
"""The key where a job says that it goes on when a trainer is lost."""

LOST = "lost"
"""The key where the launcher says which trainers are lost, of a job that goes on: their numbers, with spaces between."""

STAY = "Expected every role to stay until the job ends. See its output."


class Endpoint(msgspec.Struct, frozen=True):
    """What a role publishes: where it listens (a server), and the secret that its visitors must know."""

    url: str = ""
    token: str = ""


class Rendezvous:
    """Changes: holds the job's store. One per process and `generation`; every transport opens its own client.

    generation: the n-th job of this script, counted from 0 in the same order in every process.
    """

    def __init__(self, place: Membership, generation: int, seconds: float = 60.0) -> None:
        self.place = place
        self.generation = generation
        self.seconds = seconds
        self._root: Store | None = None
        if place.store.hosted_by is Host.NOBODY:
            self._root = HashStore()
        elif place.store.hosted_by is Host.TRAINER_0 and place.me == Address(Kind.TRAINER, 0):
            self._root = self._open(is_master=True)

    def client(self) -> Store:
        """A connection of its own to this generation's part of the store."""
        return self.clients()[0]

    def clients(self) -> tuple[Store, Store]:
        """One new connection: to this generation's part of the store, and to what all generations share."""
        connection = self._connect()
        shared = f"syncwright/{self.place.attempt}"
        return PrefixStore(f"{shared}/{self.generation}", connection), PrefixStore(shared, connection)

    def _connect(self) -> Store:
        if isinstance(self._root, HashStore):
            return self._root
        return self._open(is_master=False)

    def _open(self, is_master: bool) -> TCPStore:
        at = self.place.store
        try:
            return TCPStore(
                at.host,
                at.port,
                is_master=is_master,
                timeout=timedelta(seconds=self.seconds),
                wait_for_workers=False,
                multi_tenant=is_master,
            )
        except (DistNetworkError, DistStoreError) as error:
            if is_master:
                raise ClusterError(
                    f"{self.place.me} cannot host the job's store at {at}: {_cause(error)}. Expected a free port on "
                    "this host. End the process that listens there, or set MASTER_PORT to another port for all roles."
                ) from error
            raise DeadlineExceeded(
                f"{self.place.me} could not reach the job's store at {at} within {self.seconds:g} s. Expected the "
                "process that hosts it to be alive, and its port open. See the output of the launcher (or torchrun, or "
                "trainer 0)."
            ) from error


def _cause(error: Exception) -> str:
    """The system's own word, without the place in torch's source."""
    return "the port is taken" if "EADDRINUSE" in str(error) else str(error).split("\n")[0].rstrip(".")


def tell_failure(stores: Sequence[Store], reason: str) -> None:
    """Tells all roles of a generation (the first store) why one of them cannot go on, unless a reason is known."""
    with suppress(DistNetworkError, DistStoreError):
        if failure(stores) is None:
            stores[0].compare_set(FAILED, "", reason)


def failure(stores: Sequence[Store]) -> str | None:
    """Why some role cannot go on, if one has said so, or the launcher of one."""
    for store in stores:
        if store.check([FAILED]):
            return store.get(FAILED).decode()
    return None


def cannot_go_on(me: Address, why: str) -> PeerLost:
    """What `me` raises when a role has told `why` it cannot go on: the same words, by whichever way they came."""
    return PeerLost(f"{me} cannot go on: {why.rstrip('.')}. {STAY}")


def publish(store: Store, me: Address, endpoint: Endpoint) -> None:
    """Tells everyone that `me` is there and, for a server, where it listens."""
    with reaching_the_store(me):
        store.set(f"present/{me}", msgspec.json.encode(endpoint).decode())


def look_up(
    store: Store,
    me: Address,
    wanted: Sequence[Address],
    everyone: Sequence[Address],
    wait: Wait,
    watch: Callable[[], None] = lambda: None,
) -> dict[Address, Endpoint]:
    """Where each of `wanted` listens; waits until all have said so.

    everyone: all roles of the job, for the error that says who is missing and who is not.
    watch: raises when a role is known to be lost.
    """
    pause = 0.005
    found: dict[Address, Endpoint] = {}
    with reaching_the_store(me):
        while True:
            for peer in wanted:
                if peer not in found and store.check([f"present/{peer}"]):
                    found[peer] = msgspec.json.decode(store.get(f"present/{peer}"), type=Endpoint)
            if len(found) == len(set(wanted)):
                return found
            if wait.is_over():
                raise DeadlineExceeded(_who_is_missing(store, me, wanted, everyone, wait))
            watch()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def names(peers: Sequence[Address]) -> str:
    """`server 0 and trainers 0, 1`."""
    groups = []
    for kind in (Kind.SERVER, Kind.TRAINER):
        ranks = sorted({peer.rank for peer in peers if peer.kind is kind})
        if ranks:
            groups.append(f"{kind}{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}")
    return " and ".join(groups) or "nobody"


@contextmanager
def reaching_the_store(me: Address) -> Iterator[None]:
    """Says what it means when the store does not answer: the process that hosts it has ended."""
    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        raise PeerLost(
            f"{me} lost the job's store. Expected the launcher (or torchrun's agent, or trainer 0), which hosts it, to "
            "run until the job ends. See its output."
        ) from error


def _who_is_missing(
    store: Store, me: Address, wanted: Sequence[Address], everyone: Sequence[Address], wait: Wait
) -> str:
    here = [peer for peer in everyone if store.check([f"present/{peer}"])]
    missing = [peer for peer in wanted if peer not in here]
    it, its = ("it", "its") if len(missing) == 1 else ("them", "their")
    return (
        f"{me} has waited {wait.seconds:g} s for {names(missing)}; {names(here)} {'has' if len(here) == 1 else 'have'} "
        f"come{wait.doing()}. Expected {it} to come to {its} first trainer.step(...) in the same script. See the "
        "output of what is missing; if it is only slow, give a longer Deadlines.join."
    )
