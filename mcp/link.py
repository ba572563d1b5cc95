"""Drives one session: its work is put to the sidecar, and ended when it is cancelled."""

import os
import threading
from collections.abc import Callable
from typing import Any

from voidbus.mcp import inbox_resource
from voidbus.mcp.jsonrpc import Incoming, RequestId, RpcError
from voidbus.mcp.server import Send, Session, Stop, Work
from voidbus.mcp.watch import Watch
from voidbus.sidecar.client import Abort, Cancelled, Reply, SidecarClient, SidecarClientError


def new_key() -> str:
    """An Idempotency-Key: each call of a tool is its own."""
    return os.urandom(16).hex()


class Link:
    """A session and how to reach its client. Its methods can be called from any thread.

    `send` is called with what is not the answer to a message just received: notifications.
    It must not wait.
    """

    def __init__(
        self,
        session: Session,
        client: SidecarClient,
        watch: Watch,
        send: Callable[[dict[str, Any]], None],
    ) -> None:
        self._session = session
        self._client = client
        self._watch = watch
        self._send = send
        self._lock = threading.Lock()
        self._aborts: dict[RequestId, Abort] = {}
        watch.attach(self)

    @property
    def version(self) -> str:
        """The protocol version the client has settled on."""
        with self._lock:
            return self._session.version

    @property
    def is_watching(self) -> bool:
        """Whether the client wants to know of changes of the inbox."""
        with self._lock:
            return self._session.is_watching

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        with self._lock:
            return bool(self._aborts)

    def receive(self, message: Incoming) -> tuple[list[dict[str, Any]], list[Work]]:
        """Answers to send now, and work to `perform`."""
        answers: list[dict[str, Any]] = []
        works: list[Work] = []
        with self._lock:
            for effect in self._session.receive(message):
                if isinstance(effect, Send):
                    answers.append(effect.body)
                elif isinstance(effect, Stop):
                    self._aborts[effect.id].cancel()
                else:
                    self._aborts[effect.id] = Abort()
                    works.append(effect)
        if not self.is_watching:
            self._watch.look()
        return answers, works

    def perform(self, work: Work) -> list[dict[str, Any]]:
        """Ask the sidecar; what to send then, nothing where it was cancelled. Takes as long as
        the client's timeouts."""
        ask, abort = work.ask, self._aborts[work.id]
        answer: Reply | SidecarClientError
        try:
            answer = self._client.request(ask.method, ask.path, ask.body, ask.headers, abort=abort)
        except SidecarClientError as fault:
            answer = fault
        with self._lock:
            del self._aborts[work.id]
            if isinstance(answer, Cancelled):
                self._session.forget(work)
                return []
            told = self._session.finish(work, answer)
            watching = self._session.is_watching
        if work.watches and watching:
            self._start_watch(answer)
        return told

    def cancel(self, request_id: RequestId) -> None:
        """End the work of a request, if it is still under way."""
        with self._lock:
            abort = self._aborts.get(request_id)
            if abort is not None:
                abort.cancel()

    def cancel_all(self) -> None:
        """End all work that is under way."""
        with self._lock:
            for abort in self._aborts.values():
                abort.cancel()

    def inbox_changed(self) -> None:
        """Tell the client, if it wants to know."""
        with self._lock:
            told = self._session.inbox_changed()
        for body in told:
            self._send(body)

    def log(self, level: str, text: str) -> None:
        """Tell the client, if it wants to know."""
        with self._lock:
            told = self._session.log(level, text)
        for body in told:
            self._send(body)

    def close(self) -> list[dict[str, Any]]:
        """End all its work; what is still to be sent."""
        self._watch.detach(self)
        self.cancel_all()
        with self._lock:
            return self._session.end()

    def _start_watch(self, answer: Reply | SidecarClientError) -> None:
        try:
            self._watch.start(inbox_resource.version(answer))
        except RpcError:  # then the client has been told so already
            return
