"""Supervisors on real actors: the order of starts and stops, restarts, and what is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import actor_kit as kit
import pytest
from supervision_kit import POLICY, Boss, Scene, Stubborn, assert_set, within

from voidbus.actors.messages.actor import ActorStatus, Inspect
from voidbus.actors.runtime.actor import Actor
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
)
from voidbus.actors.runtime.supervisor import Child, ChildSpec, actor_child
from voidbus.actors.runtime.system import System


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


def test_a_child_is_started_when_the_one_before_it_is_up(system: System) -> None:
    scene, let_go = Scene(system), threading.Event()
    scene.child("a", start=lambda _: assert_set(let_go))
    scene.child("b")
    boss = scene.start()
    kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
    assert system.find("a") is not None
    assert system.find("b") is None
    let_go.set()
    scene.log.wait_for("+b")
    assert scene.log.lines == ["+a", "+b"]
    assert within(boss, lambda: isinstance(boss.running_child("b"), Child)) is True


def test_children_are_stopped_in_reverse_each_when_the_next_is_gone(system: System) -> None:
    scene = Scene(system)
    for name in "abc":
        scene.child(name)
    boss = scene.start()
    scene.log.wait_for("+c")
    boss.request_stop(10.0)
    assert boss.join(kit.PATIENCE)
    assert scene.log.lines == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert scene.hooks.lines[-1] == "boss shutdown"
    assert system.describe().actors == ()


# ---- restarts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy.ONE_FOR_ONE, ["-b", "+b"]),
        (Strategy.REST_FOR_ONE, ["-b", "-c", "+b", "+c"]),
        (Strategy.ONE_FOR_ALL, ["-b", "-c", "-a", "+a", "+b", "+c"]),
    ],
)
@pytest.mark.parametrize("kind", ["RuntimeError", "SystemExit"])
def test_a_crash_restarts_what_the_strategy_says(
    system: System, strategy: Strategy, expected: list[str], kind: str
) -> None:
    scene = Scene(system, replace(POLICY, strategy=strategy))
    for name in "abc":
        scene.child(name)
    scene.start()
    scene.log.wait_for("+c")
    scene.crash("b", kind)
    scene.log.wait_count(3 + len(expected))
    assert scene.log.lines[3:] == expected
    assert scene.generation("b") > 3


def test_a_transient_child_that_ended_by_itself_stays_down_and_a_permanent_one_does_not(
    system: System,
) -> None:
    scene = Scene(system)
    scene.child("transient", Restart.TRANSIENT)
    scene.child("permanent")
    scene.start()
    scene.log.wait_for("+permanent")
    for path in ("transient", "permanent"):
        kit.reply(kit.ask(system, path, kit.Say(word="end")), kit.Answer)
    scene.log.wait_for("+permanent", "+permanent", "-transient")
    kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
    assert system.find("transient") is None


def test_a_constructor_that_fails_is_tried_again_until_it_works(system: System) -> None:
    scene, tries = Scene(system), list[int]()

    def unlucky(actor: Actor) -> None:
        tries.append(actor.generation)
        if len(tries) < 3:
            raise SystemExit("not yet") if len(tries) == 2 else RuntimeError("not yet")

    scene.child("a", init=unlucky)
    scene.child("b")
    scene.start()
    scene.log.wait_for("+b")
    assert scene.log.lines == ["+a", "+b"]
    assert tries == [1, 2, 3]
    assert scene.hooks.lines == [
        "a 1 fault: did not start: RuntimeError: not yet",
        "a 2 fault: did not start: SystemExit: not yet",
    ]


def test_an_on_start_that_fails_is_a_restart_and_the_next_child_waits(system: System) -> None:
    scene, tries = Scene(system), list[int]()

    def unlucky(actor: Actor) -> None:
        tries.append(actor.generation)
        if len(tries) < 3:
            raise RuntimeError("not yet")

    scene.child("a", start=unlucky)
    scene.child("b")
    scene.start()
    scene.log.wait_for("+b")
    assert scene.log.lines == ["-a", "-a", "+a", "+b"]


def test_a_restart_waits_for_its_back_off_by_the_clock_of_the_system() -> None:
    clock = kit.FakeClock()
    with kit.local_system(clock) as system:
        scene = Scene(system, replace(POLICY, backoff_initial=4, backoff_max=8, backoff_factor=2))
        scene.child("a")
        scene.start()
        scene.log.wait_for("+a")
        scene.crash("a")  # the first restart of a streak is immediate
        scene.log.wait_for("+a", "+a")
        ups = 2
        for wait in (4, 8, 8):
            scene.crash("a")
            scene.hooks.wait_count(ups)
            kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)  # it has decided
            for seconds, expected in ((wait - 1, ups), (1, ups + 1)):
                clock.advance(seconds)
                for _ in range(2):  # the first wakes it, the second comes after the timers
                    kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
                if expected > ups:
                    scene.log.wait_for(*["+a"] * expected)
                assert scene.log.lines.count("+a") == expected
            ups += 1


def test_too_many_restarts_stop_all_and_fail_the_supervisor(system: System) -> None:
    scene = Scene(system, replace(POLICY, max_restarts=2))
    scene.child("a")
    scene.child("b")
    boss = scene.start()
    for number in range(3):
        scene.log.wait_for(*["+a"] * (number + 1), "+b")
        scene.crash("a")
    assert boss.join(kit.PATIENCE)
    assert boss.exit_reason is not None
    assert boss.exit_reason.kind is ExitKind.FAULT
    assert "would be restart number 3 within 60 s" in boss.exit_reason.detail
    assert scene.log.lines[-2:] == ["-a", "-b"]


def test_an_escalation_is_a_fault_to_the_supervisor_above_which_starts_it_anew(
    system: System,
) -> None:
    scene = Scene(system, replace(POLICY, max_restarts=0))
    scene.child("leaf")
    above = Scene(system)
    above.specs.append(
        actor_child(
            system,
            ChildPolicy("boss", Restart.PERMANENT, stop_timeout=5.0),
            Boss,
            scene.hooks,
            scene.policy,
            tuple(scene.specs),
        )
    )
    system.start(Boss, "top", above.hooks, POLICY, tuple(above.specs))
    scene.log.wait_for("+leaf")
    scene.crash("leaf")
    scene.log.wait_for("+leaf", "+leaf")
    assert above.hooks.lines[0].startswith("boss 1 fault: child 'leaf' ended (fault: RuntimeError")


def test_a_supervisor_that_crashes_takes_its_actors_with_it_and_comes_back(
    system: System,
) -> None:
    scene, top_log = Scene(system), kit.Log()
    scene.child("a")
    scene.child("b")
    boss = actor_child(
        system,
        ChildPolicy("boss", Restart.PERMANENT, stop_timeout=5.0),
        Boss,
        scene.hooks,
        POLICY,
        tuple(scene.specs),
    )
    system.start(Boss, "top", top_log, POLICY, (boss,))
    scene.log.wait_for("+b")
    scene.crash("boss")
    scene.log.wait_for("+b", "+b")
    assert scene.log.lines == ["+a", "+b", "-b", "-a", "+a", "+b"]


@pytest.mark.parametrize("strategy", Strategy)
def test_after_many_crashes_at_once_every_child_is_up_again_and_stops(
    system: System, strategy: Strategy
) -> None:
    names = "abcde"
    scene = Scene(system, replace(POLICY, strategy=strategy, max_restarts=100_000))
    for name in names:
        scene.child(name)
    boss = scene.start()
    scene.log.wait_for(*(f"+{name}" for name in names))

    def crash_often(path: str) -> None:
        for _ in range(25):
            kit.ask(system, path, kit.Crash()).wait()

    threads = [threading.Thread(target=crash_often, args=[name]) for name in names]
    with kit.switching_every(1e-5):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(kit.PATIENCE)
    while not all(isinstance(kit.ask(system, n, kit.Say()).wait(), kit.Answer) for n in names):
        kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
    boss.request_stop(10.0)
    assert boss.join(kit.PATIENCE)
    assert system.describe().actors == ()
    # Never two generations of a child at once, whatever happened.
    for name in names:
        lives = [line for line in scene.log.lines if line[1:] == name]
        assert lives == [f"+{name}", f"-{name}"] * (len(lives) // 2)
    assert boss.exit_reason == ExitReason(ExitKind.SHUTDOWN, "stopped as asked")


# ---- stopping --------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_timeout", [0.0, 0.1])
def test_a_child_that_does_not_stop_is_given_up_and_the_rest_still_stops(
    system: System, stop_timeout: float
) -> None:
    scene, let_go = Scene(system), threading.Event()
    scene.child("a")
    policy = ChildPolicy("stuck", Restart.PERMANENT, stop_timeout=stop_timeout)
    scene.specs.append(actor_child(system, policy, Stubborn, scene.log, let_go))
    scene.child("z")
    boss = scene.start()
    scene.log.wait_for("+z")
    boss.request_stop(10.0)
    assert boss.join(kit.PATIENCE)
    assert scene.log.lines[3:] == ["-z", "-a"]
    assert [line for line in scene.hooks.lines if "abandoned" in line] == [
        "stuck 2 fault: did not stop; abandoned"
    ]
    let_go.set()
    scene.log.wait_for("-stuck")


def test_the_end_of_a_child_that_was_given_up_is_not_told_again(system: System) -> None:
    scene, let_go = Scene(system), threading.Event()
    policy = ChildPolicy("stuck", Restart.TEMPORARY, stop_timeout=0.0)
    scene.specs.append(actor_child(system, policy, Stubborn, scene.log, let_go))
    boss = scene.start()
    scene.log.wait_for("+stuck")
    within(boss, lambda: boss.remove_child("stuck"))
    scene.hooks.wait_count(1)
    let_go.set()
    assert system.find("stuck") is None or system.find("stuck").join(kit.PATIENCE)  # type: ignore[union-attr]
    kit.reply(kit.ask(system, "boss", Inspect()), ActorStatus)
    assert scene.hooks.lines == ["stuck 1 fault: did not stop; abandoned"]


def test_a_stop_of_everything_keeps_its_total_deadline(system: System) -> None:
    """Three that need 5 s each, stopped within 0.8 s together."""
    scene, let_go = Scene(system), threading.Event()
    for name in "abc":
        policy = ChildPolicy(name, Restart.PERMANENT, stop_timeout=5.0)
        scene.specs.append(actor_child(system, policy, Stubborn, scene.log, let_go))
    boss = scene.start()
    scene.log.wait_for("+c")
    before = time.monotonic()
    boss.request_stop(0.8)
    assert boss.join(kit.PATIENCE)
    # 0.6 s of it are the children's, and 0.5 s later they are given up.
    assert 0.8 <= time.monotonic() - before < 3.0
    assert boss.exit_reason == ExitReason(ExitKind.SHUTDOWN, "stopped as asked")
    let_go.set()
    scene.log.wait_for("-a", "-b", "-c")


def test_a_supervisor_below_gives_up_its_child_before_it_is_given_up_itself(
    system: System,
) -> None:
    scene, top_log, let_go = Scene(system), kit.Log(), threading.Event()
    stuck = ChildPolicy("stuck", Restart.PERMANENT, stop_timeout=5.0)
    below = actor_child(
        system,
        ChildPolicy("boss", Restart.PERMANENT, stop_timeout=0.8),
        Boss,
        scene.hooks,
        POLICY,
        (actor_child(system, stuck, Stubborn, scene.log, let_go),),
    )
    top = system.start(Boss, "top", top_log, POLICY, (below,))
    scene.log.wait_for("+stuck")
    top.request_stop(10.0)
    assert top.join(kit.PATIENCE)
    assert top_log.lines == ["boss 1 shutdown: stopped as asked", "boss shutdown"]
    let_go.set()
    scene.log.wait_for("-stuck")


def test_a_second_stop_request_shortens_the_first(system: System) -> None:
    scene, let_go = Scene(system), threading.Event()
    policy = ChildPolicy("stuck", Restart.PERMANENT, stop_timeout=600.0)
    scene.specs.append(actor_child(system, policy, Stubborn, scene.log, let_go))
    boss = scene.start()
    scene.log.wait_for("+stuck")
    boss.request_stop(600.0)
    boss.request_stop(0.0)
    assert boss.join(kit.PATIENCE)
    let_go.set()
    scene.log.wait_for("-stuck")


def test_a_child_that_can_not_even_be_asked_to_stop_is_given_up(system: System) -> None:
    class Broken(Child):
        def stop(self, timeout: float) -> None:
            raise OSError("no way to reach it")

    def start(
        _generation: int, ready: Callable[[], None], _ended: Callable[[ExitReason], None]
    ) -> Child:
        ready()
        return Broken()

    scene = Scene(system)
    scene.specs.append(ChildSpec(ChildPolicy("broken", Restart.PERMANENT, stop_timeout=0.0), start))
    boss = scene.start()
    boss.request_stop(5.0)
    assert boss.join(kit.PATIENCE)
    assert scene.hooks.lines[-1] == "boss shutdown"
