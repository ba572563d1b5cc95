"""A hub's sockets: a ROUTER for each right and an XPUB for topics, on this host and for others."""

from __future__ import annotations

import time

import zmq
from zmq.auth.thread import ThreadAuthenticator

from voidbus.transport.access import Endpoints, ServerKeys
from voidbus.transport.envelope import ATTACHMENT_LIMIT
from voidbus.transport.message import Right
from voidbus.transport.remote import AllowedKeys
from voidbus.transport.topics import PREFIX_LIMIT

# The name and length before the prefix in a SUBSCRIBE command, generously (ZMTP 3.1).
_COMMAND = 64


# How long the name of a hub's authenticator that was closed before may still be taken (seconds).
_NAME_SECONDS = 5.0


class HubSockets:
    """Bound where they are made. Who makes it closes it, also where that raises."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], high_water: int) -> None:
        self._context = context
        self._high_water = high_water
        self._authenticator: ThreadAuthenticator | None = None
        self._inproc: list[tuple[zmq.Socket[bytes], str]] = []
        self.rights: dict[zmq.Socket[bytes], Right] = {}
        self.monitors: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}
        self.topics: list[zmq.Socket[bytes]] = []

    def bind(self, endpoints: Endpoints) -> Endpoints:
        """Open the sockets of `endpoints`; where they are bound. Raises ZMQError."""
        if endpoints.keys is not None:
            self._authenticate(endpoints.keys)
        bound: dict[Right, str] = {}
        for right, url in endpoints.rights.items():
            router = self._context.socket(zmq.ROUTER)
            self.rights[router] = right
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._prepare(router, right, endpoints.keys)
            if not url.startswith("inproc:"):  # which has no monitor
                self.monitors[router.get_monitor_socket(zmq.EVENT_DISCONNECTED)] = router
            bound[right] = self._bind(router, url)
        topics = ""
        if endpoints.topics:
            xpub = self._context.socket(zmq.XPUB)
            self.topics.append(xpub)
            xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
            self._prepare(xpub, Right.OBSERVE, endpoints.keys)
            # Nothing longer than a subscription comes here; the rest is the command round it.
            xpub.setsockopt(zmq.MAXMSGSIZE, PREFIX_LIMIT + _COMMAND)
            topics = self._bind(xpub, endpoints.topics)
        return Endpoints(bound, topics, endpoints.keys)

    def all(self) -> list[zmq.Socket[bytes]]:
        """The sockets to read."""
        return [*self.rights, *self.monitors, *self.topics]

    def close(self) -> None:
        """Close them in a fixed order. What was sent last has 100 ms to leave."""
        for monitor, router in self.monitors.items():
            router.disable_monitor()
            monitor.close(linger=0)
        for router, url in self._inproc:
            router.unbind(url)  # closing frees the name only some time later
        for router in self.rights:
            router.close(linger=100)  # a peer that doesn't read can't hold us
        for xpub in self.topics:
            xpub.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()

    def _authenticate(self, keys: ServerKeys) -> None:
        """Let in, on sockets with these keys, who is on the list of the socket's right."""
        if self._authenticator is None:
            self._authenticator = _started_authenticator(self._context)
        for right, folder in keys.clients.items():
            self._authenticator.configure_curve_callback(right.name, AllowedKeys(folder))

    def _prepare(self, socket: zmq.Socket[bytes], right: Right, keys: ServerKeys | None) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._high_water)
        socket.setsockopt(zmq.RCVHWM, self._high_water)
        socket.setsockopt(zmq.MAXMSGSIZE, ATTACHMENT_LIMIT)
        if keys is not None:
            socket.curve_secretkey = keys.secret
            socket.curve_publickey = keys.public
            socket.curve_server = True
            socket.zap_domain = right.name.encode()

    def _bind(self, socket: zmq.Socket[bytes], url: str) -> str:
        socket.bind(url)
        found = socket.getsockopt(zmq.LAST_ENDPOINT)
        bound = found.rstrip(b"\0").decode() if isinstance(found, bytes) else url
        if bound.startswith("inproc:") and socket in self.rights:
            self._inproc.append((socket, bound))
        return bound


def _started_authenticator(context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
    """ZeroMQ asks one socket of a context who may come in, by a fixed name, which closing the one
    before frees only some time later."""
    deadline = time.monotonic() + _NAME_SECONDS
    while True:
        authenticator = ThreadAuthenticator(context)
        try:
            authenticator.start()
            return authenticator
        except zmq.ZMQError as error:
            authenticator.stop()
            if error.errno != zmq.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
