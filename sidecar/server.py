"""Serves one run's sidecar over HTTP, on a TCP port or a Unix socket, from its own thread."""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

from voidbus.sidecar.connection import Connections
from voidbus.sidecar.event import EventKind, SidecarEvent
from voidbus.sidecar.model import (
    InboxEntry,
    InboxSnapshot,
    InboxView,
    Intent,
    SidecarContext,
    SidecarCounters,
    SidecarHealth,
    SidecarSnapshot,
    SidecarStatus,
)
from voidbus.sidecar.routes import Routes
from voidbus.sidecar.signals import Bounds, Signals
from voidbus.sidecar.state import SidecarState, Submitted

Address = tuple[str, int] | str
"""A literal IP and a port (0 takes a free one), or the path of a Unix socket."""

_BACKLOG = 64
_GOODBYE = 1.0  # seconds that answers under way may take to finish when the server stops

MAX_REPORTED_REPEATS = 64
"""Refused and repeated intents reported between two inbox loads, at most. The guest decides
how often it sends them, and each may become an event in a journal; the counters go on."""

_log = logging.getLogger("voidbus.sidecar")
_http_log = logging.getLogger("voidbus.sidecar.http")
# aiohttp logs a traceback for every malformed request, which would let a guest fill our log.
_http_log.setLevel(logging.CRITICAL + 1)


class SidecarError(Exception):
    """The server could not be started, or did not stop in time."""


