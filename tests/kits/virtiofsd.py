"""virtiofsd, where there is one that will do, and directories for it to serve."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

OWNER = 1234
"""Whom root gives directories to. No user of the host."""

_SCRIPT = Path(__file__).parents[2] / "scripts/virtiofsd"
_NAMESPACE = ("setpriv", "--no-new-privs", "unshare", "--user", "--map-current-user", "true")


@cache
def virtiofsd() -> Path | None:
    """The program that scripts/virtiofsd tells, if it can be run here."""
    found = subprocess.run(
        [_SCRIPT, "--find"], capture_output=True, text=True, timeout=60, check=False
    )
    return Path(found.stdout.strip()) if found.returncode == 0 and _has_namespaces() else None


def _has_namespaces() -> bool:
    try:
        tried = subprocess.run(_NAMESPACE, capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        return False
    return tried.returncode == 0


@contextlib.contextmanager
def owned_directory() -> Iterator[Path]:
    """An empty directory that is not root's, where root runs this, and that its owner reaches."""
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        Path(folder).chmod(0o711)
        made = Path(folder, "host")
        made.mkdir()
        if os.geteuid() == 0:
            os.chown(made, OWNER, OWNER)
        yield made
