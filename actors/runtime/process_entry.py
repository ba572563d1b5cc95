"""What a run process does first, whether it was forked by the zygote or executed afresh.

It gets two descriptors. The *config* is an unnamed memory file (memfd_create(2)): a length, a
JSON header, and the configuration itself, so secrets reach neither a command line, an environment
nor a disk. The *gate* is a pipe: the process does nothing until its owner writes one byte, and
ends if the owner closes it instead. So a start whose owner has died or given up never half
happens, and nothing runs that its owner has not recorded.

`python -P -m voidbus.actors.runtime.process_entry CONFIG_FD GATE_FD` is the exec path.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_CONFIG = 16 * 1024 * 1024  # bytes; the largest specification allowed is far below it

EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h: the entry raised
EXIT_NOT_STARTED = 75  # EX_TEMPFAIL: the gate was closed, so the entry was never called

# The owner opens the gate within milliseconds or dies, which closes it; this is for one that is
# stopped by a debugger.
_GATE_SECONDS = 60.0

_LENGTH = struct.Struct("!I")

Entry = Callable[[bytes], int | None]


@dataclass(frozen=True, slots=True)
class StartHeader:
    """What to become. `env` replaces the environment; None keeps it (the exec path set it)."""

    entry: str
    title: str
    env: Mapping[str, str] | None = None


def pack_start(header: StartHeader, config: bytes) -> int:
    """A memory file with all a new process needs; the caller closes the descriptor.

    Raises ValueError for a config past MAX_CONFIG bytes.
    """
    if len(config) > MAX_CONFIG:
        raise ValueError(
            f"the config of {header.title!r} has {len(config)} bytes; at most {MAX_CONFIG} "
            "can be passed to a process"
        )
    # A mapping need not be a dict (os.environ isn't), and JSON takes only those.
    env = None if header.env is None else dict(header.env)
    head = json.dumps(asdict(header) | {"env": env}).encode()
    fd = os.memfd_create("voidbus-start", os.MFD_CLOEXEC)
    try:
        view = memoryview(_LENGTH.pack(len(head)) + head + config)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def unpack_start(fd: int) -> tuple[StartHeader, bytes]:
    """Read what `pack_start` wrote, and close the descriptor."""
    with open(fd, "rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        return StartHeader(**json.loads(file.read(length))), file.read()


def check_entry(entry: str) -> tuple[str, str]:
    """Split "module:function". Raises ValueError if it isn't that."""
    module, _, function = entry.partition(":")
    parts = [*module.split("."), function]
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{entry!r} is no entry; it should look like 'package.module:function'")
    return module, function


def reset_signals() -> None:
    """Undo what a parent blocked or ignored; only what Python itself ignores stays ignored."""
    for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ}:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def run_and_exit(config_fd: int, gate_fd: int) -> NoReturn:
    """Wait for the gate, call the entry with its config, and end the process with its status.

    Nothing of the interpreter's own exit is run, as in a fork it would be the zygote's.
    """
    status = EXIT_FAULT
    try:
        status = _run(config_fd, gate_fd)
    except BaseException:  # noqa: BLE001 - the process ends here, with its traceback told
        with contextlib.suppress(Exception):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _run(config_fd: int, gate_fd: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if not _gate_opens(gate_fd):
        return EXIT_NOT_STARTED
    header, config = unpack_start(config_fd)
    if header.env is not None:
        os.environ.clear()
        os.environ.update(header.env)
    # The kernel keeps 15 bytes of it (prctl(2), PR_SET_NAME); this file is the same name.
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_bytes(header.title.encode()[:15])
    sys.argv = [header.entry]
    module, function = check_entry(header.entry)
    entry: Any = getattr(importlib.import_module(module), function)
    try:
        result: object = entry(config)
    except SystemExit as leaving:
        result = leaving.code
    if result is None:
        return 0
    if isinstance(result, int):
        return result & 0xFF
    print(f"{header.entry} returned {type(result).__name__}, not a status", file=sys.stderr)
    return EXIT_FAULT


def _gate_opens(gate_fd: int) -> bool:
    try:
        poller = select.poll()
        poller.register(gate_fd, select.POLLIN)
        return bool(poller.poll(_GATE_SECONDS * 1000)) and os.read(gate_fd, 1) != b""
    finally:
        os.close(gate_fd)


if __name__ == "__main__":
    reset_signals()
    run_and_exit(int(sys.argv[1]), int(sys.argv[2]))
