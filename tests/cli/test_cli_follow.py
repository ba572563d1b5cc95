"""Following events: order, gaps, restarts, endings."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor, event

from voidbus.actors.messages.runs import EventPublished, ReadEvents, RunEvent, events_topic
from voidbus.cli import follow
from voidbus.cli.connect import connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.follow import Follower, Wake
from voidbus.transport.fault import FaultReason

Voidbus = Callable[..., Any]


def collect(follower: Follower, limit: int = 1000) -> list[int]:
    """The numbers of the events up to the run's end."""
    numbers = []
    for _ in range(limit):
        if follower.ended:
            break
        found = follower.next(5.0)
        if isinstance(found, RunEvent):
            numbers.append(found.seq)
    return numbers


def test_a_follower_sees_what_was_before_it_and_what_comes_after(
    supervisor: FakeSupervisor, state: Path
) -> None:
    supervisor.page_limit = 3
    supervisor.add_run("run-a")
    for _ in range(8):
        supervisor.emit("run-a", "box.started")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert isinstance(follower.next(5.0), RunEvent)
        for _ in range(5):
            supervisor.emit("run-a", "box.started")
        supervisor.emit("run-a", "run.finished")
        assert collect(follower) == list(range(1, 14))


def test_an_ended_run_is_followed_to_its_last_event_at_once(
    supervisor: FakeSupervisor, state: Path
) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    supervisor.emit("run-a", "run.failed")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert collect(follower) == [0, 1]
    with connect(state) as link, Follower(link, "run-a", after=1) as follower:
        assert collect(follower) == []
        assert follower.ended


def test_events_lost_on_the_way_are_read_from_the_journal(
    supervisor: FakeSupervisor, state: Path
) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert isinstance(follower.next(5.0), RunEvent)
        for _ in range(4):
            supervisor.emit("run-a", "box.started", publish=False)
        supervisor.emit("run-a", "box.started")
        supervisor.emit("run-a", "run.finished")
        assert collect(follower) == [1, 2, 3, 4, 5, 6]


def test_a_last_event_that_is_never_published_is_found_in_the_journal(
    supervisor: FakeSupervisor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_DOUBT", 0.05)
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert isinstance(follower.next(5.0), RunEvent)
        supervisor.emit("run-a", "run.finished", publish=False)
        assert collect(follower) == [1]


def test_an_event_published_twice_is_given_once(supervisor: FakeSupervisor, state: Path) -> None:
    supervisor.add_run("run-a")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert follower.next(0.0) is None
        first = supervisor.emit("run-a", "run.started")
        supervisor.hub.publish(events_topic("run-a"), EventPublished(event=first))
        supervisor.emit("run-a", "run.finished")
        assert collect(follower) == [0, 1]


def test_a_run_whose_id_continues_ours_is_not_mixed_in(
    supervisor: FakeSupervisor, state: Path
) -> None:
    supervisor.add_run("run-1")
    supervisor.add_run("run-10")
    with connect(state) as link, Follower(link, "run-1") as follower:
        assert follower.next(0.0) is None
        supervisor.emit("run-10", "run.failed")
        supervisor.emit("run-1", "run.started")
        supervisor.emit("run-1", "run.finished")
        events = [follower.next(5.0), follower.next(5.0)]
        assert [one.run_id for one in events if isinstance(one, RunEvent)] == ["run-1", "run-1"]


def test_more_publications_than_are_kept_are_read_from_the_journal(
    supervisor: FakeSupervisor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_BACKLOG", 4)
    supervisor.add_run("run-a")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert follower.next(0.0) is None
        for _ in range(50):
            supervisor.emit("run-a", "box.started")
        supervisor.emit("run-a", "run.finished")
        assert collect(follower) == list(range(51))


def test_wake_ends_a_wait_and_loses_nothing(supervisor: FakeSupervisor, state: Path) -> None:
    supervisor.add_run("run-a")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert follower.next(0.0) is None
        waker = threading.Timer(0.05, follower.wake)
        waker.start()
        assert follower.next(30.0) is Wake
        waker.join()
        supervisor.emit("run-a", "run.finished")
        assert collect(follower) == [0]


def test_a_follower_survives_a_restart_of_the_supervisor(
    supervisor: FakeSupervisor, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert isinstance(follower.next(5.0), RunEvent)
        supervisor.hub.close()
        assert follower.next(0.5) is None
        supervisor.events["run-a"].append(event("run-a", 1, "box.started"))
        supervisor.runs["run-a"] = supervisor.runs["run-a"].model_copy(update={"last_seq": 1})
        supervisor.restart()
        second = follower.next(10.0)
        assert isinstance(second, RunEvent)
        supervisor.emit("run-a", "run.finished")
        assert (second.seq, collect(follower)) == (1, [2])
    told = capsys.readouterr().err
    assert "lost the supervisor; waiting up to 30 s" in told
    assert "the supervisor is back" in told


def test_a_follower_gives_up_on_a_supervisor_that_stays_away(
    supervisor: FakeSupervisor, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "GIVE_UP", 0.3)
    supervisor.add_run("run-a")
    with connect(state) as link, Follower(link, "run-a", after=3) as follower:
        assert follower.next(0.0) is None
        supervisor.hub.close()
        with pytest.raises(Failure, match="--since 3") as caught:
            follower.next(20.0)
    assert caught.value.code is ExitCode.NO_SUPERVISOR


def test_a_journal_that_is_busy_for_a_moment_is_asked_again(
    supervisor: FakeSupervisor, state: Path
) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.finished")
    refused: list[object] = []

    def busy_twice(delivery: Any) -> None:
        if len(refused) == 2:
            del supervisor.answers[ReadEvents]
        refused.append(delivery)
        delivery.fail(FaultReason.MAILBOX_FULL, "the receiver's mailbox is full")

    supervisor.answers[ReadEvents] = busy_twice
    with connect(state) as link, Follower(link, "run-a") as follower:
        assert collect(follower) == [0]
    assert len(refused) == 3


def test_events_follow_json_is_a_document_on_each_line(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    supervisor.emit("run-a", "run.started")
    supervisor.emit("run-a", "run.cancelled")
    result = voidbus("events", "run-a", "--follow", "--json")
    assert result.code == 0
    assert [json.loads(line)["seq"] for line in result.out.splitlines()] == [0, 1]


def test_logs_follow_ends_with_the_run(supervisor: FakeSupervisor, voidbus: Voidbus) -> None:
    supervisor.add_run("run-a")

    def go_on() -> None:
        supervisor.wait_for(ReadEvents)
        supervisor.emit("run-a", "log.chunk", stream="stdout", payload={"data": "late"})
        supervisor.emit("run-a", "run.finished")

    thread = threading.Thread(target=go_on)
    thread.start()
    result = voidbus("logs", "run-a", "-f")
    thread.join()
    assert (result.code, result.out) == (0, "late\n")
