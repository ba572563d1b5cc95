"""Guest memory: what is inside can be reached, and nothing else."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_driver import GuestRam, guest_ram

from voidbus.vm.devices.faults import GuestMemoryError
from voidbus.vm.devices.memory import GuestMemory, MemoryRegion

PAGE = 4096


@pytest.fixture
def sealed() -> Iterator[int]:
    """A memfd of 16 pages that can't shrink."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(sealed: int) -> Iterator[GuestMemory]:
    """Pages 0-3 and 4-7 of the guest side by side in two regions, and page 16 alone."""
    made = GuestMemory(
        [
            MemoryRegion.map(sealed, 8 * PAGE, PAGE, 16 * PAGE),
            MemoryRegion.map(sealed, 4 * PAGE, 4 * PAGE, 4 * PAGE),
            MemoryRegion.map(sealed, 0, 4 * PAGE, 0),
        ]
    )
    yield made
    made.close()


def test_bytes_go_in_and_come_out_across_regions(memory: GuestMemory) -> None:
    memory.write(4 * PAGE - 3, b"abcdef")
    assert memory.read(4 * PAGE - 4, 8) == b"\0abcdef\0"
    assert [len(piece) for piece in memory.slices(4 * PAGE - 3, 6)] == [3, 3]


def test_words_are_little_endian(memory: GuestMemory) -> None:
    memory.store16(PAGE, 0x1234)
    memory.store32(PAGE + 4, 0x89ABCDEF)
    assert memory.read(PAGE, 8) == b"\x34\x12\0\0\xef\xcd\xab\x89"
    assert (memory.load16(PAGE), memory.load32(PAGE + 4)) == (0x1234, 0x89ABCDEF)


@given(address=st.integers(0, 1 << 64) | st.integers(0, 18 * PAGE), size=st.integers(0, 1 << 33))
def test_what_is_outside_raises_and_what_is_inside_has_its_size(address: int, size: int) -> None:
    with guest_ram(8 * PAGE, address=2 * PAGE) as ram:
        memory = ram.memory()
        inside = address >= 2 * PAGE and address + size <= 10 * PAGE and size > 0
        if inside:
            assert sum(len(piece) for piece in memory.slices(address, size)) == size
            assert len(memory.view(address, size)) == size
        else:
            for access in (memory.slices, memory.view):
                with pytest.raises(GuestMemoryError):
                    access(address, size)
        memory.close()


def test_a_write_that_does_not_fit_writes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError):
        memory.write(8 * PAGE - 2, b"four")
    assert memory.read(8 * PAGE - 2, 2) == b"\0\0"


def test_nothing_is_read_or_written_at_no_length(memory: GuestMemory) -> None:
    assert memory.read(1 << 60, 0) == b""
    memory.write(1 << 60, b"")


def test_a_region_may_begin_anywhere_in_its_file(sealed: int) -> None:
    os.pwrite(sealed, b"here", PAGE + 100)
    memory = GuestMemory([MemoryRegion.map(sealed, PAGE + 100, 50, 7000)])
    assert memory.read(7000, 4) == b"here"
    memory.close()


def test_memory_that_may_shrink_is_refused() -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(GuestMemoryError, match="F_SEAL_SHRINK"):
        MemoryRegion.map(fd, 0, PAGE, 0)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size", "address"),
    [(0, 17 * PAGE, 0), (16 * PAGE, PAGE, 0), (0, 0, 0), (0, PAGE, 1 << 64), (1 << 63, PAGE, 0)],
)
def test_a_region_that_can_not_be_is_refused(
    sealed: int, offset: int, size: int, address: int
) -> None:
    with pytest.raises(GuestMemoryError):
        MemoryRegion.map(sealed, offset, size, address)


def test_a_descriptor_that_is_no_memory_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(GuestMemoryError):
        MemoryRegion.map(reader, 0, PAGE, 0)
    os.close(reader)
    os.close(writer)


def test_regions_that_overlap_are_refused(sealed: int) -> None:
    regions = [MemoryRegion.map(sealed, 0, 2 * PAGE, at) for at in (0, PAGE)]
    with pytest.raises(GuestMemoryError, match="overlap"):
        GuestMemory(regions)
    for region in regions:
        region.close()


def test_closed_memory_is_unmapped_once_its_last_view_is_gone() -> None:
    ram = GuestRam(1 << 20)
    memory = ram.memory()
    view = memory.view(0, 10)
    memory.close()
    memory.close()
    with pytest.raises(GuestMemoryError):
        memory.read(0, 1)
    view[:2] = b"ok"
    assert ram.read(0, 2) == b"ok"
    inode = os.fstat(ram.fd).st_ino
    del view
    ram.close()
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert not any(f" {inode} " in line and "guest" in line for line in maps)
