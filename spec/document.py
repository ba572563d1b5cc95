"""A file or a text to a tree of nodes: bounded reading, UTF-8, the right format."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from voidbus.spec.json_document import parse_json
from voidbus.spec.node import Node
from voidbus.spec.problem import Position, Problem, SpecError
from voidbus.spec.yaml_document import parse_yaml

Format = Literal["yaml", "json"]

# The largest specification worth reading, in bytes. Prompts are the bulk of one; a megabyte is
# more than any model's context.
MAX_BYTES = 1024 * 1024


def format_of(path: Path) -> Format:
    """`.yaml` and `.yml` in any case are YAML, everything else is JSON."""
    return "yaml" if path.suffix.lower() in (".yaml", ".yml") else "json"


def read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most MAX_BYTES. Raises SpecError."""
    source = str(path)
    try:
        # Non-blocking, so opening a named pipe nobody writes to doesn't wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _refused(source, "no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise _refused(source, f"can't be opened: {reason}") from None
    try:
        return _regular_content(descriptor, source)
    except OSError as error:
        raise _refused(source, f"can't be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _regular_content(descriptor: int, source: str) -> bytes:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise _refused(source, "is a directory; name the file in it")
    if not stat.S_ISREG(status.st_mode):
        raise _refused(source, "is not a regular file")
    if status.st_size > MAX_BYTES:
        raise _too_large(source, status.st_size)
    # The size can lie (a file of /proc) or change, so the reading is bounded too.
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(MAX_BYTES + 1)


def parse_document(content: bytes, *, source: str, format: Format) -> Node:  # noqa: A002 - the word the callers know
    """The document in `content`; its top level is a mapping. Raises SpecError."""
    if len(content) > MAX_BYTES:
        raise _too_large(source, len(content))
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        line = before.count("\n") + 1
        column = len(before) - (before.rfind("\n") + 1) + 1
        message = "not UTF-8; save the file as UTF-8"
        found = f"byte 0x{content[error.start]:02x}"
        raise SpecError([Problem(Position(source, line, column), "", message, found)]) from None
    root = parse_yaml(text, source) if format == "yaml" else parse_json(text, source)
    if root.entries is None:
        empty = root.value is None and root.items is None
        message = "the file is empty" if empty else "the top level must be a mapping"
        shown = None if empty else ("a list" if root.items is not None else "a single value")
        raise SpecError([Problem(root.position, "", message, shown, "field: value lines")])
    return root


def _refused(source: str, message: str) -> SpecError:
    return SpecError([Problem(Position(source), "", message)])


def _too_large(source: str, size: int) -> SpecError:
    allowed = f"at most {MAX_BYTES} bytes"
    return SpecError([Problem(Position(source), "", "too large", f"{size} bytes", allowed)])
