"""QEMU as a child process, started by a thread that owns it and gone with that thread."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from voidbus.vm.qemu.user import QemuUser

# The parent-death signal belongs to the thread that forked (prctl(2)), so that thread must live
# as long as QEMU. It is set after the fork; the shell finds out whether the parent died before.
_STILL_OURS = '[ "$PPID" = "$0" ] && exec "$@"'


PROGRAM = "qemu-system-x86_64"

INSTALL = "sudo apt-get install --no-install-recommends qemu-system-x86"


def sealed(arguments: Sequence[str], user: QemuUser | None = None) -> list[str]:
    """A command that ends with the calling thread, gains no privilege, and keeps no capability of
    root: as ``user``, or as this process's."""
    drop = ["--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    become: list[str] = []
    if user is not None:
        groups = ",".join(map(str, user.groups))
        become = ["--reuid", str(user.uid), "--regid", str(user.gid)]
        become += ["--groups", groups] if groups else ["--clear-groups"]
    # setpriv sets the signal after the user, whose change would clear it (prctl(2)).
    seal = ["setpriv", "--pdeathsig", "KILL", "--no-new-privs", *drop, *become]
    return [*seal, "sh", "-c", _STILL_OURS, str(os.getpid()), *arguments]


def spawn(
    arguments: Sequence[str],
    folder: Path,
    descriptors: tuple[int, ...],
    errors: int,
    user: QemuUser | None = None,
) -> subprocess.Popen[bytes]:
    """Start it in ``folder``, by which one can tell whose it is, though it may not enter it; its
    words go to ``errors``. Call it on a thread that outlives the child. Raises OSError."""
    return subprocess.Popen(
        sealed(arguments, user),
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
