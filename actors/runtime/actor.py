"""Actors: pykka's threads and references, our mailbox and our loop.

An actor is one thread that takes one message at a time. Handlers are methods marked with
`@handles(MessageType)`; what they must wait for (a guest, a child process, the network) they start
with `ask`, `work` or `after` and get as a call in their own thread, so that commands and
questions are answered meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import pykka

from voidbus.actors.messages.actor import Done, Inspect, Terminated
from voidbus.actors.runtime.liveness import Activity
from voidbus.actors.runtime.mailbox import Item, Mailbox, Overflow, Waited
from voidbus.actors.runtime.policy_model import ExitKind, ExitReason
from voidbus.actors.runtime.pykka_inbox import PykkaInbox
from voidbus.actors.runtime.replies import CommandReplies, Unanswered
from voidbus.actors.runtime.timers import Timer, TimerQueue
from voidbus.transport.delivery import Ask, Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

if TYPE_CHECKING:
    from voidbus.actors.runtime.system import System

_monotonic = time.monotonic
log = logging.getLogger("voidbus.actors")

T = TypeVar("T")
Outcome = Message  # of an ask: the reply, or a Fault

# Replies to commands are kept this long for repeats: a client retries for 30 s at most.
_STORED_REPLIES = 1024
_STORED_REPLY_SECONDS = 120.0
# Blocking jobs one actor may have under way, and how long its end waits for them.
_WORK_LIMIT = 16
_WORK_JOIN_SECONDS = 5.0


class _Later:
    """What a handler returns when it will answer through the delivery."""


LATER: Final = _Later()


class Refuse(Exception):
    """Raised by a handler to answer with a fault without failing itself."""

    def __init__(self, detail: str, reason: FaultReason = FaultReason.REFUSED) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where an actor lives: its system, its path in it, and which start of it this is."""

    system: System
    path: str
    generation: int


Handler = Callable[[Any, Any, Delivery], Any]
H = TypeVar("H", bound=Callable[..., object])


def handles(*types: type[Message]) -> Callable[[H], H]:
    """Mark a method as the handler of these message types.

    It is called with the message and its Delivery. It returns the reply (None answers `Done`), or
    LATER and answers through the delivery, in the actor's own thread; `Refuse` answers with a
    fault; any other exception answers with a fault and ends the actor, for its supervisor to
    start again.

    A subclass that overrides the method handles the same types with it, unless it marks it anew.
    The repeat of a command (`Message.changes`) gets the stored reply; a fault is not stored, so a
    command that was refused may be tried again.
    """

    def mark(method: H) -> H:
        method.__handles__ = types  # type: ignore[attr-defined]
        return method

    return mark


