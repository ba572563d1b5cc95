"""The machine's end: file systems written out, then the power off."""

from __future__ import annotations

import os

from . import kernel


def turn_off(*, restart: bool) -> None:
    """End the machine. ``restart``: by restarting it, which ends a QEMU that is told not to
    (``-no-reboot``) at once and is all a machine without power management can do.

    Returns only when the kernel refuses, which raises OSError.
    """
    os.sync()
    kernel.reboot(kernel.RB_AUTOBOOT if restart else kernel.RB_POWER_OFF)


def take_over_secure_attention_key() -> None:
    """Have Ctrl-Alt-Delete send us SIGINT in place of a restart at once (reboot(2))."""
    kernel.reboot(kernel.RB_DISABLE_CAD)
