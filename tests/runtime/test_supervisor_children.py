"""Children that come, go and are adopted while their supervisor runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import ActorStatus, Inspect
from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    DuplicateChildError,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
    SupervisorPolicy,
    SupervisorStoppingError,
    UnknownChildError,
)
from voidbus.actors.runtime.supervisor import Child, ChildSpec, Supervisor, actor_child
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason

POLICY = SupervisorPolicy(
    strategy=Strategy.ONE_FOR_ONE,
    max_restarts=5,
    window=60,
    backoff_initial=0,
    backoff_max=0,
    backoff_factor=1,
    jitter=0,
    stable_after=60,
)
Hook = Callable[[Actor], None]


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Worker(Actor):
    """Logs its life; `hooks` are run in "init", "start" and "stop"."""

    mailbox_limit = 8

    def __init__(self, place: Place, log: kit.Log, hooks: dict[str, Hook]) -> None:
        super().__init__(place)
        self.log, self.hooks = log, hooks
        self.run_hook("init")

    def run_hook(self, name: str) -> None:
        hook = self.hooks.get(name)
        if hook is not None:
            hook(self)

    def on_start(self) -> None:
        self.run_hook("start")
        self.log.add(f"+{self.path}")

    def on_stop(self) -> None:
        self.run_hook("stop")
        self.log.add(f"-{self.path}")

    @handles(kit.Crash)
    def on_crash(self, message: kit.Crash, delivery: Delivery) -> None:
        raise SystemExit("boom") if message.kind == "SystemExit" else RuntimeError("boom")

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> kit.Answer:
        if message.word == "end":
            self.end(ExitReason(ExitKind.NORMAL, "done"))
        return kit.Answer(word=str(self.generation))


class Boss(Supervisor):
    """Logs what its hooks are told."""

    def __init__(
        self,
        place: Place,
        log: kit.Log,
        policy: SupervisorPolicy,
        children: tuple[ChildSpec, ...] = (),
        *,
        last_generation: int = 0,
    ) -> None:
        super().__init__(place, policy, children, last_generation=last_generation)
        self.log = log

    def child_ended(self, name: str, generation: int, reason: ExitReason) -> None:
        self.log.add(f"{name} {generation} {reason.kind.value}: {reason.detail}")

    def on_stop(self) -> None:
        assert self.exit_reason is not None
        self.log.add(f"boss {self.exit_reason.kind.value}")

    @handles(kit.Crash)
    def on_crash(self, message: kit.Crash, delivery: Delivery) -> None:
        raise RuntimeError("the boss itself")


class Scene:
    """A boss, its children, and two logs: of the children's lives and of the boss's hooks."""

    def __init__(self, system: System, policy: SupervisorPolicy = POLICY) -> None:
        self.system, self.policy = system, policy
        self.log, self.hooks = kit.Log(), kit.Log()
        self.specs: list[ChildSpec] = []

    def child(
        self,
        name: str,
        restart: Restart = Restart.PERMANENT,
        *,
        stop_timeout: float = 5.0,
        **hooks: Hook,
    ) -> ChildSpec:
        policy = ChildPolicy(name, restart, stop_timeout=stop_timeout)
        spec = actor_child(self.system, policy, Worker, self.log, hooks)
        self.specs.append(spec)
        return spec

    def start(self, *, last_generation: int = 0) -> Boss:
        return self.system.start(
            Boss,
            "boss",
            self.hooks,
            self.policy,
            tuple(self.specs),
            last_generation=last_generation,
        )

    def crash(self, path: str, kind: str = "RuntimeError") -> None:
        assert kit.fault(kit.ask(self.system, path, kit.Crash(kind=kind))) is FaultReason.FAILED

    def generation(self, path: str) -> int:
        return int(kit.reply(kit.ask(self.system, path, kit.Say()), kit.Answer).word)


def within(actor: Actor, run: Callable[[], object]) -> object:
    """Run something in an actor's thread; what it returned or raised."""
    outcomes: list[object] = []
    done = threading.Event()

    def there() -> None:
        try:
            outcomes.append(run())
        except Exception as error:
            outcomes.append(error)
        done.set()

    actor.post(there)
    assert done.wait(kit.PATIENCE)
    return outcomes[0]


def assert_set(event: threading.Event) -> None:
    assert event.wait(kit.PATIENCE)


class Stubborn(Worker):
    """Is told to stop and doesn't, until it is let go."""

    def __init__(self, place: Place, log: kit.Log, let_go: threading.Event) -> None:
        super().__init__(place, log, {})
        self.let_go = let_go
        self.asked: list[float] = []

    def on_stop_request(self, timeout: float) -> None:
        self.asked.append(timeout)
        assert_set(self.let_go)
        super().on_stop_request(timeout)


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
