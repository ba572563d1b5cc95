"""The command line of void-mcp, and its life from start to signal."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

from voidbus.sidecar.client import SidecarClient, SidecarClientError

USAGE = """\
usage: void-mcp [--http | --sse] [--port PORT]
       void-mcp --probe PORT [--seconds N]

Serves the sidecar's messaging by the Model Context Protocol: on standard input and output, or
with --http (or --sse) on http://127.0.0.1:PORT/mcp.

  --port PORT   with --http: the port, 8222 unless given; 0 takes a free one
  --probe PORT  serve nothing: wait until something on this machine accepts connections there
  --seconds N   with --probe: how long to wait, 30 unless given
  --help        this text

environment:
  VOID_SIDECAR_URL   where the sidecar is: http://IP:PORT
"""

DEFAULT_PORT = 8222
DEFAULT_SECONDS = 30
_PROBE_PAUSE = 0.02  # seconds between two tries to connect


class UsageError(Exception):
    """The command line can't be carried out as it stands."""


class Options(NamedTuple):
    """What the command line asks for; `port` is None for standard input and output. `probe` is a
    port to wait for."""

    port: int | None = None
    probe: int | None = None
    seconds: int = DEFAULT_SECONDS
    help: bool = False


class _Ended(BaseException):
    """A signal that ends the program has come; not caught by what catches errors."""


def run(argv: Sequence[str]) -> int:
    """Serve until the input ends or a signal comes; the exit code."""
    try:
        options = read_options(argv)
        if options.help:
            sys.stdout.write(USAGE)
            return 0
        if options.probe is not None:
            wait_for_port(options.probe, options.seconds)
            return 0
        client = SidecarClient.from_environment(os.environ)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        if options.port is None:
            _serve_stdio(client)
        else:
            _serve_http(client, options.port)
    except (UsageError, SidecarClientError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except _Ended:
        return 0
    return 0


def read_options(argv: Sequence[str]) -> Options:
    """Raises UsageError, naming the word that is wrong."""
    http, words = False, list(argv)
    numbers: dict[str, int] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("--http", "--sse"):
            http = True
        elif word in ("-h", "--help", "help"):
            return Options(help=True)
        elif name in _NUMBERS:
            if not equals:
                if not words:
                    raise UsageError(f"{name} needs a number")
                value = words.pop(0)
            numbers[name] = _number(name, value)
        else:
            raise UsageError(f"unknown option: {word} (try: void-mcp --help)")
    probe, seconds = numbers.get("--probe"), numbers.get("--seconds", DEFAULT_SECONDS)
    if probe is not None:
        if http or "--port" in numbers:
            raise UsageError("--probe serves nothing: it goes with --seconds only")
        return Options(probe=probe, seconds=seconds)
    if "--seconds" in numbers:
        raise UsageError("--seconds is for --probe")
    if "--port" in numbers and not http:
        raise UsageError("--port is for --http")
    return Options(port=numbers.get("--port", DEFAULT_PORT)) if http else Options()


_NUMBERS = {"--port": ("port", 65535), "--probe": ("port", 65535), "--seconds": ("time", 3600)}


def _number(name: str, value: str) -> int:
    what, most = _NUMBERS[name]
    if not (value.isascii() and value.isdigit() and len(value) <= 5) or int(value) > most:
        raise UsageError(f"invalid {what}: {value} (expected 0 to {most})")
    return int(value)


def wait_for_port(port: int, seconds: float) -> None:
    """Return once something accepts connections on a port of the loopback. Raises OSError when
    nothing has in this time."""
    import socket
    import time

    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=max(0.05, left)).close()
        except OSError as error:
            if left <= _PROBE_PAUSE:
                raise OSError(f"nothing accepts connections on 127.0.0.1:{port}") from error
            time.sleep(_PROBE_PAUSE)
        else:
            return


def _serve_stdio(client: SidecarClient) -> None:
    from voidbus.mcp.stdio import StdioServer

    StdioServer(client).run()


def _serve_http(client: SidecarClient, port: int) -> None:
    from voidbus.mcp.http_server import HOST, HttpServer

    try:
        server = HttpServer(client, port)
    except OSError as error:
        raise OSError(f"can't listen on {HOST}:{port}: {error.strerror}") from error
    # What waits for us to be ready reads this line; it also names the port that was free.
    _say(f"void-mcp: serving on http://{HOST}:{server.port}/mcp")
    server.run()


def _say(text: str) -> None:
    # Who starts a server in the background may have closed its standard error.
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _end(_number: int, _frame: FrameType | None) -> None:
    # Once: what closes after the first must not be torn apart by a second.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise _Ended
