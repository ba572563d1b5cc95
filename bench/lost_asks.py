"""Asks that race with the end of their actor: how many never end.

Peer: pykka's own actors. A pykka inbox takes what is put after the actor's last look at it, so an
ask can be left there for ever. Ours closes the mailbox first: an ask gets its reply or a fault.
Target: of 100,000 asks none lost; pykka's number stands beside it.
How: asking threads send asks without waiting while another thread stops the actor; the
interpreter switches threads every microsecond. When every asker is through, an ask that has
neither reply nor error is lost if it still has none after two seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pykka
from kit.measure import start_report

from voidbus.actors.runtime.actor import Actor, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Ask, Delivery
from voidbus.transport.fault import Fault
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message

ASKERS = 2
ASKS_EACH = 50
PATIENCE = 2.0


class Note(Message, tag="bench.note"):
    text: str


class OurEcho(Actor):
    mailbox_limit = ASKERS * ASKS_EACH

    @handles(Note)
    def on_note(self, message: Note, delivery: Delivery) -> Note:
        return message


class PykkaEcho(pykka.ThreadingActor):
    use_daemon_thread = True

    def on_receive(self, message: Any) -> Any:
        return message


def race(ask: Callable[[], None], stop: Callable[[], object], after: int) -> None:
    """Ask from several threads; when `after` asks were sent, stop the actor, and ask on."""
    sent = threading.Semaphore(0)

    def asker() -> None:
        for _ in range(ASKS_EACH):
            ask()
            sent.release()

    threads = [threading.Thread(target=asker) for _ in range(ASKERS)]
    for thread in threads:
        thread.start()
    for _ in range(after):
        sent.acquire()
    stop()
    for thread in threads:
        thread.join()


class OurSide:
    """Asks inside a hub's process, as the supervisor's actors ask each other."""

    def __init__(self) -> None:
        self._hub = Hub("supervisor", inproc_endpoints("lost-asks"))
        self._system = System(self._hub)
        self._note = Note(text="x")
        self.asked: list[Ask] = []
        self.replied = self.refused = 0

    def round(self, number: int) -> None:
        path = f"echo{number}"
        actor = self._system.start(OurEcho, path)
        dest = f"supervisor/{path}"

        def ask() -> None:
            self.asked.append(self._hub.ask(dest, self._note, timeout=3600.0))

        race(ask, lambda: actor.request_stop(5.0), number % (ASKERS * ASKS_EACH))
        self.settle()
        self._system.forget(path)

    def settle(self) -> None:
        """Count the asks that have ended; keep those that have not."""
        left = []
        for ask in self.asked:
            if not ask.ended:
                left.append(ask)
            elif isinstance(ask.outcome, Fault):
                self.refused += 1
            else:
                self.replied += 1
        self.asked = left

    def close(self) -> None:
        self._system.stop(5.0)
        self._hub.close()


class PykkaSide:
    """The same with pykka alone."""

    def __init__(self) -> None:
        self.asked: list[pykka.Future[Any]] = []
        self.replied = self.refused = 0

    def round(self, number: int) -> None:
        actor: Any = PykkaEcho.start()

        def ask() -> None:
            try:
                self.asked.append(actor.ask("x", block=False))
            except pykka.ActorDeadError:
                self.refused += 1

        race(ask, lambda: actor.stop(block=False), number % (ASKERS * ASKS_EACH))
        self.settle()

    def settle(self) -> None:
        left = []
        for future in self.asked:
            try:
                future.get(timeout=0)
                self.replied += 1
            except pykka.Timeout:
                left.append(future)
            except pykka.ActorDeadError:
                self.refused += 1
        self.asked = left


def main() -> None:
    report, options = start_report(__file__, __doc__)
    rounds = 20 if options.quick else 1_000
    ours, peer = OurSide(), PykkaSide()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(rounds):
            ours.round(number)
            peer.round(number)
    finally:
        sys.setswitchinterval(interval)
    deadline = time.monotonic() + PATIENCE
    while (ours.asked or peer.asked) and time.monotonic() < deadline:
        time.sleep(0.05)
        ours.settle()
        peer.settle()
    asked = rounds * ASKERS * ASKS_EACH
    for name, side in (("voidbus", ours), ("pykka", peer)):
        report.figure(f"{name}: asked", asked)
        report.figure(f"{name}: replied", side.replied)
        report.figure(f"{name}: told that the actor is gone", side.refused)
        report.figure(f"{name}: lost", len(side.asked))
    report.exactly("asks lost", len(ours.asked), 0)
    report.exactly("every ask is accounted for", ours.replied + ours.refused, asked)
    ours.close()
    report.write(options.results)


if __name__ == "__main__":
    main()
