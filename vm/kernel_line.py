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
    # What would wake an idle guest, as many of a host's are: 7.5 times a second (Linux 6.1, one
    # vCPU; voluntary switches of its thread, proc_pid_status(5)). With all of these 0.1 times.
    "sysctl.vm.compaction_proactiveness=0",  # 3 a second: memory is compacted when it is wanted
    "tsc=nowatchdog",  # 3: which clock is right is not measured again and again
    "nowatchdog",  # 0.5: nor whether a processor hangs, which would be told nobody
    "psi=0",  # 1: nor how long programs wait for each other
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
