"""Split virtqueues: a driver that keeps the rules, and ones that don't."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtio_driver import DriverQueue, GuestRam

from voidbus.vm.devices.faults import QueueError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.virtqueue import Chain, RingAddresses, Virtqueue

NEXT, WRITE, INDIRECT = 1, 2, 4


class Pair:
    """A driver's and a device's half of one queue."""

    def __init__(self, size: int = 8, *, event_idx: bool = False, indirect: bool = False) -> None:
        self.ram = GuestRam(1 << 20)
        self.memory: GuestMemory = self.ram.memory()
        self.driver = DriverQueue(self.ram, size, event_idx=event_idx, indirect=indirect)
        self.queue: Virtqueue = self.driver.device_queue(self.memory)

    def close(self) -> None:
        self.driver.close()
        self.memory.close()
        self.ram.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def pop(queue: Virtqueue) -> Chain:
    chain = queue.pop()
    assert chain is not None
    return chain


# -- by the rules -------------------------------------------------------------------------


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_goes_to_the_device_and_comes_back(indirect: bool) -> None:
    pair = Pair(indirect=indirect)
    token = pair.driver.add([b"head", b"body"], [3, 10])
    chain = pop(pair.queue)
    assert (chain.readable_bytes, chain.writable_bytes) == (8, 13)
    assert chain.read() == b"headbody"
    assert chain.read(3, 2) == b"adb"
    assert chain.write(b"answer") == 6
    pair.queue.push(chain, 6)
    assert pair.driver.collect() == [(token, 6, b"answer")]
    assert pair.queue.pop() is None
    pair.close()


def test_parts_of_a_chain_are_views_in_guest_memory(pair: Pair) -> None:
    pair.driver.add([b"0123", b"4567", b"89"], [4, 4])
    chain = pop(pair.queue)
    assert [bytes(view) for view in chain.readable_from(2, 7)] == [b"23", b"4567", b"8"]
    assert [bytes(view) for view in chain.readable_from(4)] == [b"4567", b"89"]
    assert chain.readable_from(10) == []
    assert [len(view) for view in chain.writable_from(3, 3)] == [1, 2]
    assert chain.write(b"abcdefghij", 6) == 2
    pair.queue.push(chain, 8)
    assert pair.driver.collect()[0].data == b"\0\0\0\0\0\0ab"


def test_chains_put_back_come_again(pair: Pair) -> None:
    for number in range(4):
        pair.driver.add([b"%d" % number])
    chains = [pop(pair.queue) for _ in range(4)]
    pair.queue.unpop(3)
    assert pair.queue.waiting == 3
    pair.queue.push(chains[0], 0)
    assert [pop(pair.queue).read() for _ in range(3)] == [b"1", b"2", b"3"]


def test_a_queue_goes_on_where_it_stopped(pair: Pair) -> None:
    for number in range(3):
        pair.driver.add([b"%d" % number])
    pair.queue.push(pop(pair.queue), 0)
    again = pair.driver.device_queue(pair.memory, index=pair.queue.index)
    again.push(pop(again), 0)
    assert pop(again).read() == b"2"
    assert len(pair.driver.collect()) == 2


def test_the_driver_is_interrupted_only_for_what_is_new(pair: Pair) -> None:
    pair.queue.notify()
    assert pair.driver.interrupts() == 0
    pair.driver.add([b"x"])
    pair.queue.push(pop(pair.queue), 0)
    pair.queue.notify()
    pair.queue.notify()
    assert pair.driver.interrupts() == 1


def test_a_driver_that_wants_no_interrupts_gets_none(pair: Pair) -> None:
    pair.driver.suppress_interrupts(True)
    pair.driver.add([b"x"])
    pair.queue.push(pop(pair.queue), 0)
    pair.queue.notify()
    assert pair.driver.interrupts() == 0


def test_with_event_idx_the_driver_names_the_entry_it_wants_to_hear_of() -> None:
    pair = Pair(event_idx=True)
    for _ in range(3):
        pair.driver.add([b"x"])
    pair.queue.push(pop(pair.queue), 0)
    pair.queue.notify()
    assert pair.driver.interrupts() == 1  # the first ever
    pair.queue.push(pop(pair.queue), 0)
    pair.queue.notify()
    assert pair.driver.interrupts() == 0  # it has not looked since
    pair.driver.collect()
    pair.queue.push(pop(pair.queue), 0)
    pair.queue.notify()
    assert pair.driver.interrupts() == 1
    pair.close()


@pytest.mark.parametrize("event_idx", [False, True])
def test_the_device_is_kicked_only_when_it_asks(event_idx: bool) -> None:
    pair = Pair(event_idx=event_idx)
    pair.driver.add([b"1"])
    assert pair.driver.kick()
    pair.queue.disable_notifications()
    pop(pair.queue)
    pair.driver.add([b"2"])
    assert not pair.driver.kick()
    assert pair.queue.enable_notifications()  # there is one, and no kick will tell
    pop(pair.queue)
    assert not pair.queue.enable_notifications()
    pair.driver.add([b"3"])
    assert pair.driver.kick()
    pair.close()


class QueueModel(RuleBasedStateMachine):
    """Whatever the two do in whatever order, requests come once, in order, with their content,
    and no notification that is needed is lost."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 16]), event_idx=st.booleans(), indirect=st.booleans()
    )
    def begin(self, size: int, event_idx: bool, indirect: bool) -> None:
        self.pair = Pair(size, event_idx=event_idx, indirect=indirect)
        self.pair.queue.enable_notifications()
        self.driver, self.queue = self.pair.driver, self.pair.queue
        self.sent: list[tuple[bytes, int]] = []
        self.held: list[tuple[Chain, bytes]] = []
        self.answered: dict[int, bytes] = {}
        self.asleep = True
        self.woken = False

    @rule(parts=st.lists(st.binary(min_size=1, max_size=40), max_size=3), rooms=st.integers(0, 2))
    def request(self, parts: list[bytes], rooms: int) -> None:
        count = len(parts) + rooms
        if not count or self.driver.free_descriptors < count:
            return
        self.driver.add(parts, [8] * rooms)
        self.sent.append((b"".join(parts), 8 * rooms))
        if self.driver.kick():
            self.asleep = False

    @precondition(lambda self: not self.asleep)
    @rule()
    def serve(self) -> None:
        self.queue.disable_notifications()
        while True:
            chain = self.queue.pop()
            if chain is None:
                if self.queue.enable_notifications():
                    continue
                break
            content, room = self.sent.pop(0)
            assert (chain.read(), chain.writable_bytes) == (content, room)
            self.held.append((chain, content))
        self.asleep = True

    @rule(count=st.integers(1, 4))
    def answer(self, count: int) -> None:
        for chain, content in self.held[:count]:
            answer = content[::-1][: chain.writable_bytes]
            self.queue.push(chain, chain.write(answer))
            self.answered[chain.head] = answer
        del self.held[:count]
        self.queue.notify()
        self.woken |= self.driver.interrupts() > 0

    @precondition(lambda self: self.woken)
    @rule()
    def collect(self) -> None:
        for token, _, data in self.driver.collect():
            assert self.answered.pop(token) == data
        assert not self.answered
        self.woken = False

    @invariant()
    def nobody_sleeps_on_work(self) -> None:
        if hasattr(self, "queue"):
            assert not (self.asleep and self.sent)
            assert not (self.answered and not self.woken)

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.close()


QueueModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestQueueModel = QueueModel.TestCase


# -- against the rules --------------------------------------------------------------------


def broken(pair: Pair, match: str) -> None:
    with pytest.raises(QueueError, match=match):
        pair.queue.pop()


def test_a_chain_in_a_circle_ends_at_the_queues_size(pair: Pair) -> None:
    buffer = pair.ram.alloc(16)
    pair.driver.write_descriptor(0, buffer, 16, NEXT, 1)
    pair.driver.write_descriptor(1, buffer, 16, NEXT, 0)
    pair.driver.make_available(0)
    broken(pair, "more than 8")


@pytest.mark.parametrize(
    ("address", "length", "flags", "match"),
    [
        (4096, 0, 0, "out of memory"),
        (4096, 0xFFFFFFFF, 0, "out of memory"),
        (1 << 20, 1, 0, "out of memory"),
        ((1 << 64) - 8, 16, WRITE, "out of memory"),
        (4096, 16, INDIRECT, "not negotiated"),
    ],
)
def test_a_descriptor_that_leads_nowhere_is_refused(
    pair: Pair, address: int, length: int, flags: int, match: str
) -> None:
    pair.driver.write_descriptor(0, address, length, flags)
    pair.driver.make_available(0)
    broken(pair, match)


def test_a_next_descriptor_outside_the_table_is_refused(pair: Pair) -> None:
    pair.driver.write_descriptor(0, pair.ram.alloc(16), 16, NEXT, 8)
    pair.driver.make_available(0)
    broken(pair, "descriptor 8 of a table of 8")


def test_a_head_outside_the_table_is_refused(pair: Pair) -> None:
    pair.driver.make_available(60000)
    broken(pair, "descriptor 60000")