class Actor(pykka.ThreadingActor):
    """Base of all actors.

    A subclass names `mailbox_limit` and may name `overflow`, and `control`: the message types
    that overtake others. `on_start`, `on_stop_request` and `on_stop` run in the actor's thread;
    `on_stop` runs however it ends. Whatever is raised there or in a handler, SystemExit and
    KeyboardInterrupt too, ends this actor only.
    """

    use_daemon_thread: ClassVar[bool] = True

    mailbox_limit: ClassVar[int] = 0
    overflow: ClassVar[Overflow] = Overflow.REFUSE
    control: ClassVar[frozenset[type[Message]]] = frozenset()

    _handlers: ClassVar[dict[type[Message], Handler]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        marked: dict[str, tuple[type[Message], ...]] = {}
        for parent in reversed(cls.__mro__):
            for name, value in vars(parent).items():
                types = getattr(value, "__handles__", None)
                if types is not None:
                    marked.pop(name, None)  # what a subclass marks comes last and wins
                    marked[name] = types
        cls._handlers = {
            message: getattr(cls, name) for name, types in marked.items() for message in types
        }

    @classmethod
    def _create_actor_inbox(cls) -> Any:
        if cls.mailbox_limit < 1:
            raise TypeError(f"{cls.__name__} names no mailbox_limit; there is no default")
        return PykkaInbox(Mailbox(cls.mailbox_limit, cls.overflow), cls.overflow)

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.system = place.system
        self.path = place.path
        self.generation = place.generation
        self._pykka: PykkaInbox = self.actor_inbox  # type: ignore[assignment]
        self._pykka.owner = place.path
        self._pykka.handle = self._handle_receive
        self.mailbox: Mailbox = self._pykka.mailbox
        self.mailbox.drive(place.system.node.driver)
        self.activity = Activity()
        self.handled = 0
        self.exit_reason: ExitReason | None = None
        self._timers = TimerQueue(lambda: self.system.clock())
        self._replies = CommandReplies(_STORED_REPLIES, _STORED_REPLY_SECONDS)
        self._unanswered = Unanswered()
        self._work: set[threading.Thread] = set()
        self._under_way = 0
        self._thread: threading.Thread | None = None

    # -- hooks -----------------------------------------------------------------------------

    def on_start(self) -> None:
        """Runs first. An exception is a failed start."""

    def on_stop_request(self, timeout: float) -> None:
        """Asked to stop within `timeout` seconds. The default ends at once.

        A second request may come with less time.
        """
        self.end(ExitReason(ExitKind.SHUTDOWN, "stopped"))

    def on_stop(self) -> None:
        """Runs last, however the actor ends; frees what it holds."""

    # -- what an actor does ----------------------------------------------------------------

    def tell(self, dest: str, message: Message, *, timeout: float = 30.0) -> None:
        """Send and forget. What can't be delivered comes back as a Fault message."""
        self.system.node.tell(dest, message, timeout=timeout, sender=self.path)

    def ask(
        self,
        dest: str,
        message: Message,
        then: Callable[[Outcome], None],
        *,
        timeout: float,
        attachments: Sequence[bytes] = (),
        key: str = "",
    ) -> None:
        """Ask, and call `then` in this thread with the reply or the Fault."""

        def deliver(ask: Ask) -> None:
            outcome = ask.outcome
            assert outcome is not None
            self.mailbox.put(lambda: then(outcome), control=True)

        self.system.node.ask(
            dest,
            message,
            timeout=timeout,
            sender=self.path,
            attachments=attachments,
            key=key,
            on_end=deliver,
        )

    def publish(self, topic: str, message: Message) -> None:
        self.system.node.publish(topic, message)

    def after(self, seconds: float, run: Callable[[], None]) -> Timer:
        """Call `run` in this thread in `seconds`. For this actor's own thread."""
        return self._timers.after(seconds, run)

    def post(self, run: Callable[[], None], *, control: bool = True) -> FaultReason | None:
        """Call `run` in this actor's thread; may be called by any thread."""
        return self.mailbox.put(run, control=control)

    def post_wait(self, run: Callable[[], None], timeout: float) -> FaultReason | None:
        """Like `post` behind the data messages, waiting for room: back-pressure for a reader."""
        return self.mailbox.put_wait(run, timeout)

    def work(
        self, job: Callable[[], T], then: Callable[[T | Exception], None], *, name: str = "work"
    ) -> None:
        """Run `job`, which may block but has its own deadline, on a thread; `then` runs here.

        `then` gets what the job returned or raised. The actor's end waits for its jobs after
        `on_stop`, which may hurry them. Raises Refuse when too many jobs are under way.
        """
        if self._under_way >= _WORK_LIMIT:
            raise Refuse(f"{self.path}: {_WORK_LIMIT} jobs are under way", FaultReason.OVERLOADED)

        def run() -> None:
            try:
                outcome: T | Exception = job()
            except Exception as error:  # noqa: BLE001 - it is handed to the actor
                outcome = error
            except BaseException as error:  # noqa: BLE001 - `then` must hear of it all the same
                outcome = RuntimeError(f"the job was ended by {type(error).__name__}: {error}")
            self.mailbox.put(lambda: ended(outcome), control=True)

        def ended(outcome: T | Exception) -> None:
            self._under_way -= 1
            then(outcome)

        self._work = {thread for thread in self._work if thread.is_alive()}
        thread = threading.Thread(target=run, name=f"{self.path}-{name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no thread left
            raise Refuse(f"{self.path}: {error}", FaultReason.OVERLOADED) from error
        self._work.add(thread)
        self._under_way += 1

    def watch(self, path: str) -> None:
        """Get a Terminated message when the actor at `path` of this system ends."""
        self.system.watch(path, self.path)

    def end(self, reason: ExitReason) -> None:
        """End this actor after the current handler. For its own thread."""
        if self.exit_reason is None:
            self.exit_reason = reason

    # -- what others do to it --------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        """Take a message from the bus. Any thread."""
        return self.mailbox.put(delivery, control=type(delivery.message) in self.control)

    def notice(self, delivery: Delivery) -> None:
        """Take a notice it asked for, which no full mailbox may refuse. Any thread."""
        self.mailbox.put(lambda: self._take(delivery, _monotonic()), control=True)

    def request_stop(self, timeout: float) -> None:
        """Ask the actor to stop. Any thread."""
        self.mailbox.put(lambda: self.on_stop_request(timeout), control=True)

    def join(self, timeout: float) -> bool:
        """Wait for the actor's thread to end."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the loop --------------------------------------------------------------------------

    def launch(self) -> None:
        """Start the thread. `System.start` calls it once the actor can be reached."""
        pykka.ActorRegistry.register(self.actor_ref)
        self._start_actor_loop()

    def discard(self) -> None:
        """Turn away what came for an actor whose thread could not be started."""
        self.actor_stopped.set()
        pykka.ActorRegistry.unregister(self.actor_ref)
        for item in self.mailbox.close():
            self._turn_away(item)

    def _stop(self) -> None:
        self.end(ExitReason(ExitKind.SHUTDOWN, "stopped"))

    def _start_actor_loop(self) -> None:
        self._thread = threading.Thread(target=self._actor_loop, name=self.path, daemon=True)
        self._thread.start()

    def _actor_loop(self) -> None:
        activity, liveness = self.activity, self.system.liveness
        activity.thread = self._thread
        try:
            self._now_at("on_start")
            self.on_start()
            self.system.started(self)
            while self.exit_reason is None:
                wait = None
                if self._timers:  # mostly there are none, and to look costs a message's fifth
                    self._now_at("a timer")
                    wait = self._timers.run_due(self._ending)
                    if self._ending():
                        break
                activity.end()
                item = self.mailbox.get(wait)
                if item is not None:
                    now = activity.begin(item)
                    if not liveness.armed:
                        liveness.arm()
                    self.handled += 1
                    self._take(item, now)
        except BaseException as error:  # noqa: BLE001 - SystemExit too ends this actor only
            self._fail(error)
        self._now_at("on_stop")
        self._finish()
        activity.end()

    def _now_at(self, what: str) -> None:
        self.activity.begin(what)
        if not self.system.liveness.armed:
            self.system.liveness.arm()

    def _ending(self) -> bool:
        return self.exit_reason is not None

    def _take(self, item: Item, now: float) -> None:
        if not isinstance(item, Delivery):
            item()
        elif now >= item.deadline:
            self._drop(item, FaultReason.EXPIRED, "its deadline passed in the mailbox")
        else:
            self._handle(item)

    def _drop(self, delivery: Delivery, reason: FaultReason, detail: str) -> None:
        """Fail an ask; a tell, of which nobody would hear, is at least counted."""
        if not delivery.wants_reply:
            self.system.node.counters[f"fault_{reason.value}"] += 1
        delivery.fail(reason, detail)

    def _handle(self, delivery: Delivery) -> None:
        message = delivery.message
        handler = self._handlers.get(type(message))
        if handler is None:
            self._handle_unknown(delivery)
            return
        if delivery.wants_reply and message.changes and not self._begin_command(delivery):
            return
        try:
            answer = handler(self, message, delivery)
        except Refuse as refusal:
            delivery.fail(refusal.reason, str(refusal))
            return
        except BaseException as error:
            detail = f"{type(error).__name__} in {self.path}: {error}"
            delivery.fail(FaultReason.FAILED, detail[:500])
            raise
        if not delivery.wants_reply:
            return
        if isinstance(answer, _Later):
            self._unanswered.add(delivery)
        else:
            delivery.reply(answer if answer is not None else Done())

    def _begin_command(self, delivery: Delivery) -> bool:
        """Whether to carry a command out; a repeat gets the first one's reply instead."""
        if not delivery.key:
            return True
        node = delivery.sender.partition("/")[0]
        key = f"{node}:{delivery.message.tag}:{delivery.key}"
        if not self._replies.begin(key, delivery, _monotonic()):
            return False
        replies = self._replies
        delivery.tap(lambda reply, attachments: replies.finish(key, reply, attachments))
        return True

    def _handle_unknown(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, Fault):
            log.info("%s: a message came back: %s", self.path, delivery.message.detail)
            return
        self.system.node.counters["fault_unhandled"] += 1
        delivery.fail(FaultReason.UNHANDLED, f"{self.path} does not handle {delivery.message.tag}")

    @handles(Inspect)
    def on_inspect(self, message: Inspect, delivery: Delivery) -> Message:
        """Answered from the mailbox, so that a stuck actor is seen though its process lives."""
        return self.system.status(self.path)

    def _fail(self, error: BaseException) -> None:
        log.error("%s failed: %s", self.path, error, exc_info=error)
        if self.exit_reason is None or self.exit_reason.kind is not ExitKind.FAULT:
            detail = f"{type(error).__name__}: {error}"[:500]
            self.exit_reason = ExitReason(ExitKind.FAULT, detail)

    def _finish(self) -> None:
        """End: whatever fails on the way, everyone who waits is told."""
        self.actor_stopped.set()
        pykka.ActorRegistry.unregister(self.actor_ref)
        self.system.node.detach(self.path)
        rest = self.mailbox.close()
        self._safely(self._release_children)
        self._safely(self.on_stop)
        for item in rest:
            self._safely(partial(self._turn_away, item))
        self._safely(lambda: self._unanswered.fail(f"{self.path} stopped before answering"))
        self._safely(self._pykka.stopped)
        self._safely(self._join_work)
        self.system.ended(self)

    def _safely(self, step: Callable[[], None]) -> None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - the others must still be told
            self._fail(error)

    def _release_children(self) -> None:
        """For supervisors: stop what this actor would leave behind."""

    def _turn_away(self, item: Item) -> None:
        if isinstance(item, Delivery):
            self._drop(item, FaultReason.MAILBOX_CLOSED, f"{self.path} stopped before handling it")
        elif isinstance(item, Waited):
            item.refuse(FaultReason.MAILBOX_CLOSED)

    def _join_work(self) -> None:
        deadline = _monotonic() + _WORK_JOIN_SECONDS
        for thread in self._work:
            thread.join(max(0.0, deadline - _monotonic()))
            if thread.is_alive():
                log.error("%s: its job %s did not end", self.path, thread.name)


__all__ = ["LATER", "Actor", "Place", "Refuse", "Terminated", "Timer", "handles"]
