"""Where guest paths really are, and what a program finds around it.

In a machine the root is ``/`` and nothing changes. The process machine gives a scratch
directory as root; there ``/workspace``, ``/home/sandbox``, ``/etc/voidbox`` and ``/tmp`` mean
the directories of the same name under it, in file requests and working directories, and so
do whole arguments and environment values that are or begin with ``/workspace`` or
``/home/sandbox`` (text in the middle of an argument is left alone). Directories of the host are
links there; file requests, which follow none, go to such a directory itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

WORKSPACE = "/workspace"
HOME = "/home/sandbox"
MAPPED = (WORKSPACE, HOME, "/etc/voidbox", "/tmp")  # noqa: S108 - a guest path, not ours
_SYSTEM_PATH = "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"


class HostDirectory(NamedTuple):
    """A directory of the host that has a guest path; ``writable`` for the host's requests."""

    guest_path: str
    host_path: str
    writable: bool


class Place:
    """The file system and environment as programs of one machine see them."""

    def __init__(
        self,
        root: str,
        extra_env: tuple[tuple[str, str], ...] = (),
        python: tuple[str, ...] | None = None,
        mounts: tuple[HostDirectory, ...] = (),
    ) -> None:
        self.root = root.rstrip("/")
        self.extra_env = extra_env
        """What every program gets unless its request says otherwise."""
        self.python = python or (sys.executable,)
        """What starts an interpreter like the agent's own."""
        self._mounts = [(mount.guest_path.split("/")[1:], mount) for mount in mounts]

    def prepare(self) -> None:
        """Make the directories programs count on."""
        for path in (*MAPPED, "/usr/local/bin", "/home/sandbox/.local/bin"):
            os.makedirs(self.root + path, exist_ok=True)  # noqa: PTH103 - pathlib loads slowly

    def start_of(self, names: list[str]) -> tuple[str, list[str]]:
        """The real directory that the way to a guest path begins in, and the names left from
        there: the host's directory where the way leads through one, else the root."""
        mount = self._mount_of(names)
        if mount is None:
            return self.root or "/", names
        return mount[1].host_path, names[len(mount[0]) :]

    def read_only(self, names: list[str]) -> bool:
        """Whether the guest path is in a directory of the host that is not to be written."""
        mount = self._mount_of(names)
        return mount is not None and not mount[1].writable

    def _mount_of(self, names: list[str]) -> tuple[list[str], HostDirectory] | None:
        found = (mount for mount in self._mounts if names[: len(mount[0])] == mount[0])
        return next(found, None)

    def path(self, guest_path: str) -> str:
        """The real path of a guest path; unchanged outside the mapped directories."""
        return self._mapped(guest_path, MAPPED)

    def argument(self, text: str) -> str:
        """An argument or environment value with a guest path made real."""
        return self._mapped(text, (WORKSPACE, HOME))

    def _mapped(self, text: str, prefixes: tuple[str, ...]) -> str:
        for prefix in prefixes if self.root else ():
            if text == prefix or text.startswith(prefix + "/"):
                return self.root + text
        return text

    def working_dir(self, requested: str | None) -> str:
        """Where a program starts; a relative path is one of the workspace's."""
        requested = requested or WORKSPACE
        if not requested.startswith("/"):
            requested = f"{WORKSPACE}/{requested}"
        return self.path(requested)

    def environment(self, requested: Iterable[tuple[str, str]], *, pty: bool) -> dict[str, str]:
        """The whole environment of a program; what the request names wins."""
        path = _SYSTEM_PATH
        if self.root:
            path = f"{self.root}/usr/local/bin:{os.environ.get('PATH', _SYSTEM_PATH)}"
        if pty:
            path = f"{self.root}{HOME}/.local/bin:{path}"
        env = {
            "PATH": path,
            "HOME": self.root + HOME,
            "TMPDIR": self.path(MAPPED[-1]),
            "VOID_WORKSPACE": self.root + WORKSPACE,
            "LANG": "C.UTF-8",
        }
        if pty:
            env["TERM"] = "xterm-256color"
        for key, value in (*self.extra_env, *requested):
            env[key] = self.argument(value)
        return env
