"""virtiofsd, where there is one that will do."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

OLDEST = (1, 13)
"""The first that machines.virtiofsd takes."""

BUILT = Path(__file__).parents[2] / "build/virtiofsd/bin"
"""Where scripts/virtiofsd puts one that it has built."""

_FOLDERS = (BUILT, *map(Path, ("/usr/local/bin", "/usr/bin", "/usr/libexec")))


@cache
def virtiofsd() -> Path | None:
    """The program that scripts/virtiofsd tells."""
    for folder in _FOLDERS:
        if (folder / "virtiofsd").exists() and _version(folder / "virtiofsd") >= OLDEST:
            return folder / "virtiofsd"
    return None


def _version(program: Path) -> tuple[int, ...]:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20)
    number = said.stdout.split()[1] if said.stdout.startswith("virtiofsd ") else "0"
    return tuple(int(part) for part in number.split(".") if part.isdecimal())
