"""Loads the kernel modules a machine needs, and what those need, without modprobe.

``/lib/modules/<release>/modules.dep`` (depmod(8)) has a line for each module: its file, a
colon, and all it depends on. A module that is not listed is taken to be built in.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

from . import kernel

MODULES = "/lib/modules"

_COMPRESSED = (".xz", ".zst", ".gz")


class Modules:
    """The modules of the running kernel. ``load`` is :func:`kernel.load_module`, or a stand-in."""

    def __init__(
        self, folder: str | None = None, load: Callable[[int, int], None] = kernel.load_module
    ) -> None:
        self._folder = folder or f"{MODULES}/{os.uname().release}"
        self._load = load
        self._needs: dict[str, tuple[str, tuple[str, ...]]] | None = None
        self._done: set[str] = set()

    def load(self, names: Iterable[str]) -> list[str]:
        """Load modules with what they depend on. What could not be loaded, and why."""
        faults: list[str] = []
        for name in names:
            try:
                self._load_with_needs(name)
            except OSError as error:
                faults.append(f"kernel module {name}: {error.strerror}")
        return faults

    def _load_with_needs(self, name: str) -> None:
        if self._needs is None:
            self._needs = read_dependencies(self._folder)
        file, needs = self._needs.get(name, ("", ()))
        if not file or file in self._done:
            return
        # modules.dep names the nearest need first; the furthest has to be loaded first.
        for path in (*reversed(needs), file):
            if path not in self._done:
                self._load_file(path)
                self._done.add(path)

    def _load_file(self, path: str) -> None:
        flags = kernel.MODULE_INIT_COMPRESSED_FILE if path.endswith(_COMPRESSED) else 0
        fd = os.open(f"{self._folder}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._load(fd, flags)
        except OSError as error:
            if error.errno != errno.EEXIST:  # loaded before
                raise
        finally:
            os.close(fd)


def read_dependencies(folder: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For each module its file and the files it needs, below ``folder``. Without a
    modules.dep: nothing, everything being built in. Raises OSError when it can't be read."""
    try:
        fd = os.open(f"{folder}/modules.dep", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    with open(fd, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
        found = {}
        for text in lines:
            file, _, needs = text.partition(":")
            found[module_name(file)] = (file, tuple(needs.split()))
        return found


def module_name(path: str) -> str:
    """A module's name from its file: ``kernel/fs/fuse/virtiofs.ko.xz`` is ``virtiofs``."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")
