"""A supervisor with both doors of its API open, and specifications to run on it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from http_kit import HttpClient, free_port
from supervisor_kit import Supervisor, running_supervisor

TOKEN = "a-token-of-the-tests"

# RFC 3339, UTC with Z; nine digits of a fraction where there is one.
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{9})?Z\Z")

_names = itertools.count(1)


@dataclass(frozen=True)
class ApiHouse:
    """A supervisor, its API by a Unix socket and by TCP."""

    supervisor: Supervisor
    unix: HttpClient
    tcp: HttpClient

    def wait_up(self) -> None:
        """Wait until it answers: it listens before it is up."""
        with self.supervisor.connect():
            pass
        assert self.unix.get("/v1/health").status == 200

    def restart(self) -> None:
        """SIGKILL, and a new supervisor on the same state."""
        self.supervisor.kill()
        self.supervisor.start()
        self.wait_up()


@contextlib.contextmanager
def api_house(**environment: str) -> Iterator[ApiHouse]:
    port = free_port()
    doors = {
        "VOIDBUS_API__ALSO_LISTEN": f"tcp://127.0.0.1:{port}",
        "VOIDBOX_DAEMON_TOKEN": TOKEN,
    }
    with running_supervisor(**{**doors, **environment}) as supervisor:
        house = ApiHouse(
            supervisor,
            HttpClient(Path(f"{supervisor.state_dir}.api")),
            HttpClient(("127.0.0.1", port), TOKEN),
        )
        house.wait_up()
        yield house


# -- specifications ------------------------------------------------------------------------------


def write_spec(folder: Path, kind: str, **sections: object) -> Path:
    """A specification for the process machine; `name` is the kind unless it is given."""
    document = {"kind": kind, "name": kind, "sandbox": {"mode": "mock"}, **sections}
    path = folder / f"{kind}-{next(_names)}.json"
    path.write_text(json.dumps(document))
    return path


def step(name: str, script: str, *depends_on: str, **fields: Any) -> dict[str, Any]:
    """A workflow's step that runs a shell script. `stdin_from` belongs to what it runs."""
    run: dict[str, Any] = {"program": "sh", "args": ["-c", script]}
    if "stdin_from" in fields:
        run["stdin_from"] = fields.pop("stdin_from")
    return {"name": name, "run": run, "depends_on": list(depends_on), **fields}


def workflow(folder: Path, *steps: dict[str, Any], **fields: Any) -> Path:
    """A workflow; `output_step` belongs to its section, everything else to the specification."""
    section: dict[str, Any] = {"steps": list(steps)}
    if "output_step" in fields:
        section["output_step"] = fields.pop("output_step")
    return write_spec(folder, "workflow", **{"name": "flow", **fields}, workflow=section)


def structured(document: object, *files: tuple[str, str]) -> str:
    """A script that leaves this as its structured output, and files beside it."""
    text = document if isinstance(document, str) else json.dumps(document)
    lines = [f"cat > result.json <<'END'\n{text}\nEND"]
    lines += [f"printf '%s' '{content}' > '{name}'" for name, content in files]
    return "\n".join([*lines, "echo done"])


def scripted(script: str) -> dict[str, Any]:
    """What makes an agent or a box one that is a shell script; what that prints is its result."""
    return {"prompt": "do it", "command": {"program": "sh", "args": ["-c", script]}}


LEAVE_OUTPUT = """printf '{"status": "ok"}' > output.json"""
"""The shell's words for leaving the structured output that agents and boxes owe."""


def agent(folder: Path, *, messaging: bool = True, name: str = "scout", **env: str) -> Path:
    """An agent, played by claudio, which the environment directs."""
    return write_spec(
        folder,
        "agent",
        name=name,
        sandbox={"mode": "mock", "env": {"CLAUDIO_TURNS": "1", **env}},
        llm={"provider": "claude"},
        agent={"prompt": "do it", "messaging": {"enabled": messaging}},
    )


def box(name: str, **env: str) -> dict[str, Any]:
    """A pipeline's box, played by claudio."""
    return {
        "name": name,
        "prompt": f"be {name}",
        "sandbox": {"env": {"CLAUDIO_TURNS": "1", **env}},
    }


def pipeline(
    folder: Path, *boxes: dict[str, Any], stages: Sequence[dict[str, Any]] = (), **fields: Any
) -> Path:
    section: dict[str, Any] = {"boxes": list(boxes)}
    if stages:
        section["stages"] = list(stages)
    return write_spec(
        folder,
        "pipeline",
        **{"name": "line", "llm": {"provider": "claude"}, **fields},
        pipeline=section,
    )


def gate(folder: Path, name: str = "gate") -> Gate:
    """Something a script can wait for without a clock."""
    return Gate(folder / f"{name}-{next(_names)}")


class Gate:
    """A FIFO: a script waits on it until the test opens it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path

    @property
    def wait(self) -> str:
        """The shell's words for waiting."""
        return f"cat '{self.path}' >/dev/null"

    def open(self) -> None:
        """Let one script that waits go on; wait for it to wait."""
        self.path.write_bytes(b"go\n")

    @property
    def wait_with_others(self) -> str:
        """The shell's words for waiting where any number of scripts do."""
        return f": < '{self.path}'"

    @contextlib.contextmanager
    def held_open(self) -> Iterator[None]:
        """Let every script go on that waits with others, also those that come later."""
        # fifo(7): to open it for reading waits until somebody has it open for writing.
        fd = os.open(self.path, os.O_RDWR)
        try:
            yield
        finally:
            os.close(fd)
