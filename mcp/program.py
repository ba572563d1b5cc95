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

Serves the sidecar's messaging by the Model Context Protocol: on standard input and output, or
with --http (or --sse) on http://127.0.0.1:PORT/mcp.

  --port PORT   with --http: the port, 8222 unless given; 0 takes a free one
  --help        this text

environment:
  VOID_SIDECAR_URL   where the sidecar is: http://IP:PORT
"""

DEFAULT_PORT = 8222


class UsageError(Exception):
    """The command line can't be carried out as it stands."""


class Options(NamedTuple):
    """What the command line asks for; `port` is None for standard input and output."""

    port: int | None = None
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
    http, port, words = False, None, list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word in ("--http", "--sse"):
            http = True
        elif word in ("-h", "--help", "help"):
            return Options(help=True)
        elif name == "--port":
            if not equals:
                if not words:
                    raise UsageError("--port needs a number")
                value = words.pop(0)
            if not (value.isascii() and value.isdigit() and len(value) <= 5) or int(value) > 65535:
                raise UsageError(f"invalid port: {value} (expected 0 to 65535)")
            port = int(value)
        else:
            raise UsageError(f"unknown option: {word} (try: void-mcp --help)")
    if port is not None and not http:
        raise UsageError("--port is for --http")
    if not http:
        return Options()
    return Options(port=DEFAULT_PORT if port is None else port)


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
