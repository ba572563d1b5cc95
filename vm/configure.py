"""Telling a guest what its programs get and must keep to, whatever protocol it speaks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field

from voidbus.vm.channel import GuestChannel
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.configure_messages import Configure
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.guest.limits import Limits
from voidbus.vm.guest.rules import ALLOWLIST, LIMITS

SEED_BYTES = 64
"""Random bytes a guest gets: two of the kernel's pools (256 bits, drivers/char/random.c)."""

UNUSED_MEMORY_LIMIT = 4 * 1024 * 1024 * 1024
"""``max_virtual_memory`` of the protocol's limits file, which no guest applies ("Exec")."""


@dataclass(frozen=True)
class GuestSettings:
    """What the programs of a guest find and must keep to. ``env`` is under that of each
    program; ``allowed`` None allows every program; ``limits`` None leaves the protocol's."""

    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    allowed: tuple[str, ...] | None = None
    limits: Limits | None = None


def configure_guest(
    channel: GuestChannel, settings: GuestSettings, timeout: float
) -> tuple[str, ...]:
    """Configure a guest before its first program, once; what went wrong while it booted.

    A guest that knows CONFIGURE also gets the time and a seed for its random numbers. Any
    other gets the files it reads, and ``channel`` adds ``env`` to every program itself; a
    later channel to such a guest must be told with ``channel.add_env`` again.

    Raises ChannelFault: REFUSED when the guest was configured before.
    """
    deadline = time.monotonic() + timeout
    if Flags.CONFIGURE in channel.flags:
        message = Configure(
            settings.env,
            settings.allowed,
            settings.limits,
            secrets.token_bytes(SEED_BYTES),
            time.time(),
        )
        answer = channel.configure(message, timeout)
        if answer.error is not None:
            raise ChannelFault(FaultReason.REFUSED, f"configuring the guest: {answer.error}")
        return answer.warnings
    channel.add_env(settings.env)
    files: list[tuple[str, object]] = []
    if settings.limits is not None:
        files.append((LIMITS, _limits_file(settings.limits)))
    if settings.allowed is not None:
        files.append((ALLOWLIST, list(settings.allowed)))
    for path, content in files:
        left = max(0.0, deadline - time.monotonic())
        channel.write_file(path, json.dumps(content).encode(), left)
    return ()


def _limits_file(limits: Limits) -> dict[str, int]:
    return {
        "max_virtual_memory": UNUSED_MEMORY_LIMIT,
        "max_open_files": limits.open_files,
        "max_processes": limits.processes,
        "max_file_size": limits.file_bytes,
    }
