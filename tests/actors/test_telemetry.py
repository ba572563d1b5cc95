"""The telemetry actor: rings, pages, topics; and what /proc says of a process."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator

import pytest
from actor_kit import PATIENCE, ask, fault, local_system, reply

from voidbus.actors import telemetry as telemetry_module
from voidbus.actors.messages.actor import Done
from voidbus.actors.messages.journal import AppendEvents
from voidbus.actors.messages.runs import ReadEvents
from voidbus.actors.messages.telemetry import (
    GuestSample,
    GuestSamples,
    ReadTelemetry,
    Sample,
    SamplesPublished,
    TelemetryPage,
    TrackRun,
    telemetry_topic,
)
from voidbus.actors.proc_sample import ProcessSampler
from voidbus.actors.runtime.process import (
    ProcessGoneError,
    ProcessIdentity,
    current_identity,
    identity_of,
)
from voidbus.actors.runtime.system import System
from voidbus.actors.telemetry import Telemetry
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message, Right
from voidbus.transport.topics import Publication


@pytest.fixture
def system() -> Iterator[System]:
    with local_system() as made:
        made.start(Telemetry, "telemetry", interval=0.01, ring_size=10)
        yield made


def guest(*at_ms: int, run_id: str = "r1") -> GuestSamples:
    return GuestSamples(
        run_id=run_id, samples=tuple((ms, GuestSample(cpu_percent=float(ms))) for ms in at_ms)
    )


def page(system: System, run_id: str = "r1", **fields: int | str) -> TelemetryPage:
    question = ReadTelemetry.model_validate({"run_id": run_id, **fields})
    return reply(ask(system, "telemetry", question), TelemetryPage)


def hand_in(system: System, samples: GuestSamples) -> None:
    reply(ask(system, "telemetry", samples), Done)


class Published:
    """The samples published for a run."""

    def __init__(self, system: System, run_id: str) -> None:
        self._changed = threading.Condition()
        self.samples: list[Sample] = []
        self.publications = 0
        system.node.subscribe(telemetry_topic(run_id), self._take).wait_ready(PATIENCE)

    def _take(self, publication: Publication) -> None:
        assert isinstance(publication.message, SamplesPublished)
        with self._changed:
            self.samples.extend(publication.message.samples)
            self.publications += 1
            self._changed.notify_all()

    def wait_count(self, number: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.samples) >= number, PATIENCE)


def test_samples_are_numbered_from_one_and_read_after_a_number(system: System) -> None:
    hand_in(system, guest(100, 200, 300))
    whole = page(system)
    assert [(s.seq, s.timestamp_ms) for s in whole.samples] == [(1, 100), (2, 200), (3, 300)]
    assert whole.next_seq == 3
    assert [s.seq for s in page(system, from_seq=2).samples] == [3]
    assert page(system, from_seq=3).samples == ()
    assert all(s.guest is not None and s.host is None for s in whole.samples)


def test_an_unknown_run_has_an_empty_page_that_keeps_the_callers_number(system: System) -> None:
    assert page(system, "other", from_seq=7) == TelemetryPage(
        run_id="other", next_seq=7, samples=()
    )


def test_a_ring_forgets_the_oldest(system: System) -> None:
    hand_in(system, guest(*range(25)))
    got = page(system)
    assert [s.seq for s in got.samples] == list(range(16, 26))
    assert got.next_seq == 25


def test_a_stage_that_is_not_there_has_no_samples(system: System) -> None:
    hand_in(system, guest(1))
    assert page(system, stage_name="build").samples == ()


def test_a_page_that_is_cut_is_continued_where_it_was_cut(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "_PAGE_LIMIT", 4)
    hand_in(system, guest(*range(10)))
    seen, after = [], 0
    for _ in range(3):
        got = page(system, from_seq=after)
        seen += [s.seq for s in got.samples]
        after = got.next_seq
    assert seen == list(range(1, 11))


def test_a_report_holds_sixty_samples_at_most(system: System) -> None:
    hand_in(system, guest(*range(500)))
    assert page(system).next_seq == 60


@pytest.mark.parametrize(("sender", "accepted"), [("run-r1/vm", True), ("run-r2/vm", False)])
def test_a_run_process_reports_for_its_own_run_only(
    system: System, sender: str, accepted: bool
) -> None:
    answers: list[Message] = []
    answered = threading.Event()

    def answer(message: Message, attachments: object) -> None:
        answers.append(message)
        answered.set()

    actor = system.find("telemetry")
    assert actor is not None
    asked = Delivery("telemetry", sender, guest(1), 1e12, answer)
    asked.right = Right.WORK
    actor.deliver(asked)
    assert answered.wait(PATIENCE)
    if accepted:
        assert isinstance(answers[0], Done)
    else:
        assert isinstance(answers[0], Fault)
        assert answers[0].reason is FaultReason.REFUSED
    assert len(page(system).samples) == int(accepted)


def test_a_tracked_process_is_sampled_and_published_until_it_is_let_go(system: System) -> None:
    published = Published(system, "r1")
    me = current_identity()
    ask(system, "telemetry", TrackRun(run_id="r1", pid=me.pid, start_time=me.start_time)).wait()
    published.wait_count(3)
    assert [sample.seq for sample in published.samples[:3]] == [1, 2, 3]
    host = published.samples[2].host
    assert host is not None
    assert host.rss_bytes > 1_000_000
    reply(ask(system, "telemetry", TrackRun(run_id="r1", pid=0, start_time=0)), Done)
    last = page(system).next_seq
    hand_in(system, guest(1, run_id="r2"))  # a turn of the actor's loop later
    assert page(system).next_seq == last


def test_a_report_is_one_publication(system: System) -> None:
    published = Published(system, "r1")
    hand_in(system, guest(100, 200, 300))
    published.wait_count(3)
    assert published.publications == 1


def test_while_the_host_is_sampled_a_guests_samples_are_published_with_its() -> None:
    with local_system() as system:
        system.start(Telemetry, "telemetry", interval=3600.0, ring_size=100)
        published = Published(system, "r1")
        me = current_identity()
        track = TrackRun(run_id="r1", pid=me.pid, start_time=me.start_time)
        reply(ask(system, "telemetry", track), Done)
        published.wait_count(1)
        hand_in(system, guest(100, 200))
        hand_in(system, guest(300))
        assert (published.publications, page(system).next_seq) == (1, 4)
        reply(ask(system, "telemetry", TrackRun(run_id="r1", pid=0, start_time=0)), Done)
        published.wait_count(4)
        assert [sample.seq for sample in published.samples] == [1, 2, 3, 4]
        assert published.publications == 2


def test_what_is_held_back_for_a_publication_is_bounded() -> None:
    with local_system() as system:
        system.start(Telemetry, "telemetry", interval=3600.0, ring_size=100)
        published = Published(system, "r1")
        me = current_identity()
        track = TrackRun(run_id="r1", pid=me.pid, start_time=me.start_time)
        reply(ask(system, "telemetry", track), Done)
        published.wait_count(1)
        hand_in(system, guest(*range(40)))
        assert published.publications == 1
        hand_in(system, guest(*range(40)))
        published.wait_count(81)


def test_a_process_that_ends_is_let_go_by_itself(system: System) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        identity = identity_of(process.pid)
        track = TrackRun(run_id="r1", pid=identity.pid, start_time=identity.start_time)
        published = Published(system, "r1")
        ask(system, "telemetry", track).wait()
        published.wait_count(1)
        process.communicate(timeout=PATIENCE)
    with pytest.raises(ProcessGoneError):
        ProcessSampler(identity).sample(1.0)
    # It goes on for others.
    me = current_identity()
    other = Published(system, "r2")
    ask(system, "telemetry", TrackRun(run_id="r2", pid=me.pid, start_time=me.start_time)).wait()
    other.wait_count(2)


def test_rings_of_ended_runs_are_forgotten_in_their_order(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_module, "_ENDED_RINGS", 3)
    for number in range(6):
        hand_in(system, guest(1, run_id=f"r{number}"))
    kept = [n for n in range(6) if page(system, f"r{n}").samples]
    assert kept == [3, 4, 5]


def test_a_negative_number_is_refused(system: System) -> None:
    with pytest.raises(ValueError, match="from_seq"):
        ReadTelemetry(run_id="r1", from_seq=-1)
    assert fault(ask(system, "telemetry", Done())) is FaultReason.UNHANDLED


def test_events_are_none_of_its_business(system: System) -> None:
    for message in (
        ReadEvents(run_id="r1"),
        AppendEvents(run_id="r1", generation=1, events=()),
    ):
        assert fault(ask(system, "telemetry", message)) is FaultReason.UNHANDLED


# -- /proc -------------------------------------------------------------------------------------


def test_the_share_of_a_core_is_over_the_time_since_the_sample_before() -> None:
    sampler = ProcessSampler(current_identity())
    assert sampler.sample(100.0).cpu_percent == 0.0, "there is nothing to compare with yet"
    before = sum(os.times()[:2])
    while sum(os.times()[:2]) - before < 0.1:
        pass
    percent = sampler.sample(101.0).cpu_percent
    assert 5.0 <= percent <= 200.0, "a tenth of a second of work in what is said to be one second"
    assert sampler.sample(101.0).cpu_percent == 0.0, "no time has passed"


def test_a_recycled_pid_is_not_sampled() -> None:
    me = current_identity()
    with pytest.raises(ProcessGoneError, match="given away"):
        ProcessSampler(ProcessIdentity(me.pid, me.start_time - 1)).sample(1.0)


def test_a_process_that_has_ended_is_not_sampled_though_nobody_has_waited_for_it() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        identity = identity_of(process.pid)
        assert process.stdin is not None
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessGoneError, match="has ended"):
            ProcessSampler(identity).sample(1.0)


@pytest.mark.needs("disk")
def test_disk_traffic_counts_what_reached_the_disk_and_what_came_from_it() -> None:
    sampler = ProcessSampler(current_identity())
    before = sampler.sample(1.0)
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(1_000_000))
        os.fsync(file.fileno())
        written = sampler.sample(2.0)
        # What the kernel still had in memory would not be read from the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(os.pread(file.fileno(), 1_000_000, 0)) == 1_000_000
    read = sampler.sample(3.0)
    assert written.io_write_bytes - before.io_write_bytes >= 1_000_000
    assert read.io_read_bytes - written.io_read_bytes >= 500_000