def test_a_readable_descriptor_after_a_writable_one_is_refused(pair: Pair) -> None:
    buffer = pair.ram.alloc(16)
    pair.driver.write_descriptor(0, buffer, 16, NEXT | WRITE, 1)
    pair.driver.write_descriptor(1, buffer, 16, 0)
    pair.driver.make_available(0)
    broken(pair, "after a writable")


@pytest.mark.parametrize("ahead", [9, 300, 0x8000, 0xFFFF])
def test_an_index_that_runs_ahead_is_refused(pair: Pair, ahead: int) -> None:
    pair.ram.write(pair.driver.avail + 2, struct.pack("<H", ahead))
    broken(pair, f"{ahead} chains in a queue of 8")
    with pytest.raises(QueueError):
        _ = pair.queue.waiting


@pytest.mark.parametrize(
    ("length", "flags", "match"),
    [
        (0, INDIRECT, "table of 0"),
        (20, INDIRECT, "table of 20"),
        (1 << 21, INDIRECT, "outside of memory"),
        (32, INDIRECT | NEXT, "with a next"),
    ],
)
def test_an_indirect_table_that_can_not_be_is_refused(length: int, flags: int, match: str) -> None:
    pair = Pair(indirect=True)
    pair.driver.write_descriptor(0, pair.ram.alloc(64), length, flags)
    pair.driver.make_available(0)
    broken(pair, match)
    pair.close()


def test_an_indirect_table_in_an_indirect_table_is_refused() -> None:
    pair = Pair(indirect=True)
    table = pair.ram.alloc(16)
    pair.ram.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
    pair.driver.write_descriptor(0, table, 16, INDIRECT)
    pair.driver.make_available(0)
    broken(pair, "in an indirect table")
    pair.close()


def test_an_indirect_chain_is_no_longer_than_the_queue() -> None:
    pair = Pair(indirect=True)
    size = 64
    table = pair.ram.alloc(16 * size)
    for number in range(size):
        entry = struct.pack("<QIHH", table, 16, NEXT, number + 1)
        pair.ram.write(table + 16 * number, entry)
    pair.driver.write_descriptor(0, table, 16 * size, INDIRECT)
    pair.driver.make_available(0)
    broken(pair, "more than 8")
    pair.close()


@pytest.mark.parametrize(
    ("descriptors", "available", "used"),
    [
        (8, 8192, 12288),
        (4096, 8193, 12288),
        (4096, 8192, 12290),
        ((1 << 20) - 16, 8192, 12288),
        (4096, (1 << 20) - 2, 12288),
        (4096, 8192, 1 << 40),
    ],
)
def test_rings_out_of_place_are_refused(
    pair: Pair, descriptors: int, available: int, used: int
) -> None:
    with pytest.raises(QueueError):
        Virtqueue(pair.memory, 8, RingAddresses(descriptors, available, used), lambda: None)


@pytest.mark.parametrize("size", [0, 3, 12, 65536, -8])
def test_a_size_that_is_no_power_of_two_is_refused(pair: Pair, size: int) -> None:
    with pytest.raises(QueueError):
        Virtqueue(pair.memory, size, pair.driver.addresses, lambda: None)


@given(seed=st.integers(0, 1 << 32), indirect=st.booleans(), event_idx=st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_memory_is_a_chain_or_refused(seed: int, indirect: bool, event_idx: bool) -> None:
    """Rings full of random bytes, half of them made likelier to lead somewhere."""
    pair = Pair(indirect=indirect, event_idx=event_idx)
    random_source = random.Random(seed)
    ram = pair.ram
    ram.write(4096, random_source.randbytes(8192))
    for number in range(8):
        if random_source.random() < 0.7:
            ram.write(
                pair.driver.desc + 16 * number,
                struct.pack(
                    "<QIHH",
                    random_source.randrange(1 << 20),
                    random_source.choice([16, 32, 4096, 1 << 19]),
                    random_source.randrange(8),
                    random_source.randrange(9),
                ),
            )
    ram.write(pair.driver.avail + 2, struct.pack("<H", random_source.randrange(9)))
    taken = 0
    try:
        while (chain := pair.queue.pop()) is not None:
            taken += 1
            assert len(chain.readable) + len(chain.writable) <= 8
            chain.write(os.urandom(64))
            pair.queue.push(chain, 0)
            pair.queue.notify()
            pair.queue.enable_notifications()
    except QueueError:
        pass
    finally:
        assert taken <= 16  # its own answers may have rewritten the index once
        pair.close()
