"""A system: the actors of one process, on one node."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from voidbus.actors.messages.actor import (
    ActorStatus,
    Inspect,
    InspectSystem,
    SystemStatus,
    Terminated,
)
from voidbus.actors.runtime.actor import Actor, Place
from voidbus.actors.runtime.liveness import STUCK_SECONDS, Activity, Liveness
from voidbus.actors.runtime.policy_model import ExitKind, ExitReason
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message
from voidbus.transport.node import Node

A = TypeVar("A", bound=Actor)

log = logging.getLogger("voidbus.actors")

# Where a node answers for itself: `run-42/system`.
SYSTEM_PATH = "system"

# A notice is handled however late: no actor's queue lasts longer than a day.
_NOTICE_SECONDS = 86400.0

# Of the time a system has to stop, what the supervisors get to stop what they keep, in order; the
# rest is for actors nobody stopped.
_SUPERVISED_SHARE = 0.8


@dataclass
class _Entry:
    actor: Actor
    started: float
    on_ready: Callable[[], None] | None
    on_end: Callable[[ExitReason], None] | None
    supervised: bool


class System:
    """Starts actors, knows them by path, and tells who asked when one has ended."""

    def __init__(
        self,
        node: Node,
        *,
        clock: Callable[[], float] = time.monotonic,
        stuck_after: float = STUCK_SECONDS,
    ) -> None:
        self.node = node
        self.clock = clock
        self.liveness = Liveness(node, self._activities, stuck_after)
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._reserved: set[str] = set()  # paths whose actor is being made
        self._stopping: list[Actor] | None = None  # those to be joined at the end of `stop`
        self._watchers: dict[str, set[str]] = {}
        self._restarts: dict[str, int] = {}
        self._last_faults: dict[str, str] = {}
        self._generations: dict[str, int] = {}
        self._empty = threading.Condition(self._lock)
        node.attach(SYSTEM_PATH, self)

    def start(
        self,
        actor: type[A],
        path: str,
        *args: Any,
        generation: int | None = None,
        on_ready: Callable[[], None] | None = None,
        on_end: Callable[[ExitReason], None] | None = None,
        supervised: bool = False,
        **kwargs: Any,
    ) -> A:
        """Start an actor at `path`. `on_ready` is called when it takes messages, `on_end` when it
        is gone, each once and by its thread; what they raise is logged. Neither is called where
        this raises. A `supervised` actor is stopped by its supervisor when the system stops.

        Raises ValueError where the path is taken, and whatever the actor's constructor raises.
        """
        with self._lock:
            if path in self._entries or path in self._reserved:
                raise ValueError(f"an actor lives at {path}")
            self._reserved.add(path)
            known = self._generations.get(path, 0)
            number = known + 1 if generation is None else generation
            if known:
                self._restarts[path] = self._restarts.get(path, 0) + 1
            self._generations[path] = number
        try:
            started = actor(Place(self, path, number), *args, **kwargs)
            self.node.attach(path, started)
            entry = _Entry(started, self.clock(), on_ready, on_end, supervised)
            with self._lock:
                self._entries[path] = entry
                self._reserved.discard(path)
            try:
                started.launch()
            except BaseException:
                self.node.detach(path)
                started.discard()
                raise
        except BaseException as error:
            self._not_started(path, number, f"{type(error).__name__}: {error}"[:500])
            raise
        return started

    def _not_started(self, path: str, generation: int, detail: str) -> None:
        with self._lock:
            self._reserved.discard(path)
            self._entries.pop(path, None)
            self._last_faults[path] = detail
            watchers = self._watchers.pop(path, set())
            self._empty.notify_all()
        for watcher in watchers:
            self._notify(
                watcher,
                Terminated(
                    path=path, generation=generation, reason=ExitKind.FAULT.value, detail=detail
                ),
            )

    def find(self, path: str) -> Actor | None:
        with self._lock:
            entry = self._entries.get(path)
        return entry.actor if entry else None

    def tell_wait(
        self, path: str, message: Message, *, sender: str, timeout: float
    ) -> FaultReason | None:
        """Tell an actor of this system, waiting for room: a reader thread's back-pressure."""
        actor = self.find(path)
        if actor is None:
            return FaultReason.NO_SUCH_ACTOR
        delivery = Delivery(path, sender, message, deadline=time.monotonic() + _NOTICE_SECONDS)
        return actor.mailbox.put_wait(delivery, timeout)

    def watch(self, path: str, watcher: str) -> None:
        """Send `watcher` a Terminated when the actor at `path` ends; at once where none lives.

        It comes after `on_stop` and the actor's jobs, once for each actor that ended however often
        it was watched, and a full mailbox does not refuse it.
        """
        with self._lock:
            if path in self._entries or path in self._reserved:
                self._watchers.setdefault(path, set()).add(watcher)
                return
        self._notify(
            watcher,
            Terminated(path=path, generation=0, reason="no_such_actor", detail="nothing is there"),
        )

    def started(self, actor: Actor) -> None:
        """Called by an actor's thread when `on_start` has returned."""
        with self._lock:
            entry = self._entries.get(actor.path)
        if entry is None or entry.on_ready is None:
            return
        try:
            entry.on_ready()
        except Exception:
            log.exception("%s: who waited for its start failed", actor.path)

    def ended(self, actor: Actor) -> None:
        """Called by an actor's thread as its last act."""
        reason = actor.exit_reason or ExitReason(ExitKind.NORMAL)
        with self._lock:
            entry = self._entries.pop(actor.path, None)
            watchers = self._watchers.pop(actor.path, set())
            for others in self._watchers.values():
                others.discard(actor.path)
            if self._stopping is not None:
                self._stopping.append(actor)
            if reason.kind is ExitKind.FAULT:
                self._last_faults[actor.path] = reason.detail
            self._empty.notify_all()
        for watcher in watchers:
            self._notify(
                watcher,
                Terminated(
                    path=actor.path,
                    generation=actor.generation,
                    reason=reason.kind.value,
                    detail=reason.detail,
                ),
            )
        if entry is None or entry.on_end is None:
            return
        try:
            entry.on_end(reason)
        except Exception:
            log.exception("%s: who waited for its end failed", actor.path)

    def _notify(self, watcher: str, notice: Terminated) -> None:
        actor = self.find(watcher)
        if actor is not None:
            deadline = time.monotonic() + _NOTICE_SECONDS
            actor.notice(Delivery(watcher, SYSTEM_PATH, notice, deadline=deadline))
        else:
            self.node.tell(f"{self.node.name}/{watcher}", notice, sender=SYSTEM_PATH)

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        """Answer for the system itself, on the bus's thread: it must work when actors don't."""
        if isinstance(delivery.message, InspectSystem | Inspect):
            delivery.reply(self.describe())
            return None
        delivery.fail(FaultReason.UNHANDLED, "the system answers inspection only")
        return None

    def describe(self) -> SystemStatus:
        """All actors, by path, from any thread."""
        with self._lock:
            paths = sorted(self._entries)
        actors = []
        for path in paths:
            status = self.status_or_none(path)
            if status is not None:
                actors.append(status)
        return SystemStatus(
            node=self.node.name,
            pid=os.getpid(),
            threads=threading.active_count(),
            actors=tuple(actors),
            counters=dict(self.node.counters),
        )

    def status(self, path: str) -> ActorStatus:
        """One actor. Raises LookupError where none lives at `path`."""
        status = self.status_or_none(path)
        if status is None:
            raise LookupError(f"no actor lives at {path}")
        return status

    def status_or_none(self, path: str) -> ActorStatus | None:
        with self._lock:
            entry = self._entries.get(path)
            restarts = self._restarts.get(path, 0)
            last_fault = self._last_faults.get(path, "")
        if entry is None:
            return None
        mailbox = entry.actor.mailbox.statistics()
        stuck = self.liveness.stuck_for(entry.actor.activity)
        state = "stopping" if entry.actor.exit_reason else "running"
        return ActorStatus(
            path=path,
            kind=type(entry.actor).__name__,
            generation=entry.actor.generation,
            state="stuck" if stuck else state,
            age=self.clock() - entry.started,
            depth=mailbox.depth,
            control_depth=mailbox.control_depth,
            limit=mailbox.limit,
            head_age=mailbox.head_age,
            handled=entry.actor.handled,
            refused=mailbox.refused,
            shed=mailbox.shed,
            restarts=restarts,
            last_fault=last_fault,
            stuck_for=stuck[0] if stuck else 0.0,
            handler=stuck[1] if stuck else "",
        )

    def _activities(self) -> list[tuple[str, Activity]]:
        with self._lock:
            return [(path, entry.actor.activity) for path, entry in self._entries.items()]

    def forget(self, path: str) -> None:
        """Drop the history of a path that will not be used again."""
        with self._lock:
            if path not in self._entries:
                for table in (self._restarts, self._generations):
                    table.pop(path, None)
                self._last_faults.pop(path, None)

    def wait_empty(self, timeout: float) -> bool:
        """Wait until no actor lives here."""
        deadline = time.monotonic() + timeout
        with self._empty:
            return self._empty.wait_for(
                lambda: not self._entries, max(0.0, deadline - time.monotonic())
            )

    def stop(self, timeout: float) -> bool:
        """Ask every actor to stop and wait; whether all did. For the end of a process.

        Supervisors stop their own children, in their order. An actor that is stuck is left: its
        thread is a daemon.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._stopping = []
        self._ask_to_stop(lambda entry: not entry.supervised, timeout * _SUPERVISED_SHARE)
        if not self.wait_empty(timeout * _SUPERVISED_SHARE):
            self._ask_to_stop(lambda _: True, deadline - time.monotonic())
        stopped = self.wait_empty(deadline - time.monotonic())
        with self._lock:
            ended, self._stopping = self._stopping, None
        for actor in ended:
            actor.join(1.0)
        self.node.detach(SYSTEM_PATH)
        return stopped

    def _ask_to_stop(self, chosen: Callable[[_Entry], bool], timeout: float) -> None:
        with self._lock:
            actors = [entry.actor for entry in self._entries.values() if chosen(entry)]
        for actor in actors:
            actor.request_stop(max(0.0, timeout))
