"""Lays a kernel, its initramfs and what it is told into guest memory.

    0x00500  descriptor table           0x20000  command line
    0x07000  zero page                  0xE0000  ACPI tables
    0x09000  page tables                1 MiB    kernel and upwards; initramfs at the top

The zero page and the e820 map are those of Linux `Documentation/arch/x86/zero-page.rst` and
`boot.rst`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from voidbus.vm.devices.faults import GuestMemoryError
from voidbus.vm.devices.memory import PAGE, GuestMemory
from voidbus.vm.kvm.acpi_tables import TABLES_ADDRESS, TABLES_END, MmioDevice, acpi_tables
from voidbus.vm.kvm.kernel_file import HEADER_START, Kernel, KernelError, read_kernel
from voidbus.vm.kvm.memory import Ram

DESCRIPTOR_TABLE = 0x500
ZERO_PAGE = 0x7000
PAGE_TABLES = 0x9000
COMMAND_LINE = 0x2_0000

LONGEST_LINE = 2047
"""Bytes of a command line that reach the kernel: COMMAND_LINE_SIZE of x86 less the final zero."""

CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18
"""__BOOT_CS and __BOOT_DS, which the boot protocol asks for."""

_DESCRIPTORS = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)  # 64-bit code, flat data
DESCRIPTOR_TABLE_BYTES = 8 * len(_DESCRIPTORS)

_CONVENTIONAL_END = 0x9_FC00
_HIGH = 0x10_0000
_RAM, _RESERVED = 1, 2  # types of the e820 map
_INITRAMFS_TOP = 0x7FFF_F000
"""Where it ends at the latest: initrd_addr_max of a header says 2 GiB."""
_PRESENT_WRITABLE, _LARGE = 3, 0x80


def load(
    ram: Ram,
    kernel_file: int,
    initramfs_file: int,
    line: str,
    vcpus: int,
    devices: Sequence[MmioDevice],
    *,
    lasting: bool = False,
) -> int:
    """Put everything in place in memory that is all zeros; the address to enter at. The files
    stay the caller's. Where they are ``lasting``, such as nobody changes, they are mapped and not
    read. Raises KernelError (which a machine's memory may be too small for, too),
    OSError, ValueError (the command line, too many devices)."""
    command_line = line.encode("ascii")
    if len(command_line) > LONGEST_LINE or b"\0" in command_line:
        raise ValueError(f"a command line of {len(command_line)} bytes; {LONGEST_LINE} at most")
    memory = ram.memory
    kernel = read_kernel(kernel_file)
    top = memory.regions[0].size
    size = os.fstat(initramfs_file).st_size
    initramfs = (min(top, _INITRAMFS_TOP) - size) // PAGE * PAGE
    if initramfs < kernel.end:
        raise KernelError(
            f"memory of {top >> 20} MiB can't hold the kernel (up to {kernel.end >> 20} MiB) and "
            f"an initramfs of {size >> 20} MiB; give the machine more"
        )
    try:
        for segment in kernel.segments:
            place = (segment.offset, segment.file_size, segment.address)
            _place(ram, kernel_file, *place, lasting=lasting)
        _place(ram, initramfs_file, 0, size, initramfs, lasting=lasting)
        memory.write(COMMAND_LINE, command_line + b"\0")
        memory.write(TABLES_ADDRESS, acpi_tables(vcpus, devices))
        memory.write(ZERO_PAGE, _zero_page(memory, kernel, initramfs, size, len(command_line)))
        memory.write(DESCRIPTOR_TABLE, struct.pack("<4Q", *_DESCRIPTORS))
        _write_page_tables(memory)
    except GuestMemoryError as error:
        raise KernelError(f"memory of {top >> 20} MiB is too small for the kernel") from error
    return kernel.entry


def _place(ram: Ram, file: int, offset: int, size: int, address: int, *, lasting: bool) -> None:
    """Have a part of a file in guest memory: mapped as far as that goes, the rest read."""
    if not size:
        return
    done = ram.map_file(file, offset, size, address) if lasting else 0
    view = ram.memory.view(address, size)
    while done < size:
        count = os.preadv(file, [view[done:]], offset + done)
        if not count:
            raise KernelError("a file became shorter while it was read; get it again")
        done += count


def _zero_page(
    memory: GuestMemory, kernel: Kernel, initramfs: int, size: int, line_size: int
) -> bytes:
    page = bytearray(PAGE)
    page[HEADER_START : HEADER_START + len(kernel.header)] = kernel.header
    put = struct.pack_into
    put("<Q", page, 0x070, TABLES_ADDRESS)  # acpi_rsdp_addr
    put("<H", page, 0x1FE, 0xAA55)  # boot_flag
    put("<4s", page, 0x202, b"HdrS")
    if not kernel.header:
        put("<H", page, 0x206, 0x20F)  # version: as new as what is used here
        put("<I", page, 0x230, 0x100_0000)  # kernel_alignment
    page[0x210] = 0xFF  # type_of_loader: none that has a number
    page[0x211] |= 0x01  # loadflags: LOADED_HIGH
    put("<I", page, 0x214, kernel.segments[0].address)  # code32_start
    put("<II", page, 0x218, initramfs, size)  # ramdisk_image, ramdisk_size
    put("<I", page, 0x228, COMMAND_LINE)  # cmd_line_ptr
    put("<I", page, 0x238, line_size)  # cmdline_size
    entries = memory_map(memory)
    page[0x1E8] = len(entries)  # e820_entries
    for number, entry in enumerate(entries):
        put("<QQI", page, 0x2D0 + 20 * number, *entry)  # e820_table
    return bytes(page)


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """The e820 map: address, size and type of each piece."""
    low, *high = memory.regions
    return [
        (0, _CONVENTIONAL_END, _RAM),
        (TABLES_ADDRESS, TABLES_END - TABLES_ADDRESS, _RESERVED),
        (_HIGH, low.size - _HIGH, _RAM),
        *((region.address, region.size, _RAM) for region in high),
    ]


def _write_page_tables(memory: GuestMemory) -> None:
    """The first 4 GiB mapped to themselves, in pages of 2 MiB: one table of each upper level, and
    four below."""
    third, second = PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE
    memory.write(PAGE_TABLES, struct.pack("<Q", third | _PRESENT_WRITABLE))
    tables = [second + number * PAGE | _PRESENT_WRITABLE for number in range(4)]
    memory.write(third, struct.pack("<4Q", *tables))
    pages = [page << 21 | _LARGE | _PRESENT_WRITABLE for page in range(4 * 512)]
    memory.write(second, struct.pack("<2048Q", *pages))