class SidecarServer:
    """A sidecar's HTTP server and the thread-safe way to its state.

    The methods of the state can be called from any thread, before, while and after the server
    serves; each takes the one lock for the microseconds of an operation. `on_event` is called
    on the thread that caused the event, outside the lock; it must return at once.
    """

    def __init__(
        self,
        state: SidecarState,
        *,
        run_id: str,
        listen: Address | Path = ("127.0.0.1", 0),
        on_event: Callable[[SidecarEvent], None],
        bounds: Bounds | None = None,
    ) -> None:
        self._state = state
        self._bounds = bounds
        self._signals: Signals | None = None
        self._run_id = run_id
        self._listen: Address = str(listen) if isinstance(listen, Path) else listen
        self._on_event = on_event
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked: asyncio.Event | None = None
        self._stopping = False
        self._reports_left = MAX_REPORTED_REPEATS
        self._started_at = time.monotonic()

    # Life

    def start(self, timeout: float = 5.0) -> Address:
        """Listen and serve; returns the address that was bound.

        Raises SidecarError when the address can't be bound, when the server is not up within
        `timeout` seconds, or when it was started before.
        """
        if self._thread is not None:
            raise SidecarError(f"the sidecar of {self._run_id} was started before; make a new one")
        listener = _bind(self._listen)
        name = listener.getsockname()
        ready = threading.Event()
        self._started_at = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(listener, ready), name=f"sidecar-{self._run_id}", daemon=True
        )
        self._thread.start()
        if not ready.wait(timeout):
            raise SidecarError(
                f"the sidecar of {self._run_id} was not serving after {timeout:g} s; stop it"
            )
        address: Address = name if isinstance(name, str) else (name[0], name[1])
        self._listen = address
        self._emit("started", address=address if isinstance(address, str) else list(address))
        return address

    def stop(self, timeout: float = 5.0) -> None:
        """Stop listening, let answers under way finish for a second, and join the thread.

        Does nothing when it is not running. Raises SidecarError when the thread has not ended
        within `timeout` seconds.
        """
        thread = self._thread
        if thread is None:
            return
        if thread.is_alive() and not self._stopping:
            self._emit("stopping")
        self._stopping = True  # for a loop that is not up yet, and looks once it is
        if self._loop is not None and self._stop_asked is not None:
            # RuntimeError: the loop has ended already.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop_asked.set)
        thread.join(timeout)
        if thread.is_alive():
            raise SidecarError(f"the sidecar of {self._run_id} did not stop within {timeout:g} s")
        if isinstance(self._listen, str):
            Path(self._listen).unlink(missing_ok=True)

    def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        with listener:
            asyncio.run(self._serve(listener, ready))

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self._stop_asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stopping:
            return
        signals = Signals(
            self, lambda transport, seconds: connections.cut_in(transport, seconds), self._bounds
        )
        http = web.Server(
            Routes(self, signals),
            logger=_http_log,
            access_log=None,
            # Else a few kilobytes of gzip from the guest could become gigabytes here.
            auto_decompress=False,
            # A follower that has gone must not be counted until its poll would have ended.
            handler_cancellation=True,
        )
        connections = Connections(http)
        self._signals = signals
        connections.listen(listener)
        ready.set()
        await self._stop_asked.wait()
        connections.stop_listening(listener)
        signals.close()
        await http.shutdown(_GOODBYE)
        await connections.close(_GOODBYE)

    # What the sidecar's owner does

    def load_inbox(self, snapshot: InboxSnapshot) -> int:
        """Replace the inbox; its version. Raises Rejected when it is over a limit."""
        with self._lock:
            loaded = self._state.load_inbox(snapshot)
            self._reports_left = MAX_REPORTED_REPEATS
        self._ring()
        self._emit(
            "inbox_loaded",
            version=loaded.version,
            iteration=loaded.iteration,
            entries=loaded.entries,
        )
        for intent in loaded.expired:
            self._emit("intent_expired", intent_id=intent.intent_id, iteration=intent.iteration)
        return loaded.version

    def push_message(self, entry: InboxEntry) -> int:
        """Add a message to the inbox; its new version. Raises Rejected when it is full."""
        with self._lock:
            version = self._state.push_message(entry)
        self._ring()
        self._emit("message_pushed", message_id=entry.message_id, version=version)
        return version

    def peek(self, limit: int | None = None) -> list[Intent]:
        """The oldest waiting intents, which stay until acknowledged or expired."""
        with self._lock:
            return self._state.peek(limit)

    def acknowledge(self, intent_ids: Iterable[str]) -> int:
        """Forget intents that were handed over; how many of the ids were waiting."""
        with self._lock:
            count = self._state.acknowledge(intent_ids)
        self._emit("acknowledged", count=count)
        return count

    def drain(self, limit: int | None = None) -> list[Intent]:
        """Hand over and forget the oldest waiting intents."""
        with self._lock:
            intents = self._state.drain(limit)
        self._emit("drained", count=len(intents))
        return intents

    def status(self) -> SidecarStatus:
        """How many intents wait, and the inbox's version."""
        with self._lock:
            return self._state.status()

    def counters(self) -> SidecarCounters:
        """Totals since the state was made."""
        with self._lock:
            return self._state.counters()

    def followers(self) -> int:
        """How many clients follow the inbox now."""
        return 0 if self._signals is None else len(self._signals)

    def snapshot(self) -> SidecarSnapshot:
        """Everything the state holds, to be handed on."""
        with self._lock:
            return self._state.snapshot()

    # What the guest does, by way of the routes

    def health(self) -> SidecarHealth:
        """The answer of `/v1/health`."""
        status = self.status()
        health = SidecarHealth(
            run_id=self._run_id,
            buffer_depth=status.buffer_depth,
            inbox_version=status.inbox_version,
            uptime_ms=int((time.monotonic() - self._started_at) * 1000),
        )
        self._emit("health_served", uptime_ms=health.uptime_ms)
        return health

    def context(self) -> SidecarContext:
        """The answer of `/v1/context`."""
        with self._lock:
            return self._state.context()

    def inbox(self, since: int | None = None) -> InboxView:
        """The answer of `/v1/inbox`."""
        with self._lock:
            return self._state.inbox(since)

    def news(self, since: int | None) -> InboxView | None:
        """What a follower at version `since` has missed; None where that is nothing."""
        with self._lock:
            return self._state.news(since)

    def submit(self, body: bytes, idempotency_key: str | None = None) -> Submitted:
        """Take the body of `POST /v1/intents`."""
        with self._lock:
            submitted = self._state.submit(body, idempotency_key=idempotency_key)
        for intent, duplicate in zip(submitted.intents, submitted.duplicates, strict=True):
            report = self._emit_bounded if duplicate else self._emit
            report(
                "intent_deduplicated" if duplicate else "intent_accepted",
                intent_id=intent.intent_id,
                kind=intent.kind,
                audience=intent.audience,
                iteration=intent.iteration,
            )
        if submitted.rejection is not None:
            self._emit_bounded(
                "intent_rejected",
                code=submitted.rejection.code,
                message=submitted.rejection.message,
            )
        return submitted

    def _ring(self) -> None:
        """Wake those who follow the inbox; from any thread."""
        if self._loop is not None and self._signals is not None:
            # RuntimeError: the loop has ended, and all its followers with it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._signals.ring)

    def _emit_bounded(self, kind: EventKind, /, **fields: Any) -> None:
        with self._lock:
            if self._reports_left == 0:
                return
            self._reports_left -= 1
        self._emit(kind, **fields)

    def _emit(self, kind: EventKind, /, **fields: Any) -> None:
        try:
            self._on_event(SidecarEvent(kind, self._run_id, fields))
        except Exception:  # noqa: BLE001 - any fault of a foreign callback: logged
            # A listener's fault must not become the guest's or the actor's.
            _log.exception("sidecar %s: the listener failed on %s", self._run_id, kind)


def _bind(listen: Address) -> socket.socket:
    """A socket bound to the address, not yet listening."""
    try:
        return _bind_unix(listen) if isinstance(listen, str) else _bind_tcp(listen)
    except OSError as error:
        raise SidecarError(
            f"the sidecar can't listen on {listen}: {error.strerror or error}"
        ) from error


def _bind_tcp(listen: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(listen)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind_unix(path: str) -> socket.socket:
    _remove_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        # Nobody can connect before listen(), so the permissions are in force for everyone.
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)  # noqa: PTH101 - the pair of bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale_socket(path: str) -> None:
    """Remove a socket left by a process that has died; anything else in the way is refused."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SidecarError(f"{path} exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            Path(path).unlink(missing_ok=True)
            return
    raise SidecarError(f"another process serves {path}; stop it or choose another path")
