"""The entropy device against a driver."""

from __future__ import annotations

from mmio_driver import driven

from voidbus.vm.devices.entropy import MAX_BYTES, EntropyDevice


def test_buffers_are_filled_and_no_two_alike() -> None:
    with driven(EntropyDevice()) as (_, (queue,)):
        seen = set()
        for _ in range(20):
            queue.add([], [64])
            queue.kick()
            (done,) = queue.wait()
            assert done.written == 64
            seen.add(done.data)
        assert len(seen) == 20


def test_a_large_buffer_gets_a_part() -> None:
    with driven(EntropyDevice()) as (_, (queue,)):
        queue.add([], [2 * MAX_BYTES])
        queue.kick()
        assert [done.written for done in queue.wait()] == [MAX_BYTES]


def test_a_buffer_that_can_not_be_written_gets_nothing() -> None:
    with driven(EntropyDevice()) as (_, (queue,)):
        queue.add([b"readable"], [])
        queue.kick()
        assert [done.written for done in queue.wait()] == [0]
