"""What machines have in common that boot a guest image: how its agent is told what it is for."""

from __future__ import annotations

import re
import time
from abc import abstractmethod

from voidbus.vm.agent_machine import AgentMachine
from voidbus.vm.channel import GuestChannel
from voidbus.vm.configure import GuestSettings, configure_guest
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.handshake import Flags

AGENT_PORT = 1234
"""The vsock port of the guest agent (protocol, "Handshake")."""

# The guest's words for a mount it could not make, or a key of one it could not read.
_MOUNT_FAILED = re.compile(r"\(mount\d+\)|voidbox\.mount\d+|voidbus\.more")


class ImageMachine(AgentMachine):
    """A virtual machine with the agent of `vm/guest` as its first process."""

    @abstractmethod
    def _image_env(self) -> tuple[tuple[str, str], ...]:
        """What the image that is the root says of its programs' environment."""

    def _ready(self, channel: GuestChannel, deadline: float, *, first: bool) -> None:
        env = (*self._image_env(), *self.spec.env.items())
        if not first:
            if Flags.CONFIGURE not in channel.flags:  # then the host adds it to each program
                channel.add_env(env)
            return
        settings = GuestSettings(env=env, allowed=self.spec.allowed_commands)
        self.warnings = configure_guest(channel, settings, max(0.0, deadline - time.monotonic()))
        missing = [warning for warning in self.warnings if _MOUNT_FAILED.search(warning)]
        if missing:  # a program without the files it was promised does something else
            raise ChannelFault(FaultReason.REFUSED, "; ".join(missing))
