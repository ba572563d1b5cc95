"""What one guest reaches of its host: the run's sidecar, and the gateway to its model."""

from __future__ import annotations

import logging
from pathlib import Path

from voidbus.sidecar.model_endpoint import ModelEndpoint
from voidbus.sidecar.model_gateway import GatewayError, ModelGateway
from voidbus.vm.channel import GuestChannel
from voidbus.vm.machine import Machine

log = logging.getLogger("voidbus.actors")

_FORWARD_TIMEOUT = 10.0
# How long the gateway may take to serve, or to end (seconds).
_GATEWAY_TIMEOUT = 3.0
_GATEWAY_SOCKET = "model"


class HostServices:
    """Of one machine. Its methods block: they are for a job thread, and `close` for the end."""

    def __init__(self, machine: Machine, model: ModelEndpoint | None, scratch: Path) -> None:
        self._machine = machine
        self._socket = scratch / _GATEWAY_SOCKET
        self._gateway = ModelGateway(model, self._socket) if model is not None else None

    def offer_sidecar(self, channel: GuestChannel, sidecar: tuple[str, int] | None) -> str | None:
        """The sidecar's URL for programs in the guest. Raises ChannelFault."""
        if sidecar is None:
            return None
        host, port = sidecar
        address = self._machine.offer_host_port(port)
        if address is not None:
            return f"http://{address}:{port}"
        # No network card needed: a port in the guest leads to this one endpoint of the host.
        inside = channel.listen_forward(0, (host, port), timeout=_FORWARD_TIMEOUT)
        return f"http://127.0.0.1:{inside}"

    def offer_model(self, channel: GuestChannel) -> str | None:
        """The gateway's URL for programs in the guest: always by a forwarded port, so that nobody
        else of the network reaches it. Raises ChannelFault, GatewayError."""
        if self._gateway is None:
            return None
        self._gateway.start(_GATEWAY_TIMEOUT)
        inside = channel.listen_forward(0, self._socket, timeout=_FORWARD_TIMEOUT)
        return f"http://127.0.0.1:{inside}"

    def close(self) -> None:
        """End the gateway."""
        if self._gateway is None:
            return
        try:
            self._gateway.stop(_GATEWAY_TIMEOUT)
        except GatewayError as error:
            log.error("machine %s: %s", self._machine.spec.name, error)
