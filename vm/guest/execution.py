"""Running one program for the host: output as it comes, input, time limit, and its end."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable
from typing import IO

from .descendants import Children, descendants, send_signal
from .exec_messages import ExecChunk, ExecRequest, ExecResponse, Stream
from .identity import Identity
from .place import WORKSPACE, Place

DRAIN_SECONDS = 0.5
"""How long output is still read after the program exited, when something it started holds
its pipes open. What was in them when it exited is read however long that takes."""

STDIN_BYTES = 65536


class Tail:
    """The last ``limit`` bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self.total = 0
        self.truncated = False

    def add(self, data: bytes) -> None:
        self.total += len(data)
        self._data += data
        if len(self._data) > 2 * self._limit:
            self._trim()

    def _trim(self) -> None:
        if len(self._data) > self._limit:
            del self._data[: -self._limit]
            self.truncated = True

    def value(self) -> bytes:
        self._trim()
        return bytes(self._data)


class Execution:
    """One program. ``run`` blocks until it has ended; the other methods may be called from
    any thread meanwhile."""

    def __init__(
        self,
        request: ExecRequest,
        place: Place,
        children: Children,
        identity: Identity | None,
        keep_bytes: int,
        chunk_bytes: int,
    ) -> None:
        self._request = request
        self._place = place
        self._children = children
        self._identity = identity
        self._chunk_bytes = chunk_bytes
        self._outputs = {"stdout": Tail(keep_bytes), "stderr": Tail(keep_bytes)}
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._killed: str | None = None
        self._pending_signals: list[int] = []

    def signal(self, number: int) -> None:
        """Signal the program's process group; kept for later when it is not started yet."""
        with self._lock:
            if self._child is None:
                self._pending_signals.append(number)
            else:
                self._signal_group(number)

    def kill(self, reason: str) -> None:
        """End the program and all it started, whatever group they moved to."""
        with self._lock:
            self._killed = self._killed or reason
            if self._child is None:
                return
            below = descendants(self._child.pid)
            self._signal_group(signal.SIGKILL)
            send_signal(below, signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        # Callers hold the lock, and the child is reaped only under it: the pid is still its.
        if self._child is not None and self._child.returncode is None:
            try:
                os.killpg(self._child.pid, number)
            except (ProcessLookupError, PermissionError):
                return

    def run(self, emit: Callable[[ExecChunk], None]) -> ExecResponse:
        """Run the program to its end. An OSError from ``emit`` (the host is gone) kills it."""
        began = time.monotonic()
        try:
            child = self._start()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            text = unstarted(self._place, self._request.program, self._request.working_dir, error)
            return ExecResponse(b"", b"", -1, text, _milliseconds(began))
        timer: threading.Timer | None = None
        if self._request.timeout_secs:
            seconds = min(self._request.timeout_secs, threading.TIMEOUT_MAX)
            text = f"Process killed after {self._request.timeout_secs}s timeout"
            timer = threading.Timer(seconds, self.kill, [text])
            timer.start()
        try:
            self._pump(child, emit)
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
            with self._lock:
                code = self._children.finish(child)
        return self._response(code, began)

    def _start(self) -> subprocess.Popen[bytes]:
        request, place = self._request, self._place
        argv = [place.argument(text) for text in (request.program, *request.args)]
        user = {}
        if self._identity is not None:
            user = {"user": self._identity.uid, "group": self._identity.gid}
        with self._lock:
            if self._killed is not None:
                raise OSError(self._killed)
            self._child = self._children.start(
                argv,
                stdin=subprocess.PIPE if request.stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=place.working_dir(request.working_dir),
                env=place.environment(request.env, pty=False),
                **user,
                **({"extra_groups": []} if user else {}),
            )
            for number in self._pending_signals:
                self._signal_group(number)
            return self._child

    def _pump(self, child: subprocess.Popen[bytes], emit: Callable[[ExecChunk], None]) -> None:
        """Move bytes until both outputs ended, or a little longer than the program."""
        exited = os.pidfd_open(child.pid)
        poll = select.poll()
        # What to do when a descriptor is ready; False means it is done with.
        handlers: dict[int, Callable[[], bool]] = {exited: lambda: False}
        outputs = self._output_handlers(child, emit)
        handlers.update(outputs)
        if child.stdin is not None:
            handlers.update(self._input_handler(child.stdin))
        for fd in handlers:
            poll.register(fd, select.POLLOUT if fd not in (exited, *outputs) else select.POLLIN)
        deadline: float | None = None
        printed: dict[Tail, int] = {}  # until the program exited
        try:
            while handlers.keys() & outputs.keys() or deadline is None:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = poll.poll(None if wait is None else wait * 1000)
                if not ready or (wait == 0.0 and all(t.total >= n for t, n in printed.items())):
                    return
                for fd, _ in ready:
                    if not handlers[fd]():
                        poll.unregister(fd)
                        del handlers[fd]
                        if fd == exited:
                            deadline = time.monotonic() + DRAIN_SECONDS
                            printed = self._printed(child)
                        elif fd not in outputs and child.stdin is not None:
                            child.stdin.close()
        except OSError:
            self.kill("the host is gone")
            select.select([exited], [], [], DRAIN_SECONDS)
        finally:
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
            os.close(exited)

    def _printed(self, child: subprocess.Popen[bytes]) -> dict[Tail, int]:
        """Bytes of each output until now: those that were read, and those in its pipe."""
        pipes = {"stdout": child.stdout, "stderr": child.stderr}
        return {
            output: output.total + _waiting(pipe.fileno())
            for name, output in self._outputs.items()
            if (pipe := pipes[name]) is not None
        }

    def _output_handlers(
        self, child: subprocess.Popen[bytes], emit: Callable[[ExecChunk], None]
    ) -> dict[int, Callable[[], bool]]:
        assert child.stdout is not None
        assert child.stderr is not None
        sequence: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        out, err = child.stdout.fileno(), child.stderr.fileno()
        return {
            out: lambda: self._read(out, "stdout", sequence, emit),
            err: lambda: self._read(err, "stderr", sequence, emit),
        }

    def _input_handler(self, stdin: IO[bytes]) -> dict[int, Callable[[], bool]]:
        fd = stdin.fileno()
        os.set_blocking(fd, False)
        pending = memoryview(self._request.stdin)

        def write() -> bool:
            nonlocal pending
            pending = _write_some(fd, pending)
            return bool(pending)  # afterwards the loop closes it, so that the program sees the end

        return {fd: write}

    def _read(
        self,
        fd: int,
        stream: Stream,
        sequence: dict[Stream, int],
        emit: Callable[[ExecChunk], None],
    ) -> bool:
        data = os.read(fd, self._chunk_bytes)
        if not data:
            return False
        self._outputs[stream].add(data)
        emit(ExecChunk(stream, data, sequence[stream]))
        sequence[stream] += 1
        return True

    def _response(self, code: int, began: float) -> ExecResponse:
        error = self._killed
        if error is None and code < 0:
            error = "Process killed by signal (exit_code mapped to -1)"
        out, err = self._outputs["stdout"], self._outputs["stderr"]
        stdout, stderr = out.value(), err.value()
        return ExecResponse(
            stdout,
            stderr,
            -1 if self._killed is not None or code < 0 else code,
            error,
            _milliseconds(began),
            -code if code < 0 else None,
            out.truncated or err.truncated,
        )


def unstarted(place: Place, program: str, working_dir: str | None, error: Exception) -> str:
    """Why a program could not be started, in words for the host."""
    what = f"could not start {program!r}"
    # Popen names what could not be had: the program or the directory.
    if isinstance(error, OSError) and error.filename == place.working_dir(working_dir):
        return f"{what}: working directory {working_dir or WORKSPACE}: {error.strerror}"
    return f"{what}: {error}"


def _write_some(fd: int, pending: memoryview) -> memoryview:
    try:
        return pending[os.write(fd, pending[:STDIN_BYTES]) :]
    except BlockingIOError:
        return pending
    except OSError:  # the program closed its input: it has read all it wants
        return pending[:0]


def _waiting(fd: int) -> int:
    """Bytes in a pipe (pipe(7), FIONREAD)."""
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)


def _milliseconds(began: float) -> int:
    return int((time.monotonic() - began) * 1000)
