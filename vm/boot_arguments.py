"""What the kernel of any virtual machine is told of it, as the guest agent reads it."""

from __future__ import annotations

import time

from voidbus.vm.machine import MachineSpec, Mount

_HOSTNAME_BYTES = 63  # hostname(7)


def first_arguments(spec: MachineSpec) -> list[str]:
    """Secret, time of day and host name."""
    return [
        f"voidbox.secret={spec.secret.hex()}",
        f"voidbox.clock={time.time():.3f}",
        f"voidbus.hostname={_hostname(spec.run_id)}",
    ]


def mount_argument(tag: str, mount: Mount) -> str:
    """A directory of the host, shared as `tag`."""
    return f"voidbox.{tag}={tag}:{mount.guest_path}:{'rw' if mount.writable else 'ro'}"


def _hostname(text: str) -> str:
    """A host name of it: letters, digits and hyphens (hostname(7))."""
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in text)
    return kept[:_HOSTNAME_BYTES].strip("-") or "guest"
