"""The official MCP Python SDK, each generation in an environment of its own that is made once."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

SDK_VERSIONS = ("2.3.0", "1.30.0")
"""The newest of each generation: most clients of the day are built on the first."""

_ROOT = Path(__file__).resolve().parents[2]
_BUILD = _ROOT / "build"
_DRIVER = Path(__file__).with_name("mcp_sdk_client.py")
_INSTALL_SECONDS = 150.0


@cache
def sdk_python(version: str) -> Path | None:
    """The interpreter that has the SDK, made on first use; None where pip can't get it."""
    folder = _BUILD / f"mcp-sdk-{version}"
    _BUILD.mkdir(exist_ok=True)
    # Several runs of the tests may find it missing at once.
    with (_BUILD / "mcp-sdk.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "complete"
        if not done.exists() and _install(folder, version):
            done.touch()
        return folder / "bin/python" if done.exists() else None


def _install(folder: Path, version: str) -> bool:
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1")
    commands = (
        (sys.executable, "-m", "venv", "--clear", str(folder)),
        (str(folder / "bin/python"), *pip, "--timeout", "10", f"mcp=={version}"),
    )
    try:
        return all(
            subprocess.run(
                command, capture_output=True, timeout=_INSTALL_SECONDS, check=False
            ).returncode
            == 0
            for command in commands
        )
    except subprocess.TimeoutExpired:
        return False


class SdkClient:
    """A client that is connected; `do` is one step, and gives its result."""

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]], info: Any) -> None:
        self._answer = answer
        self.info: dict[str, Any] = info

    def do(self, step: str, **arguments: Any) -> Any:
        answer = self._answer({"do": step, **arguments})
        assert "result" in answer, answer
        return answer["result"]

    def fails(self, step: str, **arguments: Any) -> dict[str, Any]:
        """The error of the protocol that a step meets."""
        answer = self._answer({"do": step, **arguments})
        assert "error" in answer, answer
        return dict(answer["error"])


class Sdk:
    """A process that has the SDK, and connects as often as it is told."""

    def __init__(self, python: Path) -> None:
        command = [str(python), "-W", "ignore", str(_DRIVER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        self._input.close()
        self._output.close()

    @contextmanager
    def client(
        self,
        version: str,
        *,
        url: str | None = None,
        command: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> Iterator[SdkClient]:
        """A connection to a URL, or to a command the SDK starts. `version` is what it asks for;
        "auto" lets it find out what the server has."""
        setup = {
            "mode": version if version >= "2026" else "legacy",
            "version": version,
            "url": url,
            "command": list(command),
            "env": {"PATH": os.environ["PATH"], **(env or {})},
        }
        info = self._answer(setup)
        assert "result" in info, info
        try:
            yield SdkClient(self._answer, info["result"])
        finally:
            ended = self._answer({"do": "end"})
        assert ended == {"result": "ended"}

    def _answer(self, step: dict[str, Any]) -> dict[str, Any]:
        # The test's own end, if the SDK never answers.
        guard = threading.Timer(60, self._process.kill)
        guard.start()
        try:
            self._input.write(json.dumps(step).encode() + b"\n")
            self._input.flush()
            line = self._output.readline()
        finally:
            guard.cancel()
            guard.join()
        assert line, "the SDK's client has ended"
        return dict(json.loads(line))


@contextmanager
def sdk(version: str) -> Iterator[Sdk]:
    python = sdk_python(version)
    assert python is not None
    process = Sdk(python)
    try:
        yield process
    finally:
        process.close()
