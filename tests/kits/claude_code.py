"""The real Claude Code from its npm package, put into `build/` on first use."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from functools import cache
from pathlib import Path

VERSION = "2.1.332"

_BUILD = Path(__file__).resolve().parents[2] / "build"
_INSTALL_SECONDS = 240.0


@cache
def claude_program() -> Path | None:
    """Its program; None where npm is missing or can't get the package."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    folder = _BUILD / f"agents/claude-code-{VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    # Several runs of the tests may find it missing at once.
    with (_BUILD / "agents/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "complete"
        if not done.exists() and _install(npm, folder):
            done.touch()
        return folder / "node_modules/.bin/claude" if done.exists() else None


def _install(npm: str, folder: Path) -> bool:
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund"]
    command += ["--fetch-retries=1", f"@anthropic-ai/claude-code@{VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
