"""The real Claude Code and Codex from their npm packages, put into `build/` on first use."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from functools import cache
from pathlib import Path

CLAUDE_CODE = "@anthropic-ai/claude-code@2.1.332"
CODEX = "@openai/codex@0.169.0"

_BUILD = Path(__file__).resolve().parents[2] / "build"
_INSTALL_SECONDS = 240.0


def claude_program() -> Path | None:
    """Claude Code; None where npm is missing or can't get the package."""
    return _program(CLAUDE_CODE, "claude")


def codex_program() -> Path | None:
    """Codex; None where npm is missing or can't get the package."""
    return _program(CODEX, "codex")


@cache
def _program(package: str, name: str) -> Path | None:
    npm = shutil.which("npm")
    if npm is None:
        return None
    folder = _BUILD / "agents" / package.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    # Several runs of the tests may find it missing at once.
    with (_BUILD / "agents/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "complete"
        if not done.exists() and _install(npm, folder, package):
            done.touch()
        return folder / "node_modules/.bin" / name if done.exists() else None


def _install(npm: str, folder: Path, package: str) -> bool:
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund"]
    command += ["--fetch-retries=1", package]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
