"""Who drives a node's sockets, and that nothing of the contract changes with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transport_kit import Answer, Bus, Echo, Look, Mute, Signal, Work

from voidbus.transport.delivery import Ask
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.lead import Lead
from voidbus.transport.message import Right

PATIENCE = 20.0


@contextmanager
def running(job: Callable[[], None], count: int = 1) -> Iterator[None]:
    """Threads that run `job`; what one raises fails the test."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, name=f"asker-{n}") for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert not raised


def drives(bus: Bus) -> set[str]:
    """The threads that read the hub's sockets while the calling one asks a hundred times."""
    seen: set[str] = set()
    for _ in range(100):
        other = bus.hub.ask(
            "run-1/echo",
            Work(),
            timeout=PATIENCE,
            on_end=lambda _: seen.add(threading.current_thread().name),
        )
        bus.hub.ask("run-1/echo", Work(), timeout=PATIENCE).result()
        other.result()
    return seen


@pytest.fixture
def linked(bus: Bus) -> Bus:
    """A bus with an echo and a mute receiver at both ends."""
    run = bus.leaf("run-1", Right.WORK)
    for node in (bus.hub, run):
        node.attach("echo", Echo())
        node.attach("mute", Mute())
    return bus


# -- the lead by itself --------------------------------------------------------------------


def take(lead: Lead) -> None:
    """Take the lead as soon as its node's thread stands aside."""
    end = time.monotonic() + PATIENCE
    while not lead.take():
        assert time.monotonic() < end


def test_nobody_leads_until_the_thread_of_the_node_stands_aside() -> None:
    assert not Lead().take()


def test_the_thread_of_the_node_leads_again_when_nobody_else_does() -> None:
    lead = Lead()
    lead.stand_by()
    assert not lead.take()


def test_the_thread_of_the_node_waits_for_the_one_that_leads_however_long() -> None:
    lead, over, led = Lead(), threading.Event(), threading.Event()

    def node() -> None:
        while not over.is_set():
            lead.stand_by()
        led.set()

    with running(node):
        take(lead)
        over.set()
        assert not led.wait(0.1)  # it sleeps by then
        lead.leave()
        assert led.wait(PATIENCE)
    assert not lead.take()


def test_the_thread_of_the_node_is_not_woken_while_another_leads_for_long() -> None:
    lead, taken, woken = Lead(), threading.Event(), threading.Event()
    thread: list[int] = []

    def node() -> None:
        thread.append(threading.get_native_id())
        while not taken.is_set():  # on a busy host nobody may take it in a moment
            lead.stand_by()
        woken.set()

    def waits() -> int:
        """How often it has waited for something (proc_pid_status(5))."""
        text = Path(f"/proc/self/task/{thread[0]}/status").read_text()
        return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    def wakes() -> bool:
        before = waits()
        assert not woken.wait(1.5)
        return waits() != before

    with running(node):
        take(lead)
        taken.set()
        try:
            # It falls asleep some moments after it stood aside.
            assert not all(wakes() for _ in range(5))
        finally:
            lead.leave()
        assert woken.wait(PATIENCE)


def test_one_thread_leads_at_a_time_whoever_takes_leaves_and_recalls() -> None:
    lead, inside, over = Lead(), [0], threading.Event()
    turns: list[str] = []

    def use() -> None:
        inside[0] += 1
        assert inside[0] == 1
        turns.append(threading.current_thread().name)
        inside[0] -= 1

    def others() -> None:
        for _ in range(2000):
            if lead.take():
                use()
                lead.leave()
            else:
                lead.recall()

    def node() -> None:
        while not over.is_set():
            use()
            lead.stand_by()

    with running(node):
        with running(others, 4):
            pass
        over.set()
    assert len(set(turns)) > 1


# -- the bus with it -----------------------------------------------------------------------


def test_a_thread_that_asks_again_and_again_reads_the_sockets_itself(linked: Bus) -> None:
    seen: set[str] = set()

    def ask() -> None:
        end = time.monotonic() + PATIENCE
        while not any(name.startswith("asker") for name in seen) and time.monotonic() < end:
            seen.update(drives(linked))

    with running(ask):
        pass
    assert any(name.startswith("asker") for name in seen)


def test_the_main_thread_never_reads_the_sockets(linked: Bus) -> None:
    assert drives(linked) == {"bus-hub"}


def test_an_ask_whose_thread_drives_ends_at_its_deadline(linked: Bus) -> None:
    def ask() -> None:
        linked.hub.ask("run-1/echo", Work(), timeout=PATIENCE).result()
        outcome = linked.hub.ask("run-1/mute", Work(), timeout=0.1).wait()
        assert isinstance(outcome, Fault)
        assert outcome.reason is FaultReason.EXPIRED

    with running(ask, 3):
        pass


def test_closing_a_node_ends_the_ask_whose_thread_drives_it(linked: Bus) -> None:
    waits = threading.Event()

    def ask() -> None:
        linked.hub.ask("run-1/echo", Work(), timeout=PATIENCE).result()
        question = linked.hub.ask("run-1/mute", Work(), timeout=10 * PATIENCE)
        waits.set()
        outcome = question.wait()
        assert isinstance(outcome, Fault)
        assert outcome.reason is FaultReason.CLOSED

    with running(ask):
        assert waits.wait(PATIENCE)
        linked.hub.close()


def test_the_sockets_are_read_for_everybody_while_a_thread_waits_for_its_reply(linked: Bus) -> None:
    waits, over = threading.Event(), threading.Event()

    def wait_long() -> None:
        linked.hub.ask("run-1/echo", Work(), timeout=PATIENCE).result()
        question = linked.hub.ask("run-1/mute", Work(), timeout=10 * PATIENCE)
        waits.set()
        question.wait()
        assert over.is_set()

    def ask() -> None:
        for number in range(100):
            found = linked.hub.ask("run-1/echo", Work(text=str(number)), timeout=PATIENCE).result()
            assert found == Answer(text=str(number))

    with running(wait_long):
        assert waits.wait(PATIENCE)
        with running(ask, 3):
            ask()  # and from the main thread
        over.set()
        linked.hub.dismiss("run-1")


def test_every_thread_that_waits_for_one_ask_gets_its_outcome(linked: Bus) -> None:
    question: list[Ask] = []
    asked = threading.Barrier(4)

    def wait() -> None:
        linked.hub.ask("run-1/echo", Work(), timeout=PATIENCE).result()
        asked.wait(PATIENCE)
        outcome = question[0].wait()
        assert isinstance(outcome, Fault)
        assert outcome.reason is FaultReason.LINK_LOST

    with running(wait, 3):
        question.append(linked.hub.ask("run-1/mute", Work(), timeout=10 * PATIENCE))
        asked.wait(PATIENCE)
        linked.hub.dismiss("run-1")


def test_tells_keep_their_order_whoever_drives(linked: Bus) -> None:
    client = linked.leaf("client-a")
    got = Signal()

    class Reader(Echo):
        def handle(self, delivery: object) -> None:
            got(self.got[-1].message)

    linked.hub.attach("reader", Reader())

    def ask() -> None:
        for _ in range(200):
            client.ask("hub/echo", Look(), timeout=PATIENCE).result()

    with running(ask, 2):
        for number in range(1000):
            assert client.tell("hub/reader", Look(text=str(number))) is None
    seen = got.wait(lambda seen: len(seen) == 1000, PATIENCE)
    assert [message.text for message in seen] == [str(number) for number in range(1000)]
