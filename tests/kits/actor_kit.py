"""A system on an in-process hub, a clock that is told the time, and messages to send about."""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import ClassVar, TypeVar

from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.liveness import STUCK_SECONDS
from voidbus.actors.runtime.system import System
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Ask, Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message

# Longer than anything here takes on a busy machine; nothing waits for it when all is well.
PATIENCE = 20.0

_numbers = count()
M = TypeVar("M", bound=Message)


class Say(Message, tag="kit.say"):
    """Something said, with a number to tell one from another."""

    word: str = ""
    number: int = 0


class Answer(Message, tag="kit.answer"):
    word: str


class Urgent(Message, tag="kit.urgent"):
    """For the control lane."""

    number: int = 0


class Change(Message, tag="kit.change", changes=True):
    """A command."""

    word: str = ""


class Crash(Message, tag="kit.crash"):
    """Have the actor raise; `kind` is the name of a built-in exception."""

    kind: str = "RuntimeError"


class Unknown(Message, tag="kit.unknown"):
    """No actor of the kit handles this."""


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@contextlib.contextmanager
def local_system(
    clock: Callable[[], float] = time.monotonic, stuck_after: float = STUCK_SECONDS
) -> Iterator[System]:
    """A system on a hub; afterwards no thread and no descriptor of it may be left."""
    threads = set(threading.enumerate())
    descriptors = _descriptors()
    hub = Hub("here", inproc_endpoints(f"kit-{next(_numbers)}"))
    system = System(hub, clock=clock, stuck_after=stuck_after)
    try:
        yield system
    finally:
        stopped = system.stop(PATIENCE)
        hub.close()
        left = [t for t in threading.enumerate() if t not in threads]
        for thread in left:
            thread.join(5.0)
    assert stopped, "an actor did not stop"
    assert not [t for t in left if t.is_alive()]
    # What earlier tests left to the garbage collector may go at any time: only more is a leak.
    more = {fd: _leads_to(fd) for fd in _descriptors() - descriptors}
    assert not any(more.values()), more


def _descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def _leads_to(fd: str) -> str | None:
    """What a descriptor is open on; None where it was the look itself, and is closed again."""
    try:
        return str(Path("/proc/self/fd", fd).readlink())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    """Have threads interrupt one another far more often than they do by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ask(
    system: System, path: str, message: Message, *, timeout: float = PATIENCE, key: str = ""
) -> Ask:
    """Ask an actor of the system, as a client of the bus would."""
    return system.node.ask(f"here/{path}", message, timeout=timeout, sender="client", key=key)


def post(actor: Actor, *calls: Callable[[], object]) -> None:
    """Run these in the actor's thread, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    actor.post(run)


def reply(question: Ask, kind: type[M]) -> M:
    """The reply, which must be of this kind."""
    outcome = question.wait()
    assert isinstance(outcome, kind), outcome
    return outcome


def fault(question: Ask) -> FaultReason:
    """Why there was no reply."""
    return reply(question, Fault).reason


def delivery(
    message: Message, outcomes: list[Message] | None = None, *, age: float = 0
) -> Delivery:
    """A delivery whose answer is appended to `outcomes`; past its deadline where `age` > 0."""
    answers = outcomes if outcomes is not None else []
    return Delivery(
        "kit",
        "client",
        message,
        deadline=time.monotonic() + (-age if age else PATIENCE),
        answer=lambda message, _: answers.append(message),
    )


class Log:
    """Lines written by many threads, one to be waited for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._changed = threading.Condition()

    def add(self, line: str) -> None:
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()

    def wait_for(self, *lines: str) -> None:
        """Until each of these is there (twice, if given twice)."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: all(self.lines.count(line) >= lines.count(line) for line in lines), PATIENCE
            )
        assert there, f"{lines} expected, there is {self.lines}"

    def wait_count(self, number: int) -> None:
        """Until there are at least so many lines."""
        with self._changed:
            there = self._changed.wait_for(lambda: len(self.lines) >= number, PATIENCE)
        assert there, f"{number} lines expected, there are {self.lines}"


class Echo(Actor):
    """Answers what is said; crashes as told."""

    mailbox_limit = 32

    @handles(Say)
    def on_say(self, message: Say, delivery: Delivery) -> object:
        return Answer(word=message.word)

    @handles(Crash)
    def on_crash(self, message: Crash, delivery: Delivery) -> None:
        raise getattr(builtins, message.kind)("boom")


class Gate(Actor):
    """Blocks in its handler of Crash until it is let go; logs what it handles."""

    mailbox_limit = 32
    control: ClassVar[frozenset[type[Message]]] = frozenset({Urgent})

    def __init__(self, place: Place, log: Log) -> None:
        super().__init__(place)
        self.log = log
        self.blocked = threading.Event()
        self.let_go = threading.Event()

    @handles(Crash)
    def on_block(self, message: Crash, delivery: Delivery) -> None:
        self.blocked.set()
        assert self.let_go.wait(PATIENCE)

    @handles(Say, Urgent, Change)
    def on_other(self, message: Say | Urgent, delivery: Delivery) -> None:
        self.log.add(f"{type(message).__name__} {getattr(message, 'number', '')}".strip())

    def on_stop(self) -> None:
        self.log.add("stopped")


def blocked_gate(system: System, log: Log) -> Gate:
    gate = system.start(Gate, "gate", log)
    system.node.tell("here/gate", Crash())
    assert gate.blocked.wait(PATIENCE)
    return gate
