"""What /metrics shows, in the format of Prometheus."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from voidbus.actors.messages.actor import SystemStatus
from voidbus.actors.messages.runs import RunStateCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Counts of the gateway itself; the rest is asked for when it is shown."""

    def __init__(self, release: str) -> None:
        self._registry = CollectorRegistry()
        labels = ("route", "status")
        self._requests = Counter(
            "voidbus_http_requests", "Requests served.", labels, registry=self._registry
        )
        self._seconds = Histogram(
            "voidbus_http_request_seconds",
            "Time to the beginning of an answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._known: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        about = Gauge("voidbus_info", "The release.", ("release",), registry=self._registry)
        about.labels(release).set(1)

    def served(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        known = self._known.get((route, status))
        if known is None:
            # To look labels up costs three times what counting does.
            known = self._known[route, status] = (
                self._requests.labels(route, str(status)),
                self._seconds.labels(route),
            )
        known[0].inc()
        known[1].observe(seconds)

    def show(
        self,
        *,
        runs: RunStateCounts | None,
        system: SystemStatus | None,
        followers: int,
    ) -> bytes:
        """All of it; what could not be asked for is left out."""
        asked = CollectorRegistry()
        asked.register(_Asked(runs, system, followers))
        return generate_latest(self._registry) + generate_latest(asked)


class _Asked(Collector):
    def __init__(
        self,
        runs: RunStateCounts | None,
        system: SystemStatus | None,
        followers: int,
    ) -> None:
        self._runs = runs
        self._system = system
        self._followers = followers

    def collect(self) -> Iterable[Metric]:
        yield _gauge("voidbus_http_followers", "Clients that follow a run.", self._followers)
        yield _gauge("voidbus_process_resident_bytes", "Memory of the supervisor.", _resident())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = CounterMetricFamily(
            "voidbus_process_cpu_seconds", "Processor time of the supervisor."
        )
        cpu.add_metric((), usage.ru_utime + usage.ru_stime)
        yield cpu
        if self._runs is not None:
            runs = GaugeMetricFamily("voidbus_runs", "Runs by status.", labels=("status",))
            for status, count in sorted(self._runs.counts.items()):
                runs.add_metric((status,), count)
            yield runs
            yield _gauge("voidbus_machines_active", "Machines that are up.", self._runs.machines)
            yield _gauge("voidbus_stages_active", "Stages that run.", self._runs.stages)
        if self._system is not None:
            yield from _of_system(self._system)


def _of_system(system: SystemStatus) -> Iterable[Metric]:
    waiting = GaugeMetricFamily("voidbus_mailbox_waiting", "Messages that wait.", labels=("actor",))
    handled = CounterMetricFamily("voidbus_messages_handled", "Messages taken.", labels=("actor",))
    restarts = CounterMetricFamily("voidbus_actor_restarts", "Restarts.", labels=("actor",))
    for actor in system.actors:
        waiting.add_metric((actor.path,), actor.depth + actor.control_depth)
        handled.add_metric((actor.path,), actor.handled)
        restarts.add_metric((actor.path,), actor.restarts)
    counters = CounterMetricFamily("voidbus_bus_events", "What the bus counts.", labels=("event",))
    for name, count in sorted(system.counters.items()):
        counters.add_metric((name,), count)
    yield from (waiting, handled, restarts, counters)
    yield _gauge("voidbus_process_threads", "Threads of the supervisor.", system.threads)


def _gauge(name: str, text: str, value: float) -> Metric:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric((), value)
    return gauge


def _resident() -> int:
    """proc(5), statm: pages in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
