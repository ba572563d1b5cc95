"""Supervisors: actors that carry out the supervision policy on their children.

What to do is `policy.decide`'s to say; here it is done: children are started and stopped, their
ends reported back as events. A child is an actor (`ActorChild`) or a process
(`voidbus.actors.runtime.process_child`); the policy can't tell them apart.
"""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from voidbus.actors.runtime.actor import Actor, Place, Timer
from voidbus.actors.runtime.policy import (
    Action,
    AddChild,
    ChildExited,
    ChildPolicy,
    ChildStarted,
    ChildStopped,
    DuplicateChildError,
    Escalate,
    Event,
    ExitKind,
    ExitReason,
    Finished,
    RemoveChild,
    ScheduleTick,
    StartChild,
    StopAll,
    StopChild,
    SupervisorPolicy,
    Tick,
    decide,
    initial_state,
)

log = logging.getLogger("voidbus.actors")


# A child keeps its own deadline; it is given up this much later, in seconds.
_ABANDON_AFTER = 0.5
# What the children of a supervisor that failed have together to stop, in seconds: less than the
# 10 s after which a system's end goes on without them.
_ORPHANS_SECONDS = 5.0


class Child(ABC):
    """One generation of a child, running."""

    @abstractmethod
    def stop(self, timeout: float) -> None:
        """Begin to stop it, to be over within `timeout` seconds. Must not block.

        It may be called again with less time.
        """

    def orphan(self, timeout: float) -> None:  # noqa: B027 - a hook, not a duty
        """Its supervisor has ended without stopping it. The default leaves it as it is."""


# Starts one generation: (generation, on_ready, on_end) -> the child. The two callbacks may be
# called by any thread, once each. An exception means it could not be started.
StartFunction = Callable[[int, Callable[[], None], Callable[[ExitReason], None]], Child]


@dataclass(frozen=True)
class ChildSpec:
    """A child: how it is kept, and how it is started."""

    policy: ChildPolicy
    start: StartFunction

    @property
    def name(self) -> str:
        return self.policy.name


