"""A Python in a lab of its own, whose standard input and output are this one's.

`lab_python.py NAME ARGUMENT...`: what pytest-xdist takes for the interpreter of a worker, so that
tests are handed out to labs as to processes (`scripts/lab`). What the lab and the worker say is in
`build/lab/NAME.log`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvm_lab import RESULTS, entries, fetched_kernel, qemu_command

from voidbus.vm.image.cpio import write_archive

# The only port; Linux lets it be opened once, and numbers its device as one of all of virtio.
_PORT = '<>"$(echo /dev/vport*p1)" >&0 2>/dev/console'

_PASSED_ON = ("VOIDBUS_", "VOID_BOX_", "PYTHONPYCACHEPREFIX")


def main() -> None:
    asker = os.getppid()
    name, *arguments = sys.argv[1:]
    kernel = fetched_kernel()
    given = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(_PASSED_ON)]
    interpreter = ["env", "-u", "PYTHONDONTWRITEBYTECODE", *given, sys.executable, *arguments]
    initramfs = os.memfd_create("initramfs", 0)  # QEMU's to read, and gone with it
    with open(initramfs, "wb", closefd=False) as file:
        write_archive(entries(kernel, interpreter, _PORT), file)
    RESULTS.mkdir(parents=True, exist_ok=True)
    log = RESULTS / f"{name}.log"
    command = [
        *qemu_command(kernel, Path(f"/proc/self/fd/{initramfs}")),
        *("-chardev", "stdio,id=worker,signal=off"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=worker"),
        *("-serial", f"file:{log}"),
    ]
    os.dup2(os.open(log.with_suffix(".qemu.log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    if os.getppid() == asker:  # else nobody is left, whose end would be the lab's
        os.execvp(command[0], command)


if __name__ == "__main__":
    main()
