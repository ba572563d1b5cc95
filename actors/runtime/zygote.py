"""The owner's side of the zygote: start it, have it fork processes, hear of their ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from voidbus.actors.runtime.process import ProcessHandle, ProcessIdentity
from voidbus.actors.runtime.spawned import (
    OnProcessExit,
    Record,
    SpawnedProcess,
    SpawnError,
    SpawnRequest,
    SpawnTimeoutError,
    ZygoteGoneError,
    start_pipes,
)
from voidbus.actors.runtime.zygote_main import MAX_PACKET

_log = logging.getLogger(__name__)

_MODULE = "voidbus.actors.runtime.zygote_main"

# Called from the reader's thread when the zygote dies, with the processes whose exit status is
# now lost; they live on.
OnLost = Callable[[Sequence[ProcessIdentity]], None]


class Zygote:
    """One zygote process and the thread that reads what it says.

    `preload` names the modules it imports first; those that failed are in `preload_errors` after
    `start`, and are no reason not to use it. `spawn` may be called from many threads, but not
    from `on_exit`, which runs in the thread that would read the answer.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        *,
        on_exit: OnProcessExit,
        on_lost: OnLost | None = None,
    ) -> None:
        self._preload = tuple(preload)
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._gone = True
        self._numbers = 0
        self._waiting: dict[int, Future[ProcessHandle]] = {}
        self._running: set[ProcessIdentity] = set()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._ready: Future[dict[str, str]] = Future()
        self.preload_errors: Mapping[str, str] = {}

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._gone

    def start(self, timeout: float) -> None:
        """Start it and wait up to `timeout` seconds for its imports.

        Raises ZygoteGoneError if it died, SpawnTimeoutError if it was too slow; it is closed then.
        """
        if self._process is not None:
            raise RuntimeError("this zygote was started before; make a new one")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._control = ours
            command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), *self._preload]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._gone = False
        self._reader = threading.Thread(
            target=self._read, args=(ours,), name="zygote-reader", daemon=True
        )
        self._reader.start()
        try:
            self.preload_errors = self._ready.result(timeout)
        except FutureTimeoutError:
            self.close()
            raise SpawnTimeoutError(f"the zygote was not ready within {timeout:g} s") from None
        except BaseException:
            self.close()
            raise
        for module, error in self.preload_errors.items():
            _log.warning("the zygote could not preload %s: %s", module, error)

    def spawn(
        self,
        entry: str,
        config: bytes,
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        title: str = "voidbus-run",
        record: Record | None = None,
        timeout: float,
    ) -> SpawnedProcess:
        """Fork a process that calls `entry` ("module:function") with `config`.

        Raises ZygoteGoneError, SpawnTimeoutError or SpawnError, OSError for `log_path`, ValueError
        for a bad entry or config, and whatever `record` raises. In each case no process is left
        that has run or will run the entry.
        """
        return self.spawn_request(
            SpawnRequest(entry, config, env, log_path, title), record, timeout
        )

    def spawn_request(
        self, request: SpawnRequest, record: Record | None, timeout: float
    ) -> SpawnedProcess:
        """`spawn`, of a request made before."""
        if threading.current_thread() is self._reader:
            raise RuntimeError("spawn was called from on_exit, whose thread reads the answer")
        until = time.monotonic() + timeout
        with start_pipes(request, pack_env=True) as pipes:
            fds = [pipes.config_fd, pipes.gate_fd, pipes.log_fd]
            number, answer = self._ask(fds, until)
            handle = self._await(number, answer, request, until)
            try:
                if record is not None:
                    record(handle.identity)
            except BaseException:
                with self._lock:
                    self._running.discard(handle.identity)
                handle.close()
                raise
            pipes.open_gate()
        return SpawnedProcess(handle.identity, handle, "zygote")

    def close(self, timeout: float = 5.0) -> None:
        """End the zygote and its reader; the processes it forked live on, no longer reported."""
        with self._lock:
            self._running.clear()
        self.bury(timeout)

    def bury(self, timeout: float = 5.0) -> None:
        """`close` of one that has died: `on_lost` has been told of its processes afterwards."""
        control, reader, process = self._control, self._reader, self._process
        if control is None or reader is None or process is None:
            return
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_RDWR)
        _end(process, timeout)
        reader.join(timeout)
        if reader.is_alive():
            raise TimeoutError(f"the zygote's exit callback has not returned after {timeout:g} s")

    def _ask(self, fds: list[int], until: float) -> tuple[int, Future[ProcessHandle]]:
        answer: Future[ProcessHandle] = Future()
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise SpawnTimeoutError("the zygote was busy with other requests for too long")
        try:
            if self._gone or self._control is None:
                raise ZygoteGoneError("the zygote is not running")
            self._numbers += 1
            number = self._numbers
            self._waiting[number] = answer
            try:
                socket.send_fds(
                    self._control,
                    [json.dumps({"id": number}).encode()],
                    fds,
                    socket.MSG_DONTWAIT,  # a full socket means a zygote that is stuck
                )
            except BlockingIOError:
                del self._waiting[number]
                raise SpawnTimeoutError("the zygote takes no more requests") from None
            except OSError as error:
                del self._waiting[number]
                self._gone = True  # the reader will see it too, but maybe after the next request
                raise ZygoteGoneError(f"the zygote is gone: {error}") from None
            return number, answer
        finally:
            self._lock.release()

    def _await(
        self, number: int, answer: Future[ProcessHandle], request: SpawnRequest, until: float
    ) -> ProcessHandle:
        try:
            return answer.result(max(0.0, until - time.monotonic()))
        except FutureTimeoutError:
            with self._lock:
                late = self._waiting.pop(number, None) is not None
            if late:
                raise SpawnTimeoutError(
                    f"the zygote did not start {request.title!r} in time"
                ) from None
            return answer.result()  # it came in this very moment

    # ---- the reader's thread -----------------------------------------------------------------

    def _read(self, control: socket.socket) -> None:
        try:
            while True:
                packet, fds, _, _ = socket.recv_fds(control, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC)
                if not packet:
                    return
                self._take(json.loads(packet), fds)
        except OSError as error:
            _log.debug("the zygote's socket failed: %s", error)
        finally:
            self._end_of_zygote(control)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        if "ready" in message:
            self._ready.set_result(message["ready"]["failed"])
        elif "exit" in message:
            ended = message["exit"]
            identity = ProcessIdentity(ended["pid"], ended["start_time"])
            with self._lock:
                known = identity in self._running
                self._running.discard(identity)
            if known:
                self._tell(lambda: self._on_exit(identity, ended["returncode"]))
        else:
            self._answer(message, fds)

    def _answer(self, message: dict[str, Any], fds: list[int]) -> None:
        with self._lock:
            answer = self._waiting.pop(message["id"], None)
            if answer is not None and fds:
                identity = ProcessIdentity(message["pid"], message["start_time"])
                self._running.add(identity)
        if answer is None:  # given up; its gate is closed, so it ends by itself
            for fd in fds:
                os.close(fd)
        elif fds:
            answer.set_result(ProcessHandle(identity, fds[0]))
        else:
            why = message.get("error", "no descriptor came with the answer")
            answer.set_exception(SpawnError(f"the zygote could not start a process: {why}"))

    def _end_of_zygote(self, control: socket.socket) -> None:
        with self._lock:
            self._gone = True
            waiting, self._waiting = self._waiting, {}
            lost, self._running = sorted(self._running), set()
            control.close()
        for answer in waiting.values():
            answer.set_exception(ZygoteGoneError("the zygote died before it answered"))
        if not self._ready.done():
            self._ready.set_exception(ZygoteGoneError("the zygote died while it started"))
        on_lost = self._on_lost
        if lost and on_lost is not None:
            self._tell(lambda: on_lost(lost))
        if self._process is not None:
            _end(self._process, 5.0)

    def _tell(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except BaseException:  # noqa: BLE001 - it must not end the reader
            _log.exception("a callback about an ended process failed")


def _end(process: subprocess.Popen[bytes], timeout: float) -> None:
    """Reap the zygote, which ends by itself once its socket is closed; kill it if it doesn't."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout)
