"""Reading the start of a block device, which may only just have been found."""

from __future__ import annotations

import errno
import os
import time

DEVICE_SECONDS = 3.0
"""How long a block device may take to appear once its driver is loaded."""


def read_start(device: str, length: int) -> bytes:
    """Its first ``length`` bytes, or all where it has fewer. Raises OSError: FileNotFoundError when
    there is no such device."""
    deadline = time.monotonic() + DEVICE_SECONDS
    while True:
        try:
            fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO):
                raise
            if time.monotonic() >= deadline:
                raise FileNotFoundError(errno.ENOENT, "there is no such device", device) from None
            time.sleep(0.01)
            continue
        try:
            data = b""
            while len(data) < length and (more := os.read(fd, length - len(data))):
                data += more
            return data
        finally:
            os.close(fd)