class ActorChild(Child):
    """An actor in this process. It can be asked to stop; a thread can't be killed."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def stop(self, timeout: float) -> None:
        self.actor.request_stop(timeout)

    def orphan(self, timeout: float) -> None:
        """Stop it and wait: whoever follows the supervisor starts it anew at the same path."""
        self.actor.request_stop(timeout)
        if not self.actor.join(timeout):
            log.error("%s did not stop after its supervisor's end; left alone", self.actor.path)


class Supervisor(Actor):
    """An actor that keeps children. Subclasses add handlers of their own.

    `child_ended` and `gave_up` are hooks.
    """

    mailbox_limit = 1024

    def __init__(
        self,
        place: Place,
        policy: SupervisorPolicy,
        children: tuple[ChildSpec, ...] = (),
        *,
        last_generation: int = 0,
    ) -> None:
        super().__init__(place)
        self._specs = {child.name: child for child in children}
        self._supervision = initial_state(
            policy, [child.policy for child in children], last_generation=last_generation
        )
        self._alive: set[tuple[str, int]] = set()  # asked to start or adopted, end not yet told
        self._running: dict[tuple[str, int], Child] = {}
        self._stop_timers: dict[tuple[str, int], Timer] = {}
        self._tick: Timer | None = None

    # -- what a subclass uses --------------------------------------------------------------

    def add_child(self, spec: ChildSpec) -> None:
        """Start a new child. Raises DuplicateChildError, SupervisorStoppingError."""
        self._add(spec, AddChild(spec.policy))

    def adopt_child(self, spec: ChildSpec, generation: int, child: Child) -> None:
        """Take charge of a child that already runs.

        Raises DuplicateChildError, SupervisorStoppingError; the child is then still the caller's.
        """
        key = (spec.name, generation)
        if key in self._alive:
            raise DuplicateChildError(f"generation {generation} of {spec.name!r} is kept already")
        self._alive.add(key)
        self._running[key] = child
        try:
            self._add(spec, AddChild(spec.policy, adopted=generation))
        except Exception:
            self._alive.discard(key)
            self._running.pop(key, None)
            raise

    def _add(self, spec: ChildSpec, event: AddChild) -> None:
        known = self._specs.get(spec.name)
        self._specs[spec.name] = spec
        try:
            self._happened(event)
        except Exception:
            self._specs.pop(spec.name)
            if known is not None:
                self._specs[spec.name] = known
            raise

    def next_generation(self) -> int:
        """A number no child of this supervisor had, for one that is to be adopted."""
        number = self._supervision.last_generation + 1
        self.skip_generations(number)
        return number

    def skip_generations(self, last: int) -> None:
        """Give no child a generation up to `last`: an earlier life of this supervisor used them."""
        self._supervision = replace(
            self._supervision, last_generation=max(last, self._supervision.last_generation)
        )

    def remove_child(self, name: str) -> None:
        """Stop a child and forget it. Raises UnknownChildError."""
        self._happened(RemoveChild(name))
        self._forget_spec(name)

    def running_child(self, name: str) -> Child | None:
        """The generation of a child that runs now."""
        return next((c for (known, _), c in self._running.items() if known == name), None)

    def report_end(self, name: str, generation: int, reason: ExitReason) -> None:
        """Tell the supervisor that a generation is gone. For this actor's thread.

        The end of a generation is told once: a second report has no effect.
        """
        self._ended(name, generation, reason)

    def actor_child(
        self,
        policy: ChildPolicy,
        actor: type[Actor],
        *args: Any,
        path: str | None = None,
        **kwargs: Any,
    ) -> ChildSpec:
        """A child that is an actor of this process."""
        return actor_child(self.system, policy, actor, *args, path=path, **kwargs)

    def child_ended(self, name: str, generation: int, reason: ExitReason) -> None:
        """Hook: a child is gone, whatever the reason."""

    def gave_up(self, reason: str) -> None:
        """Hook: too many restarts; everything below is stopped. The default fails."""
        self.end(ExitReason(ExitKind.FAULT, reason))

    def all_stopped(self, detail: str) -> None:
        """Hook: everything below is stopped, as asked."""
        self.end(ExitReason(ExitKind.SHUTDOWN, detail or "stopped"))

    # -- carrying out the policy -----------------------------------------------------------

    def on_start(self) -> None:
        self._happened(Tick())

    def on_stop_request(self, timeout: float) -> None:
        # Who asks gives this supervisor up at `timeout`; it must have given up its own by then.
        reserve = min(_ABANDON_AFTER, timeout / 4)
        self._happened(StopAll(self.system.clock() + timeout - reserve))

    def _release_children(self) -> None:
        """Ended with children left, by a fault: stop the actors, which nobody else would."""
        deadline = time.monotonic() + _ORPHANS_SECONDS
        for _, child in sorted(self._running.items(), key=lambda entry: entry[0][1], reverse=True):
            child.orphan(max(0.0, deadline - time.monotonic()))

    def _happened(self, event: Event) -> None:
        self._supervision, actions = decide(
            self._supervision,
            event,
            self.system.clock(),
            random.random(),  # noqa: S311 - jitter
        )
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        match action:
            case StartChild(name, generation):
                self._start_child(name, generation)
            case StopChild(name, generation, timeout):
                self._stop_child(name, generation, timeout)
            case ScheduleTick(at):
                self._schedule_tick(at)
            case Escalate(reason):
                self.gave_up(reason)
            case Finished(detail):
                self.all_stopped(detail)

    def _start_child(self, name: str, generation: int) -> None:
        # Events are posted, never handled within the one under way.
        def ready() -> None:
            self.post(lambda: self._happened(ChildStarted(name, generation)))

        def ended(reason: ExitReason) -> None:
            self.post(lambda: self._ended(name, generation, reason))

        self._alive.add((name, generation))
        try:
            self._running[name, generation] = self._specs[name].start(generation, ready, ended)
        except BaseException as error:  # SystemExit too is that child's own
            log.error("%s: child %s did not start", self.path, name, exc_info=error)
            detail = f"did not start: {type(error).__name__}: {error}"[:500]
            ended(ExitReason(ExitKind.FAULT, detail))

    def _stop_child(self, name: str, generation: int, timeout: float) -> None:
        child = self._running.get((name, generation))
        if child is None:
            # It did not start, or has ended: its end is in the mailbox.
            return
        try:
            child.stop(timeout)
        except Exception:
            log.exception("%s: child %s can't be asked to stop", self.path, name)
        overdue = self._stop_timers.pop((name, generation), None)
        if overdue is not None:
            overdue.cancel()

        def abandon() -> None:
            log.error("%s: child %s did not stop within %.1f s", self.path, name, timeout)
            self._ended(name, generation, ExitReason(ExitKind.FAULT, "did not stop; abandoned"))

        # The child keeps its own deadline; this one, a little later, is for those that can't.
        self._stop_timers[name, generation] = self.after(timeout + _ABANDON_AFTER, abandon)

    def _ended(self, name: str, generation: int, reason: ExitReason) -> None:
        if (name, generation) not in self._alive:
            return  # told before: it was abandoned, and has ended after all
        self._alive.discard((name, generation))
        self._running.pop((name, generation), None)
        timer = self._stop_timers.pop((name, generation), None)
        if timer is not None:
            timer.cancel()
        self.child_ended(name, generation, reason)
        if timer is not None:
            self._happened(ChildStopped(name, generation))
        else:
            self._happened(ChildExited(name, generation, reason))
        self._forget_spec(name)

    def _forget_spec(self, name: str) -> None:
        """A child that is gone for good must not be remembered: runs come and go by thousands."""
        if self._supervision.child(name) is None:
            self._specs.pop(name, None)

    def _schedule_tick(self, at: float) -> None:
        if self._tick is not None:
            self._tick.cancel()
        self._tick = self.after(at - self.system.clock(), lambda: self._happened(Tick()))


def actor_child(
    system: Any,
    policy: ChildPolicy,
    actor: type[Actor],
    *args: Any,
    path: str | None = None,
    **kwargs: Any,
) -> ChildSpec:
    """A child that is an actor of `system`, at `path` (its name where none is given)."""

    def start(
        generation: int, on_ready: Callable[[], None], on_end: Callable[[ExitReason], None]
    ) -> Child:
        return ActorChild(
            system.start(
                actor,
                path or policy.name,
                *args,
                generation=generation,
                on_ready=on_ready,
                on_end=on_end,
                supervised=True,
                **kwargs,
            )
        )

    return ChildSpec(policy, start)
