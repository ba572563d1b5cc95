"""ACPI tables and their machine language: encoded as the specification has it, and iasl agrees."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.kvm import aml
from voidbus.vm.kvm.acpi_tables import TABLES_ADDRESS, MmioDevice, acpi_tables

DEVICES = [MmioDevice(0xD000_0000 + 0x1000 * number, 0x1000, 5 + number) for number in range(19)]


def table_at(tables: bytes, address: int) -> bytes:
    start = address - TABLES_ADDRESS
    (size,) = struct.unpack_from("<I", tables, start + 4)
    return tables[start : start + size]


def tables_of(vcpus: int) -> dict[str, bytes]:
    """The tables by signature, found as a kernel finds them."""
    tables = acpi_tables(vcpus, DEVICES)
    assert tables[:8] == b"RSD PTR "
    assert sum(tables[:20]) % 256 == sum(tables[:36]) % 256 == 0
    xsdt = table_at(tables, struct.unpack_from("<Q", tables, 24)[0])
    found = {"XSDT": xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        table = table_at(tables, address)
        found[table[:4].decode()] = table
    (dsdt,) = struct.unpack_from("<Q", found["FACP"], 140)
    found["DSDT"] = table_at(tables, dsdt)
    return found


def test_every_table_is_found_and_its_checksum_is_right() -> None:
    found = tables_of(4)
    assert sorted(found) == ["APIC", "DSDT", "FACP", "XSDT"]
    assert all(sum(table) % 256 == 0 for table in found.values())


@pytest.mark.parametrize("vcpus", [1, 2, 64])
def test_every_vcpu_has_a_local_apic_and_there_is_one_io_apic(vcpus: int) -> None:
    madt = tables_of(vcpus)["APIC"]
    at, kinds = 44, []
    while at < len(madt):
        kinds.append((madt[at], madt[at + 3]))
        at += madt[at + 1]
    assert kinds[:-1] == [(0, number) for number in range(vcpus)]
    assert kinds[-1][0] == 1


@pytest.mark.needs("iasl")
def test_iasl_reads_the_tables_and_makes_the_same_of_them_again(tmp_path: Path) -> None:
    found = tables_of(2)
    for name in ("DSDT", "FACP", "APIC"):
        file = tmp_path / f"{name}.aml"
        file.write_bytes(found[name])
        run = subprocess.run(
            ["iasl", "-d", file], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )
        assert run.returncode == 0, run.stderr
        text = (tmp_path / f"{name}.dsl").read_text()
        assert "Invalid" not in text
        assert "Error" not in text
    again = subprocess.run(
        ["iasl", "-oa", "-p", "again", "DSDT.dsl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert again.returncode == 0, again.stdout
    assert "0 Errors, 0 Warnings" in again.stdout
    # The header is of the compiler, from the revision of its creator on.
    assert (tmp_path / "again.aml").read_bytes()[36:] == found["DSDT"][36:]


@pytest.mark.needs("iasl")
def test_iasl_finds_each_device_where_it_was_put(tmp_path: Path) -> None:
    (tmp_path / "DSDT.aml").write_bytes(tables_of(1)["DSDT"])
    subprocess.run(["iasl", "-d", "DSDT.aml"], cwd=tmp_path, capture_output=True, timeout=30)
    text = (tmp_path / "DSDT.dsl").read_text()
    assert text.count('"LNRO0005"') == len(DEVICES)
    assert "PNP0501" in text
    for device in DEVICES:
        assert f"0x{device.address:08X}" in text
        assert f"0x{device.line:08X}," in text


@given(st.integers(0, (1 << 28) - 5))
def test_a_package_length_says_how_long_it_and_its_content_are(size: int) -> None:
    encoded = aml.package_length(size)
    more = encoded[0] >> 6
    assert len(encoded) == 1 + more
    if more:
        assert encoded[0] & 0x30 == 0
        value = encoded[0] & 0xF | int.from_bytes(encoded[1:], "little") << 4
    else:
        value = encoded[0]
    assert value == size + len(encoded)


@given(st.integers(0, (1 << 64) - 1))
def test_an_integer_is_encoded_with_the_prefix_of_its_width(value: int) -> None:
    encoded = aml.integer(value)
    if value < 2:
        assert encoded == bytes([value])
    else:
        width = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[encoded[0]]
        assert encoded[1:] == value.to_bytes(width, "little")
        assert width == 1 or value >= 1 << 4 * width


@pytest.mark.parametrize(
    "make",
    [
        lambda: aml.integer(-1),
        lambda: aml.integer(1 << 64),
        lambda: aml.string("é"),
        lambda: aml.string("a\0b"),
        lambda: aml.name_segment("abc"),
        lambda: aml.name_segment("1ABC"),
        lambda: aml.eisa_id("PNP05"),
        lambda: aml.package_length(1 << 28),
    ],
)
def test_what_has_no_encoding_is_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_more_devices_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        acpi_tables(1, DEVICES * 100)
