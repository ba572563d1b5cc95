"""Our own programs in an image's root, whatever C library that has.

The initramfs is there read-only at ``/opt/voidbus``; its Python runs by its own dynamic
loader, which finds the libraries beside it and not the image's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from .identity import SANDBOX
from .layers import BASE
from .mounts import place, replace_file

TOOLS = ("void-message", "void-mcp", "claudio", "claude-code")

_LIBRARIES = f"{BASE}/usr/lib/x86_64-linux-gnu"

PYTHON = (
    # The file itself: links in /lib64 are absolute, and would lead into the image.
    f"{_LIBRARIES}/ld-linux-x86-64.so.2",
    "--library-path",
    f"{_LIBRARIES}:{BASE}/lib/x86_64-linux-gnu",
    f"{BASE}/usr/bin/python3.11",
)
"""Starts the initramfs's Python. It finds its library by where its program is."""

_HOME = "/usr/lib/voidbus"
_TOOL_PLACE = "/usr/local/bin"
_USER = f"sandbox:x:{SANDBOX.uid}:{SANDBOX.gid}::/home/sandbox:/bin/sh\n"
_GROUP = f"sandbox:x:{SANDBOX.gid}:\n"


def settle() -> list[str]:
    """Make the running agent and the guest's tools work in an image's root, once that is the
    root. What failed, and why."""
    sys.path[:] = [BASE + path if path.startswith("/") else path for path in sys.path]
    sys.path_importer_cache.clear()
    faults: list[str] = []
    steps = (
        ("guest files", _link_home),
        *((f"tool {tool}", _launcher(tool)) for tool in TOOLS),
        ("user", lambda: _append("/etc", "passwd", _USER, f":{SANDBOX.uid}:")),
        ("group", lambda: _append("/etc", "group", _GROUP, f":{SANDBOX.gid}:")),
    )
    for what, step in steps:
        try:
            step()
        except OSError as error:
            faults.append(f"{what} in the image: {error.strerror}")
    return faults


def launcher_text(tool: str) -> str:
    """The program that stands for a tool of the initramfs in an image."""
    python = " ".join(PYTHON)
    return f'#!{BASE}/bin/busybox sh\nexec {python} -EsS {BASE}{_TOOL_PLACE}/{tool} "$@"\n'


def _launcher(tool: str) -> Callable[[], None]:
    def write() -> None:
        if not os.path.exists(f"{BASE}{_TOOL_PLACE}/{tool}"):  # noqa: PTH110
            return
        with place(_TOOL_PLACE) as folder:
            replace_file(folder, tool, launcher_text(tool).encode(), 0o755)

    return write


def _link_home() -> None:
    above, _, name = _HOME.rpartition("/")
    with place(above) as folder, contextlib.suppress(FileExistsError):
        os.symlink(BASE + _HOME, name, dir_fd=folder)


def _append(folder: str, name: str, text: str, mark: str) -> None:
    """Add a line to a file of the image, unless one with the mark is there."""
    with place(folder) as fd:
        try:
            old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            content = ""
        else:
            with open(old, encoding="utf-8", errors="surrogateescape") as lines:  # noqa: PTH123
                content = lines.read()
        if any(mark in line for line in content.splitlines()):
            return
        if content and not content.endswith("\n"):
            content += "\n"
        replace_file(fd, name, (content + text).encode(errors="surrogateescape"), 0o644)
