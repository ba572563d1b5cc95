"""The block device against a driver: what is read and written, and what is refused."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmio_driver import MmioDriver, driven
from virtio_driver import DriverQueue

from voidbus.vm.devices.block import (
    F_RO,
    MAX_REQUEST,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SECTOR,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    BlockDevice,
)

SECTORS = 64
CONTENT = b"".join(bytes([number]) * SECTOR for number in range(SECTORS))


@contextlib.contextmanager
def disk(
    path: Path, *, writable: bool = False, indirect: bool = False, extra: bytes = b""
) -> Iterator[tuple[MmioDriver, DriverQueue, BlockDevice]]:
    path.write_bytes(CONTENT + extra)
    file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    device = BlockDevice(file, "layer0", writable=writable)
    with driven(device, size=16, indirect=indirect) as (driver, (queue,)):
        yield driver, queue, device
    with pytest.raises(OSError):
        os.fstat(file)  # closed with the device


def ask(
    queue: DriverQueue, kind: int, sector: int = 0, data: bytes = b"", room: tuple[int, ...] = ()
) -> tuple[int, bytes]:
    """The status of a request and what it read."""
    header = struct.pack("<IIQ", kind, 0, sector)
    queue.add([header, data] if data else [header], [*room, 1])
    request = next(iter(queue._requests.values()))
    queue.kick()
    (done,) = queue.wait()
    status_at = request.writable[-1][0]
    status = queue.ram.read(status_at, 1)[0]
    return status, done.data[: sum(room)]


@pytest.mark.parametrize("indirect", [False, True])
def test_sectors_are_read_into_as_many_buffers_as_there_are(tmp_path: Path, indirect: bool) -> None:
    with disk(tmp_path / "disk", indirect=indirect) as (_, queue, _):
        assert ask(queue, T_IN, 3, room=(SECTOR,)) == (S_OK, CONTENT[3 * SECTOR : 4 * SECTOR])
        status, data = ask(queue, T_IN, 0, room=(100, 5 * SECTOR - 100, SECTOR))
        assert (status, data) == (S_OK, CONTENT[: 6 * SECTOR])
        assert ask(queue, T_IN, 0, room=(SECTORS * SECTOR,)) == (S_OK, CONTENT)


def test_sectors_are_written_where_that_is_allowed(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", writable=True) as (driver, queue, _):
        assert not driver.offered() & F_RO
        assert ask(queue, T_OUT, 5, b"x" * 2 * SECTOR) == (S_OK, b"")
        assert ask(queue, T_FLUSH) == (S_OK, b"")
        assert ask(queue, T_IN, 4, room=(4 * SECTOR,))[1] == (
            CONTENT[4 * SECTOR : 5 * SECTOR] + b"x" * 2 * SECTOR + CONTENT[7 * SECTOR : 8 * SECTOR]
        )
    assert (tmp_path / "disk").read_bytes()[5 * SECTOR : 7 * SECTOR] == b"x" * 2 * SECTOR


def test_a_read_only_disk_says_so_and_is_never_written(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as (driver, queue, _):
        assert driver.offered() & F_RO
        assert ask(queue, T_OUT, 0, b"x" * SECTOR)[0] == S_UNSUPP
        assert ask(queue, T_FLUSH)[0] == S_OK
    assert (tmp_path / "disk").read_bytes() == CONTENT


def test_a_disk_tells_its_size_and_its_name(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", extra=b"less than a sector") as (driver, queue, _):
        assert driver.read(0x100, 8) == SECTORS
        status, data = ask(queue, T_GET_ID, room=(20,))
        assert (status, data) == (S_OK, b"layer0".ljust(20, b"\0"))


@pytest.mark.parametrize(
    ("sector", "size"),
    [
        (SECTORS, SECTOR),
        (SECTORS - 1, 2 * SECTOR),
        ((1 << 64) - 1, SECTOR),
        (1 << 55, SECTOR),
        (0, SECTOR - 1),
        (0, SECTOR + 1),
    ],
)
def test_what_is_outside_of_the_disk_is_an_error_of_that_request(
    tmp_path: Path, sector: int, size: int
) -> None:
    with disk(tmp_path / "disk", writable=True) as (_, queue, _):
        assert ask(queue, T_IN, sector, room=(size,))[0] == S_IOERR
        assert ask(queue, T_OUT, sector, b"x" * size)[0] == S_IOERR
        assert ask(queue, T_IN, 0, room=(SECTOR,)) == (S_OK, CONTENT[:SECTOR])
    assert (tmp_path / "disk").read_bytes() == CONTENT


def test_a_request_that_is_too_big_is_an_error_of_that_request(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 2 * MAX_REQUEST)
    device = BlockDevice(os.open(path, os.O_RDONLY), "big")
    with driven(device, size=16) as (driver, (queue,)):
        address, half = driver.ram.alloc(4096), 1 << 20
        header = driver.ram.alloc(16)
        driver.ram.write(header, struct.pack("<IIQ", T_IN, 0, 0))
        status = driver.ram.alloc(1)
        driver.ram.write(status, b"\xff")
        queue.size = 16
        queue.write_descriptor(0, header, 16, 1, 1)
        for number in range(1, 15):  # the same memory again and again
            queue.write_descriptor(number, address, half * 2, 3, number + 1)
        queue.write_descriptor(15, status, 1, 2)
        queue.make_available(0)
        queue.kick(always=True)
        driver.settled()
        driver.settled()
        assert driver.ram.read(status, 1)[0] == S_IOERR


def test_a_kind_of_request_there_is_not_is_said_to_be_so(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as (_, queue, _):
        assert ask(queue, 77, room=(SECTOR,))[0] == S_UNSUPP


def test_a_disk_that_became_shorter_is_an_error_of_that_request(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as (_, queue, _):
        os.truncate(tmp_path / "disk", SECTOR)
        assert ask(queue, T_IN, 0, room=(2 * SECTOR,))[0] == S_IOERR
        assert ask(queue, T_IN, 0, room=(SECTOR,))[0] == S_OK


@pytest.mark.parametrize(
    ("readable", "writable"), [([b"short"], [1]), ([bytes(16)], []), ([], [513])]
)
def test_what_is_no_request_ends_the_device(
    tmp_path: Path, readable: list[bytes], writable: list[int]
) -> None:
    (tmp_path / "disk").write_bytes(CONTENT)
    device = BlockDevice(os.open(tmp_path / "disk", os.O_RDONLY), "layer0")
    with driven(device) as (driver, (queue,)):
        queue.add(readable, writable)
        queue.kick()
        assert "a block request" in driver.failure()
        driver.failures.clear()


def test_many_requests_at_once_are_all_answered(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as (_, queue, _):
        answered = 0
        for _ in range(40):
            for sector in range(5):
                queue.add([struct.pack("<IIQ", T_IN, 0, sector)], [SECTOR, 1])
            queue.kick()
            count = 0
            while count < 5:
                count += len(queue.wait())
            answered += count
        assert answered == 200
