"""A peer of a hub that is no leaf: a bare DEALER that says what it likes."""

from __future__ import annotations

import zmq
from transport_kit import Bus, Look

from voidbus.transport.control import Hello
from voidbus.transport.envelope import Envelope, Kind, read_envelope
from voidbus.transport.message import Right


def raw_socket(bus: Bus, kind: int) -> zmq.Socket[bytes]:
    """A socket that the bus lets in, where it connects to it."""
    made = bus.context.socket(kind)
    made.linger = 0
    made.rcvtimeo = made.sndtimeo = 10_000
    if bus.keys is not None:
        made.curve_secretkey = bus.keys.secret
        made.curve_publickey = bus.keys.public
        made.curve_serverkey = bus.keys.server
    return made


class RawDealer:
    """One connection to the endpoint of a right, by whatever transport the bus is on."""

    def __init__(self, bus: Bus, right: Right) -> None:
        self.socket = raw_socket(bus, zmq.DEALER)
        self.socket.connect(bus.hub.addresses[right])

    def send(self, envelope: Envelope) -> None:
        self.socket.send_multipart(envelope.frames())

    def receive(self) -> Envelope:
        return read_envelope(self.socket.recv_multipart())

    def hello(self, node: str, instance: int, token: str = "raw") -> Kind:
        body = Hello(node=node, instance=instance, token=token).to_json()
        self.send(Envelope(Kind.HELLO, "hub/", f"{node}/", tag=Hello.tag, body=body))
        return self.receive().kind

    def ask(self, sender: str, dest: str, origin: int, sequence: int) -> None:
        self.send(look(Kind.ASK, sender, dest, origin, sequence))


def look(kind: Kind, sender: str, dest: str, origin: int, sequence: int) -> Envelope:
    """A Look that never expires."""
    return Envelope(
        kind,
        dest,
        sender,
        origin=origin,
        sequence=sequence,
        tag=Look.tag,
        deadline=1e11,
        body=b"{}",
    )
