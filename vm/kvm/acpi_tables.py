"""The ACPI tables of a machine: its processors, its interrupt lines, and where its devices are.

A machine of hardware-reduced ACPI: no fixed hardware, so the kernel looks for no interval timer, no
real-time clock and no keyboard. Layouts are those of the ACPI specification, version 6.5, in its
chapter 5.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from voidbus.vm.kvm import aml

TABLES_ADDRESS = 0xE_0000
"""Where they begin: in what was a PC's firmware, and so is no memory of the kernel's."""
TABLES_END = 0x10_0000

LOCAL_APIC = 0xFEE0_0000
IO_APIC = 0xFEC0_0000
"""Where a PC has them, and KVM too (APIC_DEFAULT_PHYS_BASE, IOAPIC_DEFAULT_BASE_ADDRESS)."""

SLEEP_CONTROL = 0x600
"""The port of the sleep control register (4.8.3.7), and behind it the sleep status register."""
SLEEP_ENABLE = 1 << 5
"""The bit in it by which the guest turns its machine off."""
SERIAL_PORT = 0x3F8
SERIAL_LINE = 4

_OFF = 5  # our number for the state S5, "soft off"
_OEM = b"VOIDBS"
_OEM_TABLE = b"VOIDBUS "
_CREATOR = b"VOID"

# FADT, 5.2.9: flags, and the x86 boot flags.
_WBINVD, _NO_POWER_BUTTON, _NO_SLEEP_BUTTON, _HARDWARE_REDUCED = 1 << 0, 1 << 4, 1 << 5, 1 << 20
_NO_VGA, _NO_RTC = 1 << 2, 1 << 5
_FADT_BYTES = 276


class MmioDevice(NamedTuple):
    """A virtio-mmio device: where its registers are, and its interrupt line."""

    address: int
    size: int
    line: int


def acpi_tables(vcpus: int, devices: Sequence[MmioDevice]) -> bytes:
    """What is to be at TABLES_ADDRESS, the RSDP first. Raises ValueError where it has no room."""
    tables = bytearray(64)  # the RSDP's, filled in below

    def place(table: bytes) -> int:
        tables.extend(bytes(-len(tables) % 16))
        address = TABLES_ADDRESS + len(tables)
        tables.extend(table)
        return address

    dsdt = place(_table(b"DSDT", 2, _definitions(devices)))
    fadt = place(_table(b"FACP", 6, _fadt(dsdt)))
    madt = place(_table(b"APIC", 5, _madt(vcpus)))
    xsdt = place(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    tables[:36] = _rsdp(xsdt)
    if len(tables) > TABLES_END - TABLES_ADDRESS:
        raise ValueError(f"{len(tables)} bytes of ACPI tables have no room")
    return bytes(tables)


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, content: bytes) -> bytes:
    """A table with its header (5.2.6)."""
    size = 36 + len(content)
    table = bytearray(
        struct.pack(
            "<4sIBB6s8sI4sI", signature, size, revision, 0, _OEM, _OEM_TABLE, 1, _CREATOR, 1
        )
    )
    table += content
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    """5.2.5.3. The first checksum is of the 20 bytes that version 1 had."""
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _register(port: int) -> bytes:
    """A generic address (5.2.3.2): a byte at a port."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt: int) -> bytes:
    """5.2.9: offsets are counted from the table's start."""
    table = bytearray(_FADT_BYTES)
    struct.pack_into("<H", table, 109, _NO_VGA | _NO_RTC)
    flags = _WBINVD | _NO_POWER_BUTTON | _NO_SLEEP_BUTTON | _HARDWARE_REDUCED
    struct.pack_into("<I", table, 112, flags)
    table[131] = 5  # the minor version
    struct.pack_into("<Q", table, 140, dsdt)
    table[244:256] = _register(SLEEP_CONTROL)
    table[256:268] = _register(SLEEP_CONTROL + 1)
    struct.pack_into("<Q", table, 268, int.from_bytes(_OEM_TABLE, "little"))
    return bytes(table[36:])


def _madt(vcpus: int) -> bytes:
    """5.2.12: local APICs, all enabled, and the I/O APIC, whose id follows theirs."""
    table = bytearray(struct.pack("<II", LOCAL_APIC, 0))
    for number in range(vcpus):
        table += struct.pack("<BBBBI", 0, 8, number, number, 1)
    table += struct.pack("<BBBBII", 1, 12, vcpus, 0, IO_APIC, 0)
    return bytes(table)


def _definitions(devices: Sequence[MmioDevice]) -> bytes:
    """What the DSDT says: how to turn off, the serial port, and the virtio-mmio devices, which
    have the id that Linux knows them by (`drivers/virtio/virtio_mmio.c`)."""
    serial = aml.device(
        "COM1",
        aml.named("_HID", aml.eisa_id("PNP0501")),
        aml.named("_UID", aml.integer(1)),
        aml.named("_CRS", aml.resources(aml.ports(SERIAL_PORT, 8), aml.interrupt(SERIAL_LINE))),
    )
    virtio = [
        aml.device(
            f"V{number:03X}",
            aml.named("_HID", aml.string("LNRO0005")),
            aml.named("_UID", aml.integer(number)),
            aml.named("_CCA", aml.integer(1)),
            aml.named(
                "_CRS",
                aml.resources(aml.memory(device.address, device.size), aml.interrupt(device.line)),
            ),
        )
        for number, device in enumerate(devices)
    ]
    off = aml.named("_S5_", aml.package(aml.integer(_OFF)))
    return off + aml.scope("_SB_", serial, *virtio)
