"""QEMU's control socket (QMP): what it says of the machine's end, and a few commands.

QEMU is not trusted more than its guest: what it sends is bounded and never raises.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

MAX_LINE = 256 * 1024
"""Longest message taken (bytes); QEMU's own are a few hundred."""

# Words of QMP's ShutdownCause (QEMU qapi/run-state.json) for people.
_CAUSES = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest reset itself",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "QEMU was told to quit",
    "host-signal": "QEMU was terminated by a signal",
    "host-error": "QEMU met an error of the host",
}


class Monitor:
    """One control connection. ``feed`` belongs to the thread that reads it; ``execute`` may be
    called by any thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._data = bytearray()
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, _Answer] = {}
        self._ended = False
        self.cause: str | None = None
        """Why the machine ended, once QEMU has said so."""
        # Commands may be sent before the greeting has been read.
        self._send({"execute": "qmp_capabilities"})

    def fileno(self) -> int:
        return self._sock.fileno()

    def feed(self) -> bool:
        """Take what has arrived; False when the connection has ended."""
        try:
            data = self._sock.recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._data += data
        *lines, rest = self._data.split(b"\n")
        self._data = bytearray(rest)
        for line in lines:
            self._take(bytes(line))
        if not data or len(rest) > MAX_LINE:
            with self._lock:
                self._ended = True
                waiting, self._waiting = self._waiting, {}
            for answer in waiting.values():
                answer.come.set()
            return False
        return True

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(message, dict):
            return
        if message.get("event") == "SHUTDOWN" and self.cause is None:
            data = message.get("data")
            said = str(data.get("reason")) if isinstance(data, dict) else "unknown"
            # Its word is shown to people: nothing a terminal acts on, and no half a character.
            word = "".join(c for c in said[:100] if c.isprintable())
            self.cause = _CAUSES.get(word, f"QEMU ended ({word})")
        number = message.get("id")
        with self._lock:
            answer = self._waiting.pop(number, None) if isinstance(number, int) else None
        if answer is not None:
            answer.value = message.get("return")
            answer.come.set()

    def tell(self, command: str) -> None:
        """Send a command whose answer nobody waits for."""
        self._send({"execute": command})

    def execute(self, command: str, timeout: float) -> Any:
        """Send a command and wait for what it returns; None when it failed, when the connection
        ended, or after ``timeout`` seconds."""
        answer = _Answer()
        with self._lock:
            if self._ended:
                return None
            self._next += 1
            number = self._next
            self._waiting[number] = answer
        self._send({"execute": command, "id": number})
        answer.come.wait(timeout)
        with self._lock:
            self._waiting.pop(number, None)
        return answer.value

    def close(self) -> None:
        """Close the connection. Nobody may read it any more."""
        self._sock.close()

    def _send(self, message: dict[str, Any]) -> None:
        # A QEMU that does not read its few short commands is stuck; it gets killed by others.
        with contextlib.suppress(OSError):
            self._sock.send(json.dumps(message).encode() + b"\n")


class _Answer:
    def __init__(self) -> None:
        self.come = threading.Event()
        self.value: Any = None
