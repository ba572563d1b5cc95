"""QEMU as a child process, started by a thread that owns it and gone with that thread."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

# The parent-death signal belongs to the thread that forked (prctl(2)), so that thread must live
# as long as QEMU. It is set after the fork; the shell finds out whether the parent died before.
_STILL_OURS = '[ "$PPID" = "$0" ] && exec "$@"'


PROGRAM = "qemu-system-x86_64"

INSTALL = "sudo apt-get install --no-install-recommends qemu-system-x86"


def sealed(arguments: Sequence[str]) -> list[str]:
    """A command that ends with the calling thread and keeps no capability of root. Root's files
    stay readable to it; everything else root may do is gone."""
    drop = ["--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    seal = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs", *drop]
    return [*seal, "sh", "-c", _STILL_OURS, str(os.getpid()), *arguments]


def spawn(
    arguments: Sequence[str], folder: Path, descriptors: tuple[int, ...], errors: int
) -> subprocess.Popen[bytes]:
    """Start it in ``folder``; its words go to ``errors``. Call it on a thread that outlives the
    child. Raises OSError."""
    return subprocess.Popen(
        sealed(arguments),
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=descriptors,
        cwd=folder,
        start_new_session=True,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
    )


def find_program(name: str) -> str | None:
    """The path of a program, looked for where distributions put them as well."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/bin:/usr/bin:/usr/libexec")
