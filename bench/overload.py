"""Ten times what a receiver can take: memory stays flat and every message is accounted for.

No peer: pykka, xoscar and thespian have unbounded queues, so they grow until they are killed.
Target: resident memory of both processes, late against early, at most 5 % up; and the sums agree
exactly: a tell is refused where it is sent, or handled, or comes back as a fault, or is counted as
expired by the receiver; an ask ends.
How: the supervisor's process sends to a slow actor in a run's process for 30 seconds (3 quick),
ten times the rate measured before; one message in ten is an ask. The receiver's mailbox holds
1,000 and refuses; every other tell expires before its turn comes there. What comes back for a tell
is delivered to the tell's sender, an actor that counts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from kit.measure import start_report
from peers.run_like import NODE, RunLike, Tallied, Tally, Work

from voidbus.actors.messages.actor import InspectSystem, SystemStatus
from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Ask, Delivery
from voidbus.transport.fault import Fault

WORKER = f"{NODE}/worker"
WORK = Work(text="x" * 1000)
TIMES = 10
MAILBOX = 100_000
# Seconds after which every other tell is worth nothing: shorter than the wait in a full mailbox.
SHORT = 0.5


class Sender(Actor):
    """Gets back what could not be delivered."""

    mailbox_limit = MAILBOX

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.returned: Counter[str] = Counter()

    @handles(Fault)
    def on_fault(self, message: Fault, delivery: Delivery) -> None:
        self.returned[message.reason.value] += 1


class Asked:
    """Asks, counted by how they ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ended: Counter[str] = Counter()
        self.sent = 0

    def end(self, ask: Ask) -> None:
        outcome = ask.outcome
        how = outcome.reason.value if isinstance(outcome, Fault) else "replied"
        with self._lock:
            self.ended[how] += 1


def resident(pid: int) -> int:
    """Bytes (proc_pid_status(5), VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"process {pid} is gone")


def capacity(link: RunLike) -> float:
    """Messages a second the worker takes."""
    start = time.perf_counter()
    asks = [link.hub.ask(WORKER, WORK, timeout=10.0) for _ in range(300)]
    for ask in asks:
        ask.result()
    return 300 / (time.perf_counter() - start)


def tally(link: RunLike) -> int:
    told = link.hub.ask(WORKER, Tally(), timeout=10.0).result()
    assert isinstance(told, Tallied)
    return told.handled


def receiver_status(link: RunLike) -> SystemStatus:
    status = link.hub.ask(f"{NODE}/system", InspectSystem(), timeout=10.0).result()
    assert isinstance(status, SystemStatus)
    return status


def settle(link: RunLike, asked: Asked) -> int:
    """Wait until nothing is on the way any more; how many were handled in all."""
    handled = -1
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        depth = next(a.depth for a in receiver_status(link).actors if a.path == "worker")
        now = tally(link)
        if depth == 0 and now == handled and sum(asked.ended.values()) == asked.sent:
            break
        handled = now
        time.sleep(0.1)
    return handled


@dataclass
class Load:
    """What was sent, and what memory did meanwhile: (sender's, receiver's) bytes."""

    tells: int = 0
    refused: int = 0
    seconds: float = 0.0
    samples: list[tuple[int, int]] = field(default_factory=list)


def overload(link: RunLike, asked: Asked, rate: float, length: float) -> Load:
    """Send `rate` messages a second for `length` seconds."""
    load = Load()
    receiver = receiver_status(link).pid
    step = 0.01
    share = max(1, round(rate * step))
    start = time.perf_counter()
    for tick in range(round(length / step)):
        for number in range(share):
            if number % 10 == 0:
                asked.sent += 1
                link.hub.ask(WORKER, WORK, timeout=60.0, sender="sender", on_end=asked.end)
                continue
            load.tells += 1
            timeout = SHORT if number % 2 else 60.0
            if link.hub.tell(WORKER, WORK, timeout=timeout, sender="sender") is not None:
                load.refused += 1
        if tick % 20 == 0:
            load.samples.append((resident(os.getpid()), resident(receiver)))
        ahead = start + (tick + 1) * step - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
    load.seconds = time.perf_counter() - start
    return load


def main() -> None:
    report, options = start_report(__file__, __doc__)
    length = 3.0 if options.quick else 30.0
    with RunLike() as link:
        system = System(link.hub)
        sender = system.start(Sender, "sender")
        rate = capacity(link)
        before = tally(link)
        asked = Asked()
        load = overload(link, asked, rate * TIMES, length)
        handled_meanwhile = tally(link) - before
        handled = settle(link, asked) - before
        # Whether an expired tell also comes back is the runtime's business; counted it must be.
        expired = receiver_status(link).counters.get("fault_expired", 0)
        system.stop(5.0)
    expired = max(0, expired - sender.returned["expired"])
    handled_tells = handled - asked.ended["replied"]
    returned = sum(sender.returned.values())
    report.figure("receiver takes, messages a second", rate)
    report.figure("offered, messages a second", (load.tells + asked.sent) / load.seconds)
    report.figure("handled meanwhile, messages a second", handled_meanwhile / load.seconds)
    report.figure("tells sent", load.tells)
    report.figure("tells refused where they were sent", load.refused)
    report.figure("tells handled", handled_tells)
    for reason, count in sorted(sender.returned.items()):
        report.figure(f"tells come back: {reason}", count)
    report.figure("tells expired in the mailbox, by its count", expired)
    report.figure("asks sent", asked.sent)
    for reason, count in sorted(asked.ended.items()):
        report.figure(f"asks ended: {reason}", count)
    lost = load.tells - load.refused - handled_tells - returned - expired
    report.exactly("tells unaccounted for", lost, 0)
    report.exactly("asks that did not end", asked.sent - sum(asked.ended.values()), 0)
    for name, column in (("sender", 0), ("receiver", 1)):
        sizes = [sample[column] for sample in load.samples]
        third = len(sizes) // 3
        early, late = fmean(sizes[third : 2 * third]), fmean(sizes[-third:])
        report.figure(f"{name}: resident memory at the end, MB", late / 1e6)
        report.at_most(f"{name}: resident memory, late to early", late / early, 1.05)
    report.write(options.results)


if __name__ == "__main__":
    main()
