"""Typed asks between the supervisor's process and a run's, against a bare socket and two peers.

Ours: `Hub.ask` to an actor that answers from its mailbox behind a `Leaf`, over ipc: envelope,
typed body, deadline, addressed delivery, the actor's thread.
Floor: a pyzmq ROUTER and DEALER over ipc that echo [id, body] with the same body bytes.
Peers: xoscar's actor in another process of its pool; thespian's in a process of its own.
Targets: one at a time, at least half of the floor, and faster than both peers. With 500 under way,
at least half of the floor, and faster than xoscar (thespian's `ask` has no such mode).
How: rounds of all in turns, medians of messages a second. Ours asks from a thread of its own, as a
supervisor does: there the main thread only takes signals, and so it never drives the sockets while
it waits. What it gets when it asks is told too, without a target.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable

from kit.measure import Report, installed, interleave, medians, seconds, start_report
from peers.raw_echo import RawEcho
from peers.run_like import NODE, Note, RunLike

from voidbus.transport.address import parse_address
from voidbus.transport.delivery import Ask

WINDOW = 500
TEXT = "x" * 100
MAIN = "voidbus from the main thread"


def our_asks(link: RunLike, count: int) -> None:
    dest, note = parse_address(f"{NODE}/echo"), Note(text=TEXT)
    for _ in range(count):
        link.hub.ask(dest, note, timeout=10.0).result()


def our_pipelined(link: RunLike, count: int) -> None:
    dest, note = parse_address(f"{NODE}/echo"), Note(text=TEXT)
    waiting: deque[Ask] = deque()
    for _ in range(count):
        if len(waiting) >= WINDOW:
            waiting.popleft().result()
        waiting.append(link.hub.ask(dest, note, timeout=10.0))
    for ask in waiting:
        ask.result()


def on_a_thread(job: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        thread = threading.Thread(target=job)
        thread.start()
        thread.join()

    return run


def main() -> None:
    report, options = start_report(__file__, __doc__)
    asks, piped, rounds = (100, 500, 1) if options.quick else (1_500, 10_000, 7)
    body = Note(text=TEXT).to_json()
    with contextlib.ExitStack() as stack:
        link, raw = stack.enter_context(RunLike()), stack.enter_context(RawEcho())
        singles: dict[str, Callable[[], object]] = {
            "voidbus": on_a_thread(lambda: our_asks(link, asks)),
            MAIN: lambda: our_asks(link, asks),
            "raw": lambda: raw.asks(asks, body),
        }
        windows: dict[str, Callable[[], object]] = {
            "voidbus": on_a_thread(lambda: our_pipelined(link, piped)),
            MAIN: lambda: our_pipelined(link, piped),
            "raw": lambda: raw.pipelined(piped, body, WINDOW),
        }
        add_peers(report, stack, asks, piped, singles, windows)

        def rates(count: int, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
            timed = {name: lambda job=job: count / seconds(job) for name, job in jobs.items()}
            return medians(interleave(rounds, timed))

        one, many = rates(asks, singles), rates(piped, windows)
    judge(report, "one at a time", one)
    judge(report, f"{WINDOW} under way", many)
    report.write(options.results)


def add_peers(
    report: Report,
    stack: contextlib.ExitStack,
    asks: int,
    piped: int,
    singles: dict[str, Callable[[], object]],
    windows: dict[str, Callable[[], object]],
) -> None:
    if installed("xoscar"):
        from peers.xoscar_echo import XoscarEcho

        peer = stack.enter_context(XoscarEcho())
        singles["xoscar"] = lambda: peer.asks(asks, TEXT)
        windows["xoscar"] = lambda: peer.pipelined(piped, TEXT, WINDOW)
    else:
        report.leave_out("xoscar")
    if installed("thespian"):
        from peers.thespian_echo import ThespianEcho

        other = stack.enter_context(ThespianEcho())
        singles["thespian"] = lambda: other.asks(asks, TEXT)
    else:
        report.leave_out("thespian")


def judge(report: Report, mode: str, rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        report.figure(f"{name}, {mode}: asks a second", rate)
    report.at_least(f"{mode}: ratio to the bare socket", rates["voidbus"] / rates["raw"], 0.5)
    for peer in rates:
        if peer not in ("voidbus", "raw", MAIN):
            report.at_least(f"{mode}: ratio to {peer}", rates["voidbus"] / rates[peer], 1.0)


if __name__ == "__main__":
    main()
