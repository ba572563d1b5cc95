"""The transport kit: a hub and leaves over inproc, ipc or tcp with CURVE, and receivers to ask."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zmq

from voidbus.transport.access import (
    ClientKeys,
    Endpoints,
    ServerKeys,
    create_keys,
    inproc_endpoints,
    ipc_endpoints,
    secure_directory,
)
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right

TRANSPORTS = ("inproc", "ipc", "tcp")
WIRES = TRANSPORTS[1:]  # that lead out of the process


class Look(Message, tag="bus.kit.look", right=Right.OBSERVE):
    text: str = ""


class Change(Message, tag="bus.kit.change", right=Right.OPERATE, changes=True):
    text: str = ""


class Work(Message, tag="bus.kit.work", right=Right.WORK):
    text: str = ""


class Answer(Message, tag="bus.kit.answer", right=Right.OBSERVE):
    text: str = ""


class Echo:
    """Answers every ask with its text and attachments; `reason` makes it refuse."""

    def __init__(self) -> None:
        self.reason: FaultReason | None = None
        self.got: list[Delivery] = []
        self.changed = threading.Condition()

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        if self.reason is not None:
            return self.reason
        with self.changed:
            self.got.append(delivery)
            self.changed.notify_all()
        self.handle(delivery)
        return None

    def handle(self, delivery: Delivery) -> None:
        text = getattr(delivery.message, "text", "")
        delivery.reply(Answer(text=text), delivery.attachments)

    def wait_for(self, number: int, timeout: float = 5.0) -> list[Delivery]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.got) >= number, timeout)
            return list(self.got)


class Mute(Echo):
    """Takes everything and answers nothing."""

    def handle(self, delivery: Delivery) -> None:
        pass


class Signal:
    """A condition over what callbacks saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, value: Any) -> None:
        with self._changed:
            self.seen.append(value)
            self._changed.notify_all()

    def wait(self, holds: Callable[[list[Any]], bool], timeout: float = 5.0) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self.seen), timeout), self.seen
            return list(self.seen)


class Bus:
    """One hub named `hub` over one transport, and as many leaves as a test wants."""

    def __init__(self, transport: str, directory: Path, **hub_options: Any) -> None:
        self._stack = ExitStack()
        self.transport = transport
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.keys: ClientKeys | None = None
        self.endpoints = self._endpoints(directory)
        self.joined, self.left = Signal(), Signal()
        self.hub = self.start_hub(**hub_options)

    def start_hub(self, **options: Any) -> Hub:
        """Start the hub; a second one where the first has been."""
        self.hub = Hub(
            "hub",
            self.endpoints,
            context=self.context,
            on_join=self.joined,
            on_leave=self.left,
            **options,
        )
        self.endpoints = Endpoints(self.hub.addresses, self.hub.topics_address, self.endpoints.keys)
        self._stack.callback(self.hub.close)
        return self.hub

    def _endpoints(self, directory: Path) -> Endpoints:
        if self.transport == "inproc":
            return inproc_endpoints("kit")
        if self.transport == "ipc":
            return ipc_endpoints(secure_directory(directory / "bus"))
        public, secret = create_keys(directory / "hub", "hub")
        client_public, client_secret = create_keys(directory / "client", "client")
        allowed = secure_directory(directory / "allowed")
        shutil.copy(directory / "client" / "client.key", allowed)
        self.keys = ClientKeys(client_public, client_secret, public)
        return Endpoints(
            rights=dict.fromkeys(Right, "tcp://127.0.0.1:*"),
            topics="tcp://127.0.0.1:*",
            keys=ServerKeys(public, secret, dict.fromkeys(Right, allowed)),
        )

    def leaf(
        self, name: str, right: Right = Right.OPERATE, *, wait: bool = True, **options: Any
    ) -> Leaf:
        """A leaf on the endpoint of `right`; run nodes (WORK) are expected first."""
        if right is Right.WORK and "token" not in options:
            options["token"] = "token"
            self.hub.expect(name, token_digest("token"), options.get("generation", 0))
        options.setdefault("keys", self.keys)
        leaf = Leaf(
            name,
            self.hub.addresses[right],
            topics_url=self.hub.topics_address,
            context=self.context,
            **options,
        )
        self._stack.callback(leaf.close)
        if wait:
            assert leaf.wait_up(5.0), leaf.refused
        return leaf

    def close(self) -> None:
        self._stack.close()
        self.context.term()
