"""Messages between threads of one process, against bare pykka.

Peer: `pykka.ThreadingActor`'s own `ask` and `tell`. Ours does more on the way: a bounded mailbox,
a deadline that is checked, a typed message that is dispatched by type, counted asks.
Target: at least 0.9 times pykka's messages a second, for both.
How: rounds of both in turns, medians. An ask is one at a time. Tells are sent in bursts that the
mailbox can hold, each burst ended by one ask, so that what is counted is messages handled.
"""

from __future__ import annotations

from typing import Any

import pykka
from kit.measure import interleave, medians, seconds, start_report

from voidbus.actors.runtime.actor import Actor, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Delivery
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message

BURST = 5_000


class Note(Message, tag="bench.note"):
    text: str


class OurEcho(Actor):
    mailbox_limit = 2 * BURST

    @handles(Note)
    def on_note(self, message: Note, delivery: Delivery) -> Note:
        return message


class PykkaEcho(pykka.ThreadingActor):
    use_daemon_thread = True

    def on_receive(self, message: Any) -> Any:
        return message


def main() -> None:
    report, options = start_report(__file__, __doc__)
    asks, bursts, rounds = (200, 1, 2) if options.quick else (10_000, 4, 9)
    hub = Hub("supervisor", inproc_endpoints("in-process"))
    system = System(hub)
    system.start(OurEcho, "echo")
    peer: Any = PykkaEcho.start()
    note = Note(text="x" * 100)

    def our_asks() -> None:
        for _ in range(asks):
            hub.ask("supervisor/echo", note, timeout=5.0).result()

    def pykka_asks() -> None:
        for _ in range(asks):
            peer.ask(note, timeout=5.0)

    def our_tells() -> None:
        for _ in range(bursts):
            for _ in range(BURST):
                hub.tell("supervisor/echo", note, timeout=30.0)
            hub.ask("supervisor/echo", note, timeout=30.0).result()

    def pykka_tells() -> None:
        for _ in range(bursts):
            for _ in range(BURST):
                peer.tell(note)
            peer.ask(note, timeout=30.0)

    tells = bursts * (BURST + 1)
    found = interleave(
        rounds,
        {
            "ask": lambda: asks / seconds(our_asks),
            "pykka ask": lambda: asks / seconds(pykka_asks),
            "tell": lambda: tells / seconds(our_tells),
            "pykka tell": lambda: tells / seconds(pykka_tells),
        },
    )
    rates = medians(found)
    for name, rate in rates.items():
        report.figure(f"{name}s a second", rate)
    report.at_least("ask: ratio to pykka", rates["ask"] / rates["pykka ask"], 0.9)
    report.at_least("tell: ratio to pykka", rates["tell"] / rates["pykka tell"], 0.9)
    refused = hub.counters["fault_mailbox_full"]
    report.exactly("tells refused (they must all be handled)", refused, 0)
    peer.stop()
    system.stop(5.0)
    hub.close()
    report.write(options.results)


if __name__ == "__main__":
    main()
