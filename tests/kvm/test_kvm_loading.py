"""A kernel and what it is told, in guest memory: where they go, and what is refused."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.devices.faults import GuestMemoryError
from voidbus.vm.kvm.kernel_file import KernelError, Segment, read_kernel
from voidbus.vm.kvm.loading import (
    COMMAND_LINE,
    LONGEST_LINE,
    PAGE_TABLES,
    ZERO_PAGE,
    load,
    memory_map,
)
from voidbus.vm.kvm.memory import HIGH_START, LOW_END, Ram

MIB = 1 << 20
CODE = b"\x0f\x0b" * 300
START = 16 * MIB


def elf(*segments: tuple[int, int, bytes, int], entry: int = START) -> bytes:
    """An ELF file of segments: kind, address, content, size in memory."""
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, entry, 64, 0, 0, 64, 56,
        len(segments), 0, 0, 0,
    )  # fmt: skip
    table, content = b"", b""
    start = 64 + 56 * len(segments)
    for kind, address, data, size in segments:
        table += struct.pack(
            "<IIQQQQQQ", kind, 5, start + len(content), address, address, len(data), size, 4096
        )
        content += data
    return head + table + content


def bz_image(*, protocol: int = 0x20F, flags: int = 1, needs: int = MIB) -> bytes:
    image = bytearray(1024)
    image[0x1F1] = 1  # one sector of set-up
    image[0x201] = 0x6A  # the header ends at 0x26c
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    image[0x211] = 0x81
    struct.pack_into("<H", image, 0x236, flags)
    struct.pack_into("<QI", image, 0x258, START, needs)
    return bytes(image) + CODE


PLAIN = elf((1, START, CODE, 5 * len(CODE)), (4, 0, b"note", 4))


@contextlib.contextmanager
def opened(content: bytes) -> Iterator[int]:
    file = os.memfd_create("file")
    try:
        os.write(file, content)
        yield file
    finally:
        os.close(file)


@pytest.fixture
def ram() -> Iterator[Ram]:
    memory = Ram(64 * MIB)
    yield memory
    memory.close()


def load_into(ram: Ram, kernel: bytes, initramfs: bytes = b"", line: str = "quiet") -> int:
    with opened(kernel) as kernel_file, opened(initramfs) as initramfs_file:
        return load(ram, kernel_file, initramfs_file, line, 1, ())


def test_an_elf_kernel_goes_where_its_segments_say_and_is_entered_at_its_entry(ram: Ram) -> None:
    assert load_into(ram, PLAIN) == START
    assert ram.memory.read(START, len(CODE) + 4) == CODE + bytes(4)


def test_a_bz_image_goes_where_it_prefers_and_is_entered_512_bytes_behind(ram: Ram) -> None:
    assert load_into(ram, bz_image()) == START + 0x200
    assert ram.memory.read(START, len(CODE)) == CODE
    header = ram.memory.read(ZERO_PAGE + 0x1F1, 0x26C - 0x1F1)
    assert header[:1] == b"\x01"
    assert struct.unpack_from("<QI", header, 0x258 - 0x1F1) == (START, MIB)
    assert ram.memory.load32(ZERO_PAGE + 0x214) == START


@pytest.mark.parametrize("kernel", [PLAIN, bz_image()])
def test_the_kernel_finds_its_line_its_initramfs_and_its_tables(ram: Ram, kernel: bytes) -> None:
    load_into(ram, kernel, b"070701" * 1000, "console=ttyS0 quiet")
    page = ram.memory.read(ZERO_PAGE, 4096)
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    (line,) = struct.unpack_from("<I", page, 0x228)
    assert ram.memory.read(line, 20) == b"console=ttyS0 quiet\0"
    address, size = struct.unpack_from("<II", page, 0x218)
    assert (address % 4096, size) == (0, 6000)
    assert ram.memory.read(address, 12) == b"070701070701"
    (tables,) = struct.unpack_from("<Q", page, 0x70)
    assert ram.memory.read(tables, 8) == b"RSD PTR "


def test_the_memory_map_is_memory_less_the_firmware_s_place(ram: Ram) -> None:
    assert memory_map(ram.memory) == [
        (0, 0x9FC00, 1),
        (0xE0000, 0x20000, 2),
        (MIB, 63 * MIB, 1),
    ]
    load_into(ram, PLAIN)
    page = ram.memory.read(ZERO_PAGE, 4096)
    assert page[0x1E8] == 3
    assert struct.unpack_from("<QQI", page, 0x2D0 + 40) == (MIB, 63 * MIB, 1)


def test_memory_above_4_gib_is_in_the_map() -> None:
    ram = Ram(LOW_END + 2 * MIB)
    try:
        assert memory_map(ram.memory)[-1] == (HIGH_START, 2 * MIB, 1)
    finally:
        ram.close()


def test_the_first_4_gib_are_mapped_to_themselves(ram: Ram) -> None:
    load_into(ram, PLAIN)

    def entry(table: int, index: int) -> int:
        (value,) = struct.unpack("<Q", ram.memory.read(table + 8 * index, 8))
        assert value & 3 == 3
        return int(value)

    for address in (0, 2 * MIB, START, 0xC000_0000, 0xFFE0_0000):
        third = entry(PAGE_TABLES, 0) & ~0xFFF
        second = entry(third, address >> 30) & ~0xFFF
        page = entry(second, address >> 21 & 511)
        assert page & 0x80
        assert page & ~0x1F_FFFF == address


BIG = b"".join(struct.pack("<Q", number) for number in range(3000))  # six pages, nearly


def aligned_elf() -> bytes:
    """Its segment begins at a page of the file, as a real vmlinux's do, and more comes after."""
    plain = elf((1, START, BIG, 40_000))
    head = bytearray(plain[: 64 + 56])
    struct.pack_into("<Q", head, 64 + 8, 4096)
    return bytes(head).ljust(4096, b"\0") + BIG + b"behind" * 1000


