"""The mailbox: lanes, bounds, closing, waiting, and nothing lost under many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import actor_kit as kit
import pytest

from voidbus.actors.runtime import mailbox as mailbox_module
from voidbus.actors.runtime.mailbox import CONTROL_LIMIT, Mailbox, Overflow, Waited
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message


def note(seen: list[Any], what: Any) -> Callable[[], None]:
    return lambda: seen.append(what)


def run_all(mailbox: Mailbox) -> None:
    while (item := mailbox.get(0)) is not None:
        assert callable(item)
        item()


def test_a_mailbox_has_no_room_for_less_than_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Mailbox(0, Overflow.REFUSE)


def test_items_of_a_lane_keep_their_order_and_control_overtakes_data() -> None:
    mailbox, seen = Mailbox(8, Overflow.REFUSE), list[int]()
    for number in (1, 2, 3):
        mailbox.put(note(seen, number))
    for number in (10, 11):
        mailbox.put(note(seen, number), control=True)
    run_all(mailbox)
    assert seen == [10, 11, 1, 2, 3]


def test_a_full_mailbox_refuses_the_new_message() -> None:
    mailbox = Mailbox(2, Overflow.REFUSE)
    items = [kit.delivery(kit.Say(number=n)) for n in range(3)]
    assert [mailbox.put(item) for item in items] == [None, None, FaultReason.MAILBOX_FULL]
    assert [mailbox.get(0), mailbox.get(0), mailbox.get(0)] == [items[0], items[1], None]
    assert mailbox.statistics().refused == 1


def test_a_full_mailbox_that_drops_its_oldest_tells_whose_it_was() -> None:
    mailbox = Mailbox(2, Overflow.DROP_OLDEST)
    outcomes: list[Message] = []
    items = [kit.delivery(kit.Say(number=n), outcomes) for n in range(3)]
    assert [mailbox.put(item) for item in items] == [None, None, None]
    (told,) = outcomes
    assert isinstance(told, Fault)
    assert told.reason is FaultReason.MAILBOX_FULL
    assert [mailbox.get(0), mailbox.get(0), mailbox.get(0)] == [items[1], items[2], None]
    assert mailbox.statistics().shed == 1


def test_who_waits_for_an_internal_item_is_told_when_it_is_shed() -> None:
    refused: list[FaultReason] = []

    class Question(Waited):
        def __call__(self) -> None:
            raise AssertionError("it was shed")

        def refuse(self, reason: FaultReason) -> None:
            refused.append(reason)

    mailbox = Mailbox(1, Overflow.DROP_OLDEST)
    mailbox.put(Question())
    mailbox.put(kit.delivery(kit.Say()))
    assert refused == [FaultReason.MAILBOX_FULL]


def test_a_full_data_lane_does_not_stop_control() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    mailbox.put(kit.delivery(kit.Say()))
    urgent = kit.delivery(kit.Urgent())
    assert mailbox.put(urgent, control=True) is None
    assert mailbox.get(0) is urgent


def test_control_messages_are_bounded_and_what_the_actor_caused_itself_is_not() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    for _ in range(CONTROL_LIMIT):
        assert mailbox.put(kit.delivery(kit.Urgent()), control=True) is None
    refused = mailbox.put(kit.delivery(kit.Urgent()), control=True)
    assert refused is FaultReason.MAILBOX_FULL
    assert mailbox.put(lambda: None, control=True) is None
    assert mailbox.statistics().control_depth == CONTROL_LIMIT + 1


@pytest.mark.parametrize("control", [False, True])
def test_a_closed_mailbox_refuses_and_gives_back_what_it_held(control: bool) -> None:
    mailbox = Mailbox(4, Overflow.REFUSE)
    data, urgent = kit.delivery(kit.Say()), kit.delivery(kit.Urgent())
    mailbox.put(data)
    mailbox.put(urgent, control=True)
    assert mailbox.close() == [urgent, data]
    assert mailbox.put(data, control=control) is FaultReason.MAILBOX_CLOSED
    assert mailbox.put_wait(data, 5.0) is FaultReason.MAILBOX_CLOSED
    assert mailbox.get() is None
    assert mailbox.close() == []
    statistics = mailbox.statistics()
    assert (statistics.closed, statistics.depth, statistics.refused) == (True, 0, 2)


def test_statistics_tell_depths_counts_and_the_age_of_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = kit.FakeClock()
    monkeypatch.setattr(mailbox_module, "_monotonic", clock)
    mailbox = Mailbox(2, Overflow.REFUSE)
    assert mailbox.statistics().head_age == 0
    mailbox.put(lambda: None)
    clock.advance(3)
    mailbox.put(lambda: None, control=True)
    clock.advance(2)
    mailbox.put(lambda: None)
    mailbox.put(lambda: None)
    statistics = mailbox.statistics()
    assert (statistics.depth, statistics.control_depth, statistics.limit) == (2, 1, 2)
    assert (statistics.accepted, statistics.refused) == (3, 1)
    assert statistics.head_age == 5


def test_get_ends_at_its_timeout_and_the_next_put_is_still_seen() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    before = time.monotonic()
    assert mailbox.get(0.02) is None
    assert time.monotonic() - before >= 0.02
    assert mailbox.get(0) is None
    assert mailbox.get(-1.0) is None
    mailbox.put(lambda: None)
    assert mailbox.get() is not None


def test_a_wait_longer_than_a_lock_can_is_cut_and_does_not_raise() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    timer = threading.Timer(0.05, mailbox.put, [lambda: None])
    timer.start()
    assert mailbox.get(float("inf")) is not None
    timer.join()


@pytest.mark.parametrize("what", ["put", "close"])
def test_a_waiting_get_is_woken(what: str) -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.append(mailbox.get()))
    reader.start()
    item = kit.delivery(kit.Say())
    if what == "put":
        mailbox.put(item)
    else:
        mailbox.close()
    reader.join(kit.PATIENCE)
    assert got == [item if what == "put" else None]


@pytest.mark.parametrize("overflow", Overflow)
def test_put_wait_waits_for_room_and_sheds_nothing(overflow: Overflow) -> None:
    mailbox = Mailbox(1, overflow)
    first, second = kit.delivery(kit.Say(number=1)), kit.delivery(kit.Say(number=2))
    mailbox.put(first)
    outcome: list[FaultReason | None] = []
    writer = threading.Thread(target=lambda: outcome.append(mailbox.put_wait(second, kit.PATIENCE)))
    writer.start()
    assert mailbox.get() is first
    writer.join(kit.PATIENCE)
    assert outcome == [None]
    assert mailbox.get() is second
    assert mailbox.statistics().shed == 0


def test_put_wait_gives_up_at_its_timeout() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    mailbox.put(lambda: None)
    before = time.monotonic()
    assert mailbox.put_wait(lambda: None, 0.02) is FaultReason.MAILBOX_FULL
    assert time.monotonic() - before >= 0.02
    assert mailbox.put_wait(lambda: None, -1.0) is FaultReason.MAILBOX_FULL
    assert mailbox.statistics().refused == 2


def test_put_wait_is_woken_by_close() -> None:
    mailbox = Mailbox(1, Overflow.REFUSE)
    mailbox.put(lambda: None)
    outcome: list[FaultReason | None] = []
    writer = threading.Thread(
        target=lambda: outcome.append(mailbox.put_wait(lambda: None, kit.PATIENCE))
    )
    writer.start()
    mailbox.close()
    writer.join(kit.PATIENCE)
    assert outcome == [FaultReason.MAILBOX_CLOSED]


@pytest.mark.parametrize("overflow", Overflow)
def test_a_waiting_producer_loses_nothing_to_impatient_ones(overflow: Overflow) -> None:
    """Room that put_wait saw is its own: nobody takes it before the item is in."""
    mailbox = Mailbox(1, overflow)
    total = 3000
    stop = threading.Event()
    refused: list[FaultReason] = []
    patient_seen: list[int] = []

    def patient() -> None:
        for number in range(total):
            reason = mailbox.put_wait(note(patient_seen, number), kit.PATIENCE)
            if reason is not None:
                refused.append(reason)

    def impatient() -> None:
        while not stop.is_set():
            mailbox.put(lambda: None)

    writers = [threading.Thread(target=patient)]
    if overflow is Overflow.REFUSE:  # under the other policy they may shed what was taken
        writers.append(threading.Thread(target=impatient))
    with kit.switching_every(1e-6):
        for writer in writers:
            writer.start()
        while writers[0].is_alive():
            item = mailbox.get(0.01)
            if item is not None:
                assert callable(item)
                item()
        stop.set()
        for writer in writers:
            writer.join(kit.PATIENCE)
        run_all(mailbox)
    assert refused == []
    assert patient_seen == list(range(total))


def test_many_producers_lose_nothing_and_keep_their_own_order() -> None:
    mailbox = Mailbox(64, Overflow.REFUSE)
    producers, each = 8, 2500
    seen: dict[int, list[int]] = {n: [] for n in range(producers)}

    def produce(producer: int) -> None:
        for number in range(each):
            item = note(seen[producer], number)
            if producer % 2:
                assert mailbox.put(item, control=True) is None
            else:
                assert mailbox.put_wait(item, kit.PATIENCE) is None

    threads = [threading.Thread(target=produce, args=[n]) for n in range(producers)]
    with kit.switching_every(1e-6):
        for thread in threads:
            thread.start()
        for number in range(producers * each):
            # Short timeouts race with the puts; a lost wake-up would let the long one pass.
            item = mailbox.get(0.0 if number % 3 else 0.00001) or mailbox.get(kit.PATIENCE)
            assert callable(item)
            item()
        for thread in threads:
            thread.join(kit.PATIENCE)
    assert all(numbers == list(range(each)) for numbers in seen.values())
    assert mailbox.get(0) is None
    assert mailbox.statistics().accepted == producers * each


def test_every_item_put_while_it_closes_is_refused_or_given_back() -> None:
    for _ in range(80):
        mailbox = Mailbox(100_000, Overflow.REFUSE)
        taken = [0, 0, 0]

        def produce(index: int, mailbox: Mailbox = mailbox, taken: list[int] = taken) -> None:
            while mailbox.put(lambda: None) is None:
                taken[index] += 1

        threads = [threading.Thread(target=produce, args=[n]) for n in range(3)]
        with kit.switching_every(1e-6):
            for thread in threads:
                thread.start()
            consumed = sum(mailbox.get(0.001) is not None for _ in range(20))
            rest = mailbox.close()
            for thread in threads:
                thread.join(kit.PATIENCE)
        assert consumed + len(rest) == sum(taken)
