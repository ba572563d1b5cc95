"""A guest whose own driver is hostile: it maps the socket device's registers and rings itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from machine_kit import WAIT, MakeGuest
from patience import SLOW

from voidbus.vm.image.cpio import regular, write_archive
from voidbus.vm.image.store import default_store
from voidbus.vm.machine import MachineError

pytestmark = pytest.mark.timeout(300 * SLOW)

# Registers of virtio-mmio (virtio 1.2, 4.2.2); where the devices lie, the kernel has from ACPI. The
# rings lie in a page of this process, found by pagemap.
_DRIVER = """#!/usr/bin/python3.11 -IS
import mmap, os, struct, time
def mount(kind, at):
    os.makedirs(at, exist_ok=True)
    os.system("/bin/busybox mount -t %s none %s" % (kind, at))
mount("proc", "/proc")
mount("devtmpfs", "/dev")
page = mmap.mmap(-1, 4096)
page[:] = bytes(4096)
import ctypes
at = ctypes.addressof(ctypes.c_char.from_buffer(page))
with open("/proc/self/pagemap", "rb") as file:
    file.seek(at // 4096 * 8)
    ram = (struct.unpack("<Q", file.read(8))[0] & (1 << 55) - 1) * 4096
memory = os.open("/dev/mem", os.O_RDWR | os.O_SYNC)
with open("/proc/iomem") as file:
    places = [int(line.split("-")[0], 16) for line in file if "LNRO0005" in line]
first = min(places) & ~4095
registers = mmap.mmap(memory, (max(places) | 4095) + 1 - first, offset=first)
words = memoryview(registers).cast("I")
indices = [(place - first) // 4 for place in places]
(base,) = [at for at in indices if words[at] == 0x74726976 and words[at + 2] == 19]
def put(register, value):
    words[base + register // 4] = value
put(0x70, 0)
put(0x70, 3)
for half, features in ((0, 0), (1, 1)):
    put(0x24, half)
    put(0x20, features)
put(0x70, 11)
HOSTILE
for queue in (0, 1):
    put(0x30, queue)
    put(0x38, 8)
    for register, offset in ((0x80, 0), (0x90, 512), (0xA0, 1024)):
        put(register, (ram + queue * 2048 + offset) & 0xFFFFFFFF)
        put(register + 4, ram + queue * 2048 >> 32)
    put(0x44, 1)
put(0x70, 15)
while True:
    put(0x50, 1)
    time.sleep(0.1)
"""

# Of queue 1, to the host: its first descriptor, and how many it says there are.
_CHAINS = {
    "an address that is no memory": (
        'page[2048:2064] = struct.pack("<QIHH", 1 << 60, 64, 0, 0)\npage[2562] = 1',
        "leads out of memory",
    ),
    "a chain that is a circle": (
        'page[2048:2064] = struct.pack("<QIHH", ram, 64, 1, 0)\npage[2562] = 1',
        "a chain of more than 8 descriptors",
    ),
    "more chains than the ring holds": (
        "page[2563] = 0x70",
        "chains in a queue of 8",
    ),
}


@pytest.mark.parametrize("what", _CHAINS)
def test_a_driver_that_breaks_the_rules_of_a_ring_ends_its_own_machine_with_the_reason(
    make: MakeGuest, tmp_path: Path, what: str
) -> None:
    hostile, reason = _CHAINS[what]
    image = default_store().current()
    initramfs = tmp_path / "hostile.cpio"
    shutil.copyfile(image.initramfs, initramfs)
    with initramfs.open("ab") as file:
        script = _DRIVER.replace("HOSTILE", hostile)
        write_archive([regular("init", script.encode(), 0o755)], file)
    guest = make(kernel=image.kernel, initramfs=initramfs)
    with pytest.raises(MachineError, match=reason):
        guest.machine.start(40)
    assert guest.exited.wait(WAIT)
