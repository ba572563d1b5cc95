"""Compiling for the guest by the guest's own Python, so the host's version doesn't matter.

The interpreter runs from the unpacked tree through the dynamic loader in that tree: no chroot, no
root. The byte code is of the kind that is never checked against its source (PEP 552,
unchecked-hash), which saves a guest a look at every source file.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.recipe import LIBRARIES, PYTHON

COMPILE_SECONDS = 300.0

_PROGRAM = """
import compileall, pathlib, py_compile, sys
folder, prefix, keep = sys.argv[1], sys.argv[2], sys.argv[3] == "keep"
done = compileall.compile_dir(
    folder, maxlevels=50, quiet=1, force=True, legacy=not keep, workers=1,
    stripdir=folder, prependdir=prefix,
    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
)
if not done:
    sys.exit(1)
if not keep:
    for source in pathlib.Path(folder).rglob("*.py"):
        source.unlink()
"""


def compile_folder(root: Path, folder: Path, prefix: str, *, keep_sources: bool) -> None:
    """Compiles every source below `folder`, which is `prefix` in the guest.

    `root` is the tree that has the guest's Python. With `keep_sources` the byte code goes to
    `__pycache__`; without, it takes the sources' place. The same sources give the same bytes.
    Raises ImageError where a source doesn't compile or the guest's Python doesn't run.
    """
    libraries = root / LIBRARIES
    command = [
        str(libraries / "ld-linux-x86-64.so.2"),
        *("--library-path", str(libraries), str(root / "usr/bin" / PYTHON)),
        *("-s", "-S", "-B", "-c", _PROGRAM),
        *(str(folder), prefix, "keep" if keep_sources else "replace"),
    ]
    environment = {
        "PYTHONHOME": str(root / "usr"),
        # Sets and dictionaries of the compiler are in the same order each time.
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "PATH": os.defpath,
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(
            f"the guest's Python doesn't run on this host: {error}; images are built on x86-64"
        ) from error
    if done.returncode:
        said = " | ".join((done.stdout + done.stderr).splitlines())[-800:]
        raise ImageError(f"{folder} can't be compiled for the guest: {said}")
