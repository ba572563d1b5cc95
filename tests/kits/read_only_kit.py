"""A directory that can't be written for a while, as a disk the kernel has given up on."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount `folder` read-only over itself; needs the capability `mount`.

    What was opened before goes on as it was; whatever is opened by its path is refused.
    """
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        # Lazily: who opened a file to read meanwhile may keep it.
        subprocess.run(["umount", "-l", folder], check=True, timeout=20)


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, timeout=20)
