"""A connected leaf, as its hub has it."""

from __future__ import annotations

import zmq

from voidbus.transport.control import Hello
from voidbus.transport.message import Right
from voidbus.transport.replay import ReplayWindow


class Link:
    """The socket and routing identity that reach a leaf, and the numbers its session has used."""

    __slots__ = ("hello", "identity", "last_heard", "node", "right", "socket", "window")

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        identity: bytes,
        right: Right,
        hello: Hello,
        window: ReplayWindow,
        now: float,
    ) -> None:
        self.socket = socket
        self.identity = identity
        self.right = right
        self.hello = hello
        self.node = hello.node
        self.window = window
        self.last_heard = now
