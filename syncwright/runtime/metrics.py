"""Metrics: a role's numbers over HTTP, in the form that Prometheus reads (docs/metrics.md says what each is)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch.distributed import Store

from syncwright.runtime.endpoint import own_address
from syncwright.runtime.guard import Guard
from syncwright.runtime.membership import Membership
from syncwright.runtime.messages import Address, Kind, Pull, Push, Value
from syncwright.runtime.traffic import Flow, Traffic

LOOPBACK = "127.0.0.1"

Row = tuple[dict[str, str], float]

log = logging.getLogger(__name__)


def url_key(me: Address) -> str:
    """Where the job's store says at which url a role's numbers are."""
    return f"metrics/{me}"


class Metrics:
    """Changes: serves HTTP in a thread of its own until it is closed; reads `traffic` whenever somebody asks.

    Listens at a port that the system chooses, on this host only where all roles are on it, and tells where in `store`.
    Every role has a registry of its own: servers may share a process with a trainer.
    """

    def __init__(self, traffic: Traffic, guard: Guard | None, place: Membership, store: Store) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(Collected(traffic, guard))  # type: ignore[arg-type]
        host = LOOPBACK if place.one_host else own_address(place)
        self._server, self._thread = start_http_server(0, host, registry)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        store.set(url_key(traffic.me), self.url)
        log.info("the metrics of %s are at %s", traffic.me, self.url)

    def close(self) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Collected:
    """A role's numbers as they are when they are asked for (a collector of prometheus_client's)."""

    def __init__(self, traffic: Traffic, guard: Guard | None) -> None:
        self._traffic, self._guard = traffic, guard
        self._me = {"role": str(traffic.me)}

    def collect(self) -> Iterator[object]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for family, name, about, rows in (
            *((CounterMetricFamily, *each) for each in self._counters()),
            *((GaugeMetricFamily, *each) for each in self._gauges()),
        ):
            made = family(name, about, labels=())
            for labels, value in rows:
                made.add_sample(name + "_total" * (family is CounterMetricFamily), {**self._me, **labels}, value)
            yield made

    def _counters(self) -> Iterator[tuple[str, str, list[Row]]]:
        traffic = self._traffic
        yield "syncwright_steps", "Steps that this role has begun or finished.", [({}, traffic.step)]
        yield "syncwright_pushes", "Contributions that a trainer sent to a server.", self._crossing(Push)
        yield "syncwright_pulls", "Values that a trainer asked a server for.", self._crossing(Pull)
        for way, done in (("received", "taken in"), ("sent", "sent")):
            rows = [
                ({"peer": str(peer), "kind": kind.__name__.lower()}, count.nbytes)
                for peer, flow in traffic.flows.items()
                for kind, count in getattr(flow, way).items()
                if count.messages
            ]
            yield f"syncwright_{way}_bytes", f"Bytes of messages that were {done}.", rows
        waits = [({"peer": str(peer)}, flow.waited) for peer, flow in traffic.flows.items() if flow.waited]
        waits.append(({"peer": "anyone"}, traffic.waited_for_anyone))
        yield "syncwright_wait_seconds", "Seconds of waiting for messages of a role.", waits
        drops = [({"peer": who, "reason": why}, float(n)) for (who, why), n in list(traffic.drops.counts.items())]
        yield "syncwright_dropped_messages", "Messages that were no message of this job.", drops
        if self._guard is not None:
            refused = [({}, float(self._guard.refused))]
            yield "syncwright_refused_connections", "Visitors that did not know the job's secret.", refused

    def _gauges(self) -> Iterator[tuple[str, str, list[Row]]]:
        traffic = self._traffic
        yield (
            "syncwright_step_wait_seconds",
            "Seconds that the last step waited for messages.",
            [({}, traffic.step_waited)],
        )
        lags = [({"peer": str(peer)}, float(lag)) for peer, lag in traffic.lags().items()]
        yield "syncwright_lag_steps", "Steps that a trainer is behind the foremost, by its pushes.", lags
        parked = [({"peer": str(peer)}, float(_parked(flow))) for peer, flow in self._trainers()]
        yield "syncwright_parked_pulls", "Pulls that a server has not answered yet.", parked
        waiting = self._awaited() if traffic.is_waiting else []
        yield "syncwright_waiting", "1 for whom this role waits now.", [({"peer": str(peer)}, 1.0) for peer in waiting]

    def _trainers(self) -> list[tuple[Address, Flow]]:
        """The trainers that this role serves."""
        if self._traffic.me.kind is Kind.TRAINER:
            return []
        return [(peer, flow) for peer, flow in self._traffic.flows.items() if peer.kind is Kind.TRAINER]

    def _crossing(self, kind: type) -> list[Row]:
        """How many messages of a kind a trainer has sent, or a server taken in, by the other."""
        if self._traffic.me.kind is Kind.SERVER:
            return [({"peer": str(peer)}, flow.received[kind].messages) for peer, flow in self._trainers()]
        servers = [(peer, flow) for peer, flow in self._traffic.flows.items() if peer.kind is Kind.SERVER]
        return [({"peer": str(peer)}, flow.sent[kind].messages) for peer, flow in servers]

    def _awaited(self) -> list[Address]:
        """Of a trainer the one that has what it waits for; of a server the trainers that are behind the foremost."""
        if self._traffic.me.kind is Kind.TRAINER:
            return [] if self._traffic.awaited is None else [self._traffic.awaited]
        return [peer for peer, lag in self._traffic.lags().items() if lag]


def _parked(flow: Flow) -> int:
    """Every pull is answered by one value."""
    return flow.received[Pull].messages - flow.sent[Value].messages
