"""What the kernel of any virtual machine is told on its command line."""

from __future__ import annotations

from collections.abc import Sequence

# Kernel Documentation/admin-guide/kernel-parameters.rst. One line a reason:
KERNEL_ARGUMENTS = (
    "console=ttyS0",
    "quiet",  # each character is an exit to who emulates the port
    "panic=-1",  # a panic resets at once,
    "reboot=t",  # by a triple fault, which ends the machine
    "8250.nr_uarts=1",  # no probing for three more
    "random.trust_cpu=on",
    "ipv6.disable=1",  # the user-mode network has none
    "nokaslr",  # relocation costs time, and a guest's root is the guest's own
    "cryptomgr.notests",  # 0.1 s of an emulated processor, for ciphers that work
)


def kernel_line(arguments: Sequence[str]) -> str:
    """The command line. Raises ValueError for an argument that would not arrive whole."""
    for argument in arguments:
        if not argument.isascii() or not argument.isprintable() or set(argument) & set(' "\\'):
            raise ValueError(f"{argument!r} can't stand on a kernel's command line")
    return " ".join((*KERNEL_ARGUMENTS, *arguments))


def require_length(line: str, longest: int) -> None:
    """Raises ValueError for a line of more than `longest` bytes, which would be cut."""
    if len(line) > longest:
        raise ValueError(
            f"the kernel's command line of {len(line)} bytes is too long; use fewer mounts, or "
            "mount them at shorter paths in the guest"
        )
