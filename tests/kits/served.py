"""A real `voidbus serve`, and commands beside it, each in a process of its own."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

VOIDBUS = (sys.executable, "-m", "voidbus.cli.main")


def clean_environment(state: Path) -> dict[str, str]:
    """What commands see: this state directory, and nothing of the operator's own settings."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VOIDBUS_", "VOIDBOX_", "XDG_", "NO_COLOR", "COLUMNS", "LINES"))
    }
    return own | {
        "VOIDBUS_STATE_DIR": str(state),
        "VOIDBUS_API__LISTEN": "off",  # the place where clients look is the user's
        "HOME": str(state.parent),
    }


class Served:
    """A supervisor on a state directory. Use it with `with`; it is gone afterwards."""

    def __init__(self, state: Path, **environment: str) -> None:
        self.state = state
        self.environ = clean_environment(state) | environment
        self.said = ""
        self.process = self._start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.voidbus("stop", "--runs", "cancel", "--deadline", "5")
        if self.process.poll() is None:
            self.process.kill()
        self._reap()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*VOIDBUS, "serve"], env=self.environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        said = b""
        while b" is up" not in said:
            ready, _, _ = select.select([process.stderr], [], [], 20.0)
            data = os.read(process.stderr.fileno(), 4096) if ready else b""
            said += data
            if not data:
                process.kill()
                process.communicate()
                raise AssertionError(f"the supervisor did not come up: {said.decode()}")
        self.said = said.decode()
        return process

    def _reap(self) -> None:
        self.process.communicate(timeout=20)

    def crash(self) -> None:
        """Kill the supervisor alone, as a bug or the kernel would."""
        self.process.kill()
        self._reap()

    def start_again(self) -> None:
        self.process = self._start()

    def voidbus(
        self, *arguments: object, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*VOIDBUS, *map(str, arguments)],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def states(self) -> dict[str, str]:
        """Every run's state, by id."""
        document = json.loads(self.voidbus("ps", "--all", "--json").stdout)
        return {run["id"]: run["status"] for run in document["runs"]}


def workflow(path: Path, script: str, name: str = "hello") -> Path:
    """A specification whose only step runs `script` with sh, without isolation."""
    path.write_text(
        json.dumps(
            {
                "api_version": "v1",
                "kind": "workflow",
                "name": name,
                "sandbox": {"mode": "mock"},
                "workflow": {
                    "steps": [{"name": "greet", "run": {"program": "sh", "args": ["-c", script]}}]
                },
            }
        )
    )
    return path
