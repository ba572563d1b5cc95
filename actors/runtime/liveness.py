"""Which actors of a process are stuck: at one message for longer than any handler may take.

An actor notes what it is at and since when; a check where the node is driven looks at all of
them. It is set only while an actor is at something, for the moment at which that could have lasted
too long. So a process at rest is not woken, and a busy one once in `stuck_after` seconds.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from threading import Thread
from typing import NamedTuple

from voidbus.actors.messages.actor import ActorStuck, ActorWentOn, liveness_topic
from voidbus.transport.delivery import Delivery
from voidbus.transport.node import Node

log = logging.getLogger("voidbus.actors")

# Handlers don't wait for a guest, a child process or the network. The longest they may take is
# SQLite's busy timeout (5 s), or a start or an end that joins a thread (5 s).
STUCK_SECONDS = 10.0

_monotonic = time.monotonic


class Activity:
    """What one actor is at. Written by its thread, read by any."""

    __slots__ = ("_began", "_item", "thread")

    def __init__(self) -> None:
        self._began = 0.0
        self._item: object = None
        self.thread: Thread | None = None

    def begin(self, item: object) -> float:
        """`item` is a delivery, a call, or a word for what else an actor does. Returns when it was
        begun (monotonic).
        """
        # In this order: whoever sees the item sees when it was begun, or something later.
        now = self._began = _monotonic()
        self._item = item
        return now

    def end(self) -> None:
        self._item = None

    def current(self) -> tuple[object, float] | None:
        """The item the actor is at and when it was begun (monotonic); None where it waits."""
        item = self._item
        return None if item is None else (item, self._began)


class _Stuck(NamedTuple):
    item: object
    began: float


class Liveness:
    """Watches the actors of one system. `living` gives them by path, on any thread."""

    def __init__(
        self, node: Node, living: Callable[[], Iterable[tuple[str, Activity]]], stuck_after: float
    ) -> None:
        self._node = node
        self._living = living
        self._topic = liveness_topic(node.name)
        self._stuck: dict[str, _Stuck] = {}
        self.stuck_after = stuck_after
        self.armed = False

    def arm(self) -> None:
        """An actor is at something, and no check is set. Any thread."""
        self.armed = True
        self._node.wake_at(_monotonic() + self.stuck_after, self._check)

    def stuck_for(self, activity: Activity) -> tuple[float, str] | None:
        """How long (seconds) an actor has been stuck, and in what; None where it isn't."""
        current = activity.current()
        if current is None or _monotonic() - current[1] < self.stuck_after:
            return None
        return _monotonic() - current[1], name_of(current[0])

    def _check(self) -> None:
        """By the thread that drives the node."""
        # First: an actor that begins something from here on sets the next check itself.
        self.armed = False
        now = _monotonic()
        due: list[float] = []
        living = dict(self._living())
        for path in [path for path in self._stuck if path not in living]:
            del self._stuck[path]
        for path, activity in living.items():
            current = activity.current()
            self._note_progress(path, current, now)
            if current is None:
                continue
            if now - current[1] < self.stuck_after:
                due.append(current[1] + self.stuck_after)
                continue
            self._note_stuck(path, activity, _Stuck(*current), now)
            due.append(now + self.stuck_after / 2)
        if due and not self.armed:
            self.armed = True
            self._node.wake_at(min(due), self._check)

    def _note_stuck(self, path: str, activity: Activity, stuck: _Stuck, now: float) -> None:
        if path in self._stuck:
            return
        self._stuck[path] = stuck
        name, seconds = name_of(stuck.item), now - stuck.began
        stack = _stack_of(activity.thread)
        log.error(
            "%s/%s is stuck: %.0f s in %s. It is at:\n%s",
            self._node.name,
            path,
            seconds,
            name,
            "".join(stack) or "(its thread has ended)",
        )
        self._node.publish(self._topic, ActorStuck(path=path, handler=name, seconds=seconds))

    def _note_progress(self, path: str, current: tuple[object, float] | None, now: float) -> None:
        stuck = self._stuck.get(path)
        if stuck is None or current == stuck:
            return
        del self._stuck[path]
        name, seconds = name_of(stuck.item), now - stuck.began
        log.warning("%s/%s went on after %s", self._node.name, path, name)
        self._node.publish(self._topic, ActorWentOn(path=path, handler=name, seconds=seconds))


def name_of(item: object) -> str:
    """What an actor is at, for an operator: the type of a message, or the name of a function."""
    if isinstance(item, Delivery):
        return item.message.tag
    while isinstance(item, partial):
        item = item.func
    if isinstance(item, str):
        return item
    return getattr(item, "__qualname__", None) or type(item).__name__


def _stack_of(thread: Thread | None) -> list[str]:
    frame = sys._current_frames().get(thread.ident) if thread and thread.ident else None
    return traceback.format_stack(frame) if frame is not None else []
