"""What operators hand in: text, `@file`, or `-` for standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from voidbus.cli.failure import ExitCode, Failure

# A message's body on the bus is at most 4 MiB of JSON, in which a character may become six.
INPUT_LIMIT = 512 * 1024


def input_text(given: str | None) -> str | None:
    """The value of an option: itself, the content of `@file`, or standard input where it is `-`.

    Raises Failure (2) where it can't be read, is no UTF-8, or is over INPUT_LIMIT bytes.
    """
    if given is None:
        return None
    if given == "-":
        return read_text("-")
    if given.startswith("@"):
        return read_text(given[1:])
    return _bounded(given.encode(errors="surrogateescape"), "the input")


def read_text(file: str) -> str:
    """The text in `file`, or on standard input where it is `-`. Raises Failure (2)."""
    if file == "-":
        if sys.stdin.isatty():
            sys.stderr.write("voidbus: reading standard input; end it with Ctrl-D\n")
        return _bounded(sys.stdin.buffer.read(INPUT_LIMIT + 1), "standard input")
    try:
        with Path(file).open("rb") as source:
            return _bounded(source.read(INPUT_LIMIT + 1), file)
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}", ExitCode.USAGE) from error


def _bounded(data: bytes, name: str) -> str:
    if len(data) > INPUT_LIMIT:
        raise Failure(
            f"{name} is over {INPUT_LIMIT} bytes; put it into a file and let the agent read it "
            "through a mount",
            ExitCode.USAGE,
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Failure(f"{name} is not UTF-8 text: {error}", ExitCode.USAGE) from error