@pytest.mark.parametrize("lasting", [False, True])
def test_files_are_in_memory_whether_read_or_mapped_and_stay_as_they_are(
    ram: Ram, lasting: bool
) -> None:
    archive = b"070701" * 3000
    with opened(aligned_elf()) as kernel, opened(archive) as initramfs:
        load(ram, kernel, initramfs, "quiet", 1, (), lasting=lasting)
        assert ram.memory.read(START, 40_000) == BIG + bytes(40_000 - len(BIG))
        address, size = struct.unpack("<II", ram.memory.read(ZERO_PAGE + 0x218, 8))
        assert ram.memory.read(address, size) == archive
        ram.memory.write(START, b"written by the guest")
        ram.memory.write(address, b"written by the guest")
        assert os.pread(kernel, len(BIG), 4096) == BIG
        assert os.pread(initramfs, size, 0) == archive
        assert ram.memory.read(START, 7) == b"written"


def test_what_does_not_align_is_not_mapped(ram: Ram) -> None:
    with opened(BIG) as file:
        assert ram.map_file(file, 8, 8192, START) == 0
        assert ram.map_file(file, 0, 8192, START + 8) == 0
        assert ram.map_file(file, 0, 4095, START) == 0
        assert ram.map_file(file, 4096, 8191, START) == 4096
        assert ram.memory.read(START, 4096) == BIG[4096:8192]
        with pytest.raises(GuestMemoryError):
            ram.map_file(file, 0, 8192, 64 * MIB - 4096)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (b"", "neither an ELF vmlinux nor a bzImage"),
        (b"#!/bin/sh\n" * 200, "neither an ELF vmlinux nor a bzImage"),
        (PLAIN[:40], "no 64-bit little-endian ELF"),
        (PLAIN[:100], "table of segments lies outside"),
        (PLAIN[:300], "cut off"),
        (b"\x7fELF\x01" + PLAIN[5:], "no 64-bit little-endian ELF"),
        (PLAIN[:18] + b"\xb7" + PLAIN[19:], "another kind of processor"),
        (elf((1, 0x1000, CODE, 4096), entry=0x1000), "where a kernel can't be"),
        (elf((1, 1 << 50, CODE, 4096), entry=1 << 50), "where a kernel can't be"),
        (elf((1, START, CODE, 4096), entry=0), "entry 0x0 lies outside"),
        (elf((4, START, CODE, 4096)), "lies outside"),
        (elf((1, 63 * MIB, CODE, 2 * MIB), entry=63 * MIB), "give the machine more"),
        (bz_image(protocol=0x20B), "no 64-bit entry"),
        (bz_image(flags=0), "no 64-bit entry"),
        (bz_image()[:1100], "cut off"),
        (bz_image(needs=100 * MIB), "give the machine more"),
    ],
)
def test_what_can_not_be_booted_is_refused_with_the_reason(
    ram: Ram, kernel: bytes, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        load_into(ram, kernel)


def test_an_initramfs_that_has_no_room_is_refused(ram: Ram) -> None:
    with pytest.raises(KernelError, match="initramfs of 60 MiB; give the machine more"):
        load_into(ram, PLAIN, bytes(60 * MIB))


@given(st.binary(max_size=400), st.integers(0, len(PLAIN)))
def test_damage_to_a_kernel_is_refused_or_harmless(damage: bytes, at: int) -> None:
    for kernel in (PLAIN, bz_image()):
        with opened(kernel[:at] + damage + kernel[at + len(damage) :]) as file:
            try:
                found = read_kernel(file)
            except KernelError:
                continue
            size = os.fstat(file).st_size
        for segment in found.segments:
            assert MIB <= segment.address < segment.end
            assert segment.offset + segment.file_size <= size


def test_a_kernel_knows_where_its_last_segment_ends() -> None:
    with opened(elf((1, START, CODE, 4096), (1, 20 * MIB, b"", MIB))) as file:
        kernel = read_kernel(file)
    assert kernel.segments[1] == Segment(64 + 112 + len(CODE), 0, 20 * MIB, MIB)
    assert kernel.end == 21 * MIB


def test_a_line_that_would_be_cut_is_refused(ram: Ram) -> None:
    load_into(ram, PLAIN, line="x" * LONGEST_LINE)
    assert ram.memory.read(COMMAND_LINE + LONGEST_LINE - 1, 2) == b"x\0"
    with pytest.raises(ValueError, match="2048 bytes"):
        load_into(ram, PLAIN, line="x" * (LONGEST_LINE + 1))


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(
    ram: Ram, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real: Callable[..., int] = os.preadv
    with opened(PLAIN) as kernel_file, opened(b"070701" * 1000) as initramfs_file:

        def shorter(file: int, buffers: list[memoryview], offset: int) -> int:
            if file == initramfs_file:
                os.ftruncate(initramfs_file, 0)
            return real(file, buffers, offset)

        monkeypatch.setattr(os, "preadv", shorter)
        with pytest.raises(KernelError, match="became shorter"):
            load(ram, kernel_file, initramfs_file, "quiet", 1, ())
