"""Which device answers at an address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.devices.bus import Bus, Registers


class Echo(Registers):
    """Answers with where it was asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        assert 0 <= offset <= self.size - size
        return offset

    def write(self, offset: int, size: int, value: int) -> None:
        assert 0 <= offset <= self.size - size
        self.written.append((offset, size, value))


def test_the_device_at_an_address_is_asked_with_the_offset_in_it() -> None:
    bus, first, second = Bus(), Echo(8), Echo(0x1000)
    bus.add(0x2000, 0x1000, second, "second")
    bus.add(0x3F8, 8, first, "first")
    assert (bus.read(0x3FD, 1), bus.read(0x2FFC, 4)) == (5, 0xFFC)
    bus.write(0x3F8, 1, 65)
    assert first.written == [(0, 1, 65)]
    assert bus.accesses == {"first": 2, "second": 1}


@pytest.mark.parametrize(
    ("address", "size"), [(0x3F7, 1), (0x400, 1), (0x3FF, 2), (0x3F7, 2), (0, 8), (1 << 63, 8)]
)
def test_where_none_is_or_not_all_of_it_reads_give_ones_and_writes_go_nowhere(
    address: int, size: int
) -> None:
    bus, device = Bus(), Echo(8)
    bus.add(0x3F8, 8, device, "device")
    assert bus.read(address, size) == -1
    bus.write(address, size, 0)
    assert device.written == []
    assert bus.accesses == {"nothing": 2}


@pytest.mark.parametrize(("start", "size"), [(0x10, 1), (0xF, 2), (0x17, 8), (0, 0x100)])
def test_no_two_devices_are_at_one_address(start: int, size: int) -> None:
    bus = Bus()
    bus.add(0x10, 8, Echo(8), "first")
    with pytest.raises(ValueError, match="two devices"):
        bus.add(start, size, Echo(size), "second")
    bus.add(0x18, 8, Echo(8), "after")
    bus.add(0x08, 8, Echo(8), "before")


@given(
    st.lists(st.tuples(st.integers(0, 100), st.sampled_from([1, 2, 4, 8])), max_size=50),
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 20)), max_size=8),
)
def test_no_access_reaches_a_device_beyond_its_bounds(
    accesses: list[tuple[int, int]], places: list[tuple[int, int]]
) -> None:
    bus = Bus()
    kept: dict[int, int] = {}
    for start, size in places:
        try:
            bus.add(start, size, Echo(size), str(start))
        except ValueError:
            assert any(start < at + room and at < start + size for at, room in kept.items())
        else:
            kept[start] = size
    for address, size in accesses:
        inside = [at for at, room in kept.items() if at <= address and address + size <= at + room]
        assert bus.read(address, size) == (address - inside[0] if inside else -1)
