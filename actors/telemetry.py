"""The telemetry actor: samples of what runs use, in bounded rings, on request and as topics."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import ClassVar

from voidbus.actors.messages.telemetry import (
    GuestSample,
    GuestSamples,
    HostSample,
    ReadTelemetry,
    Sample,
    SamplesPublished,
    TelemetryPage,
    TrackRun,
    telemetry_topic,
)
from voidbus.actors.proc_sample import ProcessSampler
from voidbus.actors.runtime.actor import Actor, Place, Refuse, handles
from voidbus.actors.runtime.mailbox import Overflow
from voidbus.actors.runtime.process import ProcessGoneError, ProcessIdentity
from voidbus.transport.delivery import Delivery
from voidbus.transport.message import Message, Right

# Rings of runs that have ended are kept for this many of them.
_ENDED_RINGS = 256
_PAGE_LIMIT = 5000
# Samples taken from one report of a guest's, and held back for one publication.
_REPORT_LIMIT = 60


class _Ring:
    """One run's samples, numbered from 1; the oldest are forgotten."""

    def __init__(self, size: int) -> None:
        self.samples: deque[Sample] = deque(maxlen=size)
        self.last = 0

    def add(
        self,
        at_ms: int,
        *,
        stage: str | None,
        guest: GuestSample | None,
        host: HostSample | None,
    ) -> Sample:
        self.last += 1
        sample = Sample(seq=self.last, timestamp_ms=at_ms, stage_name=stage, guest=guest, host=host)
        self.samples.append(sample)
        return sample


class Telemetry(Actor):
    """Samples host processes every `interval` seconds while there are any, and takes in guests'.

    What is new is published when the host's processes have been sampled, all at once: each
    publication by itself would wake the node's thread. Samples are worth less than work: a full
    mailbox sheds the oldest.
    """

    mailbox_limit = 10_000
    overflow = Overflow.DROP_OLDEST
    control: ClassVar[frozenset[type[Message]]] = frozenset((TrackRun, ReadTelemetry))

    def __init__(self, place: Place, *, interval: float, ring_size: int) -> None:
        super().__init__(place)
        self._interval = interval
        self._ring_size = ring_size
        self._rings: OrderedDict[str, _Ring] = OrderedDict()
        self._samplers: dict[str, ProcessSampler] = {}
        self._fresh: dict[str, list[Sample]] = {}  # not published yet
        self._ticking = False

    @handles(TrackRun)
    def on_track(self, message: TrackRun, delivery: Delivery) -> None:
        if not message.pid:
            self._publish_fresh(message.run_id)
            self._samplers.pop(message.run_id, None)
            self.system.node.retire_topic(telemetry_topic(message.run_id))
            return
        identity = ProcessIdentity(message.pid, message.start_time)
        self._samplers[message.run_id] = ProcessSampler(identity)
        if not self._ticking:
            self._ticking = True
            self.after(0.0, self._tick)

    @handles(GuestSamples)
    def on_guest_samples(self, message: GuestSamples, delivery: Delivery) -> None:
        node = delivery.sender.partition("/")[0]
        if delivery.right is Right.WORK and node != f"run-{message.run_id}":
            raise Refuse(f"{node} may not report for run {message.run_id}")
        for at_ms, sample in message.samples[:_REPORT_LIMIT]:
            self._record(message.run_id, at_ms, stage=message.stage_name, guest=sample)
        if not self._ticking or len(self._fresh[message.run_id]) >= _REPORT_LIMIT:
            self._publish_fresh(message.run_id)

    @handles(ReadTelemetry)
    def on_read(self, message: ReadTelemetry, delivery: Delivery) -> TelemetryPage:
        ring = self._rings.get(message.run_id)
        if ring is None:
            return TelemetryPage(run_id=message.run_id, next_seq=message.from_seq, samples=())
        samples = tuple(
            sample
            for sample in ring.samples
            if sample.seq > message.from_seq
            and (message.stage_name is None or sample.stage_name == message.stage_name)
        )
        page = samples[:_PAGE_LIMIT]
        last = ring.last if len(page) == len(samples) else page[-1].seq
        return TelemetryPage(
            run_id=message.run_id, next_seq=max(last, message.from_seq), samples=page
        )

    def _tick(self) -> None:
        now, now_ms = self.system.clock(), time.time_ns() // 1_000_000
        for run_id, sampler in list(self._samplers.items()):
            try:
                self._record(run_id, now_ms, host=sampler.sample(now))
            except ProcessGoneError:
                del self._samplers[run_id]
        for run_id in list(self._fresh):
            self._publish_fresh(run_id)
        self._ticking = bool(self._samplers)
        if self._ticking:
            self.after(self._interval, self._tick)

    def _record(
        self,
        run_id: str,
        at_ms: int,
        *,
        stage: str | None = None,
        guest: GuestSample | None = None,
        host: HostSample | None = None,
    ) -> None:
        ring = self._rings.get(run_id)
        if ring is None:
            ring = self._rings[run_id] = _Ring(self._ring_size)
            self._forget_old()
        sample = ring.add(at_ms, stage=stage, guest=guest, host=host)
        self._fresh.setdefault(run_id, []).append(sample)

    def _publish_fresh(self, run_id: str) -> None:
        samples = tuple(self._fresh.pop(run_id, ()))
        if samples:
            self.publish(telemetry_topic(run_id), SamplesPublished(run_id=run_id, samples=samples))

    def _forget_old(self) -> None:
        ended = [run_id for run_id in self._rings if run_id not in self._samplers]
        for run_id in ended[: max(0, len(ended) - _ENDED_RINGS)]:
            del self._rings[run_id]
