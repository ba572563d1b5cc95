"""The loop devices run on: callbacks, timers, tasks, and one end."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio_driver import WAIT

from voidbus.vm.devices import event_loop
from voidbus.vm.devices.event_loop import EDGE, READ, EventLoop
from voidbus.vm.devices.faults import DeviceError


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for fd in ends:
        os.close(fd)


class Ran:
    """A loop, and the reason it failed with."""

    def __init__(self) -> None:
        self.failed: queue.Queue[str] = queue.Queue()
        self.loop = EventLoop("tested", self.failed.put)

    def on_loop(self, task: Callable[[], object]) -> None:
        """Run a task there and wait for it."""
        done = threading.Event()

        def run() -> None:
            task()
            done.set()

        assert self.loop.call(run)
        assert done.wait(WAIT)


@pytest.fixture
def ran() -> Iterator[Ran]:
    before = open_descriptors(), threading.active_count()
    made = Ran()
    made.loop.start()
    yield made
    made.loop.close()
    made.loop.close()
    assert (open_descriptors(), threading.active_count()) == before


def fail(error: Exception) -> None:
    raise error


def test_a_descriptor_is_told_while_it_is_watched(ran: Ran, pipe: tuple[int, int]) -> None:
    told = threading.Event()

    def read(_: int) -> None:
        os.read(pipe[0], 10)
        told.set()

    ran.on_loop(lambda: ran.loop.watch(pipe[0], READ, read))
    os.write(pipe[1], b"x")
    assert told.wait(WAIT)
    ran.on_loop(lambda: ran.loop.unwatch(pipe[0]))
    ran.on_loop(lambda: ran.loop.unwatch(pipe[0]))
    told.clear()
    os.write(pipe[1], b"x")
    ran.on_loop(lambda: None)
    assert not told.is_set()


def test_a_descriptor_unwatched_by_one_before_it_is_not_told() -> None:
    loop = EventLoop("turned", print)
    events = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    told = []

    def first_come(fd: int) -> None:
        told.append(fd)
        for each in events:
            loop.unwatch(each)

    for fd in events:
        loop.watch(fd, READ, lambda _, fd=fd: first_come(fd))  # type: ignore[misc]
    assert loop.turn(0) == 1
    assert loop.turn(0) == 0
    assert len(told) == 1
    loop.close()
    for fd in events:
        os.close(fd)


def test_an_edge_is_told_once_for_every_write_and_never_read() -> None:
    loop = EventLoop("turned", print)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    loop.watch(event, READ | EDGE, lambda _: None)
    for _ in range(3):
        os.eventfd_write(event, 1)
        assert loop.turn(0) == 1
        assert loop.turn(0) == 0
    loop.close()
    os.close(event)


def test_timers_run_in_their_order_unless_cancelled() -> None:
    loop = EventLoop("turned", print)
    order: list[str] = []
    loop.later(0.002, lambda: order.append("late"))
    loop.later(0.0, lambda: order.append("now"))
    loop.later(0.001, lambda: order.append("never")).cancel()
    while len(order) < 2:
        loop.turn(1.0)
    assert order == ["now", "late"]
    loop.close()


def test_what_comes_soon_lets_descriptors_have_their_turn() -> None:
    loop = EventLoop("turned", print)
    event = os.eventfd(1, os.EFD_NONBLOCK)
    order: list[str] = []

    def again() -> None:
        order.append("soon")
        if len(order) < 5:
            loop.soon(again)

    loop.soon(again)
    loop.watch(event, READ, lambda _: order.append("event"))
    loop.turn(0)
    loop.turn(0)
    assert order == ["event", "soon", "event", "soon"]
    loop.close()
    os.close(event)


def test_a_devices_fault_ends_the_loop_with_its_text(ran: Ran) -> None:
    ended: list[str] = []
    ran.on_loop(lambda: ran.loop.at_end(lambda: ended.append("first given")))
    ran.on_loop(lambda: ran.loop.at_end(lambda: ended.append("last given")))
    ran.loop.call(lambda: fail(DeviceError("it lied")))
    assert ran.failed.get(timeout=WAIT) == "it lied"
    assert ended == ["last given", "first given"]
    assert not ran.loop.call(lambda: None)


def test_a_defect_ends_the_loop_and_is_named(ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    ran.loop.call(lambda: fail(KeyError("missing")))
    assert ran.failed.get(timeout=WAIT) == "a defect in a device: KeyError: 'missing'"
    assert "Traceback" in caplog.text


def test_every_release_runs_even_if_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    ran = Ran()
    ended: list[str] = []
    ran.loop.at_end(lambda: ended.append("first given"))
    ran.loop.at_end(lambda: fail(ValueError("no")))
    ran.loop.at_end(lambda: fail(DeviceError("no")))
    ran.loop.start()
    ran.loop.close()
    assert ended == ["first given"]
    assert ran.failed.empty()
    assert "releasing" in caplog.text


def test_a_task_that_was_taken_runs_even_at_the_end(ran: Ran) -> None:
    holding, go, ended = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        holding.set()
        go.wait(WAIT)
        raise DeviceError("the end")

    assert ran.loop.call(hold)
    assert holding.wait(WAIT)
    assert ran.loop.call(ended.set)
    go.set()
    assert ended.wait(WAIT)


def test_tasks_beyond_the_bound_are_refused(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "MAX_TASKS", 3)
    holding, go = threading.Event(), threading.Event()

    def hold() -> None:
        holding.set()
        go.wait(WAIT)

    ran.loop.call(hold)
    assert holding.wait(WAIT)
    assert [ran.loop.call(lambda: None) for _ in range(5)] == [True, True, True, False, False]
    go.set()


def test_a_loop_that_never_started_releases_all_the_same() -> None:
    before = open_descriptors()
    ran = Ran()
    ended: list[str] = []
    ran.loop.at_end(lambda: ended.append("released"))
    ran.loop.close()
    ran.loop.close()
    assert ended == ["released"]
    assert open_descriptors() == before
    assert not ran.loop.call(lambda: None)
