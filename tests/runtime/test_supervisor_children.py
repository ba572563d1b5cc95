"""Children that come, go and are adopted while their supervisor runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import actor_kit as kit
import pytest
from supervision_kit import Scene, Stubborn, within

from voidbus.actors.messages.actor import ActorStatus, Inspect
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    DuplicateChildError,
    ExitKind,
    ExitReason,
    Restart,
    SupervisorStoppingError,
    UnknownChildError,
)
from voidbus.actors.runtime.supervisor import Child, actor_child
from voidbus.actors.runtime.system import System


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


# ---- children at run time --------------------------------------------------------------------


def test_children_are_added_and_removed_at_run_time(system: System) -> None:
    scene = Scene(system)
    boss = scene.start()
    spec = scene.child("a")
    assert within(boss, lambda: boss.add_child(spec)) is None
    scene.log.wait_for("+a")
    assert isinstance(within(boss, lambda: boss.add_child(scene.child("a"))), DuplicateChildError)
    assert within(boss, lambda: boss.remove_child("a")) is None
    scene.log.wait_for("-a")
    scene.hooks.wait_for("a 1 shutdown: stopped")
    assert within(boss, lambda: boss.running_child("a")) is None
    assert isinstance(within(boss, lambda: boss.remove_child("a")), UnknownChildError)
    assert within(boss, lambda: boss.add_child(spec)) is None
    scene.log.wait_for("+a", "+a")
    assert scene.generation("a") == 2


def test_a_supervisor_that_stops_takes_no_child(system: System) -> None:
    scene, let_go = Scene(system), threading.Event()
    policy = ChildPolicy("slow", Restart.PERMANENT, stop_timeout=5.0)
    scene.specs.append(actor_child(system, policy, Stubborn, scene.log, let_go))
    boss = scene.start()
    scene.log.wait_for("+slow")
    boss.request_stop(10.0)
    refused = within(boss, lambda: boss.add_child(scene.child("late")))
    assert isinstance(refused, SupervisorStoppingError)
    refused = within(boss, lambda: boss.adopt_child(scene.child("late"), 77, Running()))
    assert isinstance(refused, SupervisorStoppingError)
    assert within(boss, lambda: boss.running_child("late")) is None
    let_go.set()


class Running(Child):
    """A child that runs already; its stops are noted."""

    def __init__(self) -> None:
        self.stops: list[float] = []

    def stop(self, timeout: float) -> None:
        self.stops.append(timeout)


def test_an_adopted_child_is_kept_stopped_and_fenced_by_its_generation(system: System) -> None:
    scene = Scene(system)
    boss = scene.start(last_generation=10)
    child = Running()
    spec = scene.child("adopted", Restart.TRANSIENT)

    def adopt() -> int:
        generation = boss.next_generation()
        boss.adopt_child(spec, generation, child)
        return generation

    assert within(boss, adopt) == 11
    assert within(boss, lambda: boss.running_child("adopted")) is child
    again = within(boss, lambda: boss.adopt_child(spec, 11, Running()))
    assert isinstance(again, DuplicateChildError)
    again = within(boss, lambda: boss.adopt_child(spec, 12, Running()))
    assert isinstance(again, DuplicateChildError)
    assert within(boss, lambda: boss.running_child("adopted")) is child

    gone = ExitReason(ExitKind.FAULT, "gone")
    within(boss, lambda: boss.report_end("adopted", 10, gone))  # an old generation's
    assert within(boss, lambda: boss.running_child("adopted")) is child
    within(boss, lambda: boss.report_end("adopted", 11, gone))
    within(boss, lambda: boss.report_end("adopted", 11, gone))
    scene.log.wait_for("+adopted")
    assert scene.hooks.lines == ["adopted 11 fault: gone"]
    assert scene.generation("adopted") > 11


def test_an_adopted_child_is_asked_to_stop_within_its_time(system: System) -> None:
    scene, child = Scene(system), Running()
    boss = scene.start()
    spec = scene.child("adopted", Restart.TEMPORARY, stop_timeout=3.0)
    within(boss, lambda: boss.adopt_child(spec, 5, child))
    boss.request_stop(100.0)
    kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
    assert child.stops == [3.0]
    boss.post(lambda: boss.report_end("adopted", 5, ExitReason(ExitKind.NORMAL)))
    assert boss.join(kit.PATIENCE)
    assert scene.hooks.lines == ["adopted 5 normal: ", "boss shutdown"]


def test_children_that_come_and_go_leave_nothing_behind(system: System) -> None:
    scene = Scene(system)
    boss = scene.start()
    gone = ExitReason(ExitKind.NORMAL)

    def many() -> tuple[int, ...]:
        for number in range(200):
            spec = scene.child(f"run{number}", Restart.TEMPORARY)
            boss.adopt_child(spec, number + 1, Running())
            boss.report_end(f"run{number}", number + 1, gone)
        with pytest.raises(UnknownChildError):
            boss.remove_child("run1")
        return len(boss._specs), len(boss._running), len(boss._alive), len(boss._stop_timers)

    assert within(boss, many) == (0, 0, 0, 0)
