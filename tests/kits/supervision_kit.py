"""Actors that tell what happens to them, and a supervisor over them, for tests of supervision."""

from __future__ import annotations

import threading
from collections.abc import Callable

import actor_kit as kit

from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.supervisor import ChildSpec, Supervisor, actor_child
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


# ---- order -----------------------------------------------------------------------------------


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
