"""Watching: who asked hears of an end, after it, once, whatever else is going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import ActorStatus, Inspect, Terminated
from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.mailbox import Overflow
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Watcher(Actor):
    """Logs each Terminated it gets. Its mailbox holds one message."""

    mailbox_limit = 1
    overflow = Overflow.REFUSE

    def __init__(self, place: Place, log: kit.Log) -> None:
        super().__init__(place)
        self.log = log

    @handles(Terminated)
    def on_terminated(self, message: Terminated, delivery: Delivery) -> None:
        self.log.add(f"{message.path} {message.generation} {message.reason}")


def watch(system: System, watcher: Watcher, *paths: str) -> None:
    kit.post(watcher, *(partial(watcher.watch, path) for path in paths))
    kit.reply(kit.ask(system, watcher.path, Inspect()), ActorStatus)


def test_a_watcher_hears_of_the_end_after_on_stop_has_run(system: System) -> None:
    log = kit.Log()
    gate = system.start(kit.Gate, "gate", log, generation=5)
    watcher = system.start(Watcher, "watcher", log)
    watch(system, watcher, "gate", "gate")
    gate.request_stop(1.0)
    log.wait_count(2)
    assert log.lines == ["stopped", "gate 5 shutdown"]


def test_a_watcher_hears_of_a_crash_with_its_reason(system: System) -> None:
    log = kit.Log()
    system.start(kit.Echo, "echo")
    watch(system, system.start(Watcher, "watcher", log), "echo")
    kit.ask(system, "echo", kit.Crash())
    log.wait_for("echo 1 fault")


def test_a_watcher_of_nobody_and_of_the_dead_hears_at_once(system: System) -> None:
    log = kit.Log()
    echo = system.start(kit.Echo, "echo")
    echo.request_stop(1.0)
    assert echo.join(kit.PATIENCE)
    watch(system, system.start(Watcher, "watcher", log), "echo", "never")
    log.wait_for("echo 0 no_such_actor", "never 0 no_such_actor")


def test_no_full_mailbox_keeps_a_watcher_from_hearing(system: System) -> None:
    log, gate = kit.Log(), threading.Event()
    watcher = system.start(Watcher, "watcher", log)
    echoes = [system.start(kit.Echo, f"echo{n}") for n in range(5)]
    watch(system, watcher, *(echo.path for echo in echoes))
    kit.post(watcher, lambda: gate.wait(kit.PATIENCE))
    while system.node.tell("here/watcher", kit.Say()) is None:  # fill its one place
        pass
    for echo in echoes:
        echo.request_stop(1.0)
        assert echo.join(kit.PATIENCE)
    gate.set()
    log.wait_for(*(f"echo{n} 1 shutdown" for n in range(5)))


def test_a_watcher_that_was_restarted_hears_nothing_its_forerunner_asked_for(
    system: System,
) -> None:
    log = kit.Log()
    echo = system.start(kit.Echo, "echo")
    first = system.start(Watcher, "watcher", log)
    watch(system, first, "echo")
    first.request_stop(1.0)
    assert first.join(kit.PATIENCE)
    second = system.start(Watcher, "watcher", log)
    echo.request_stop(1.0)
    assert echo.join(kit.PATIENCE)
    watch(system, second, "echo")
    log.wait_for("echo 0 no_such_actor")
    assert log.lines == ["echo 0 no_such_actor"]


def test_an_ask_of_a_stuck_actor_ends_at_its_deadline(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    before = time.monotonic()
    assert kit.fault(kit.ask(system, "gate", kit.Say(), timeout=0.1)) is FaultReason.EXPIRED
    assert 0.1 <= time.monotonic() - before < kit.PATIENCE / 2
    gate.let_go.set()
