"""What commands print: lines for people, JSON for programs.

Everything a guest had a hand in passes `plain`, so that no run can drive an operator's terminal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from pydantic import BaseModel

# Control characters but for the tab (ECMA-48 C0 and C1), and the bidirectional overrides that
# make text read other than it is (Unicode TR 9).
_UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_COLOURS = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "cyan": "36",
}
STATUS_COLOURS = {
    "running": "cyan",
    "starting": "cyan",
    "pending": "dim",
    "succeeded": "green",
    "failed": "red",
    "skipped": "yellow",
    "cancelled": "yellow",
}


def plain(text: str) -> str:
    """`text` on one line, with what a terminal would act on made visible."""
    return _UNSAFE.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    character = match.group()
    if character == "\n":
        return "\\n"
    if character == "\r":
        return "\\r"
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def plain_lines(text: str) -> str:
    """`text` with its lines kept, and each of them plain."""
    return "\n".join(plain(line) for line in text.split("\n"))


def colourful(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: a terminal, and no $NO_COLOR (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """`text` in colour, where the stream it goes to takes it."""
    wanted = [_COLOURS[style] for style in styles if style]
    if not wanted or not colourful(sys.stdout if stream is None else stream):
        return text
    return f"\x1b[{';'.join(wanted)}m{text}\x1b[0m"


def say(text: str = "") -> None:
    """A line on standard output. Raises BrokenPipeError where its reader is gone."""
    _write(sys.stdout, text + "\n")
    if not sys.stdout.isatty():
        return
    sys.stdout.flush()


def say_now(text: str) -> None:
    """A line on standard output that must not wait in a buffer."""
    _write(sys.stdout, text + "\n")
    sys.stdout.flush()


def warn(text: str) -> None:
    """A line on standard error, after the program's name."""
    note(f"voidbus: {text}")


def note(text: str) -> None:
    """A line on standard error. Nobody reading it is no reason to fail."""
    try:
        _write(sys.stderr, text + "\n")
        sys.stderr.flush()
    except OSError:
        return


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def print_json(document: BaseModel | dict[str, Any]) -> None:
    """One JSON document. ASCII only, so that it is the same in every locale."""
    say(json.dumps(_data(document), indent=2))


def print_json_line(document: BaseModel | dict[str, Any]) -> None:
    """One JSON document on a line, at once."""
    say_now(json.dumps(_data(document), separators=(",", ":")))


def _data(document: BaseModel | dict[str, Any]) -> Any:
    return document if isinstance(document, dict) else document.model_dump(mode="json")


def print_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, status: int | None = None
) -> None:
    """Columns under titles; on a terminal cut to its width. Column `status` is coloured.

    A row of one cell is a line of its own across the columns.
    """
    shown = [[plain(cell) for cell in row] for row in rows]
    widths = [
        max([len(title), *(len(row[column]) for row in shown if len(row) > 1)])
        for column, title in enumerate(titles)
    ]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    say(paint(_line(titles, widths, limit), "bold"))
    for row in shown:
        if len(row) == 1:
            say(row[0])
            continue
        line = _line(row, widths, limit)
        if status is not None:
            start = sum(widths[:status]) + 2 * status
            end = start + len(row[status])
            colour = STATUS_COLOURS.get(row[status], "")
            line = line[:start] + paint(line[start:end], colour) + line[end:]
        say(line)


def _line(cells: Sequence[str], widths: Sequence[int], limit: int) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    line = "  ".join(padded).rstrip()
    return line[: limit - 1] + "…" if limit and len(line) > limit else line


def seconds_since(stamp: str | None, until: str | None = None) -> float | None:
    """Seconds from an RFC 3339 time to another, or to now. None where it can't be read."""
    start = _moment(stamp)
    if start is None:
        return None
    end = _moment(until) if until else time.time()
    return None if end is None else max(0.0, end - start)


def _moment(stamp: str | None) -> float | None:
    if not stamp:
        return None
    # Python 3.11 reads at most six digits of fraction; ours have nine.
    head, dot, fraction = stamp.rstrip("Z").partition(".")
    try:
        moment = datetime.fromisoformat(head).replace(tzinfo=UTC).timestamp()
        return moment + (float(f"0.{fraction}") if dot else 0.0)
    except ValueError:
        return None


def duration(seconds: float | None) -> str:
    """A length of time for people: `0.4s`, `12s`, `3m05s`, `2h10m`, `4d01h`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def size(count: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f}{unit}" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}GiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
