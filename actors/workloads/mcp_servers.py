"""The MCP servers of one machine: started in the guest, awaited, and started again when they die.

The agent hears of a server once it accepts connections. A server that dies later is started again
after a pause; one that dies too often is left alone, and the run goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from voidbus.actors.workloads.conductor import Command, Conductor, Exit, GuestMachine
from voidbus.actors.workloads.skills import McpServer
from voidbus.actors.workloads.stage import Stage

# How long a server may take until it accepts connections (seconds): an emulated guest is slow.
READY_SECONDS = 60
# Before a server that died is started again (seconds); twice as long each time, up to the longest.
RESTART_FIRST_SECONDS = 0.2
RESTART_LONGEST_SECONDS = 10.0
# Deaths in a row after which a server is left alone; one that served this long begins anew.
MAX_DEATHS = 5
STABLE_SECONDS = 60.0
# What an error or event repeats of a server's standard error (bytes): its last words.
_WORDS_KEPT = 500
# The tool that tells when a port of the guest's accepts connections; in every guest.
_PROBE = "void-mcp"


class McpServers:
    """All servers of one machine. `env` are the variables of all, each has its own beside."""

    def __init__(
        self,
        servers: Sequence[McpServer],
        machine: GuestMachine,
        conductor: Conductor,
        stage: Stage,
        env: Mapping[str, str],
    ) -> None:
        self._servers = [
            _Server(server, machine.server_port(index), machine, conductor, stage, env)
            for index, server in enumerate(servers)
        ]
        self._then: Callable[[str | None], None] | None = None
        self._waiting = len(self._servers)
        self._started = False

    @property
    def urls(self) -> dict[str, str]:
        """Where each listens, as programs in the guest say it."""
        return {server.name: server.url for server in self._servers}

    def start(self, then: Callable[[str | None], None]) -> None:
        """Start them all; `then` gets None once all accept connections, else what failed. Where
        they were started before, they are there."""
        if self._started or not self._servers:
            then(None)
            return
        self._started, self._then = True, then
        for server in self._servers:
            server.start(self._answered)

    def _answered(self, error: str | None) -> None:
        self._waiting -= 1
        then = self._then
        if then is not None and (error is not None or self._waiting == 0):
            self._then = None
            then(error)


class _Server:
    """One server: started, ready, dead, started again."""

    def __init__(
        self,
        server: McpServer,
        port: int,
        machine: GuestMachine,
        conductor: Conductor,
        stage: Stage,
        env: Mapping[str, str],
    ) -> None:
        self.name = server.name
        self.url = f"http://127.0.0.1:{port}/mcp"
        self._server = server
        self._port = port
        self._machine = machine
        self._conductor = conductor
        self._stage = stage
        self._env = {**env, **server.env}
        self._on_first: Callable[[str | None], None] | None = None
        self._life = 0  # which of its lives this is: what comes late from another does not count
        self._running = False
        self._deaths = 0
        self._words = b""

    def start(self, on_first: Callable[[str | None], None]) -> None:
        self._on_first = on_first
        self._launch()

    def _launch(self) -> None:
        self._life += 1
        self._running = True
        self._words = b""
        life, server = self._life, self._server
        self._machine.execute(
            f"mcp {self.name}",
            Command(
                server.command,
                (*server.args, "--sse", "--port", str(self._port)),
                self._env,
                background=True,
            ),
            self._on_output,
            self._ended,
        )
        self._machine.execute(
            f"mcp {self.name} ready",
            Command(
                _PROBE,
                ("--probe", str(self._port), "--seconds", str(READY_SECONDS)),
                timeout=2 * READY_SECONDS,
                background=True,
            ),
            lambda _stream, _data: None,
            lambda end: self._probed(life, end),
        )

    def _on_output(self, stream: str, data: bytes) -> None:
        if stream == "stderr":
            self._words = (self._words + data)[-_WORDS_KEPT:]

    def _probed(self, life: int, end: Exit) -> None:
        if life != self._life or not self._running:
            return  # it died meanwhile, which was told
        if not end.succeeded:
            why = end.error or f"it did not accept connections within {READY_SECONDS} s"
            if self._on_first is not None:
                self._first(self._failure(why))
            else:
                self._give_up(why)
            return
        if self._on_first is not None:
            self._first(None)
        else:
            self._stage.emit(
                "mcp.restarted",
                f"the MCP server {self.name} serves again",
                payload={"server": self.name, "deaths": self._deaths},
            )
        self._conductor.after_working(STABLE_SECONDS, lambda: self._stable(life))

    def _stable(self, life: int) -> None:
        if life == self._life and self._running:
            self._deaths = 0

    def _ended(self, end: Exit) -> None:
        self._running = False
        why = end.error or f"it ended with exit code {end.exit_code}"
        if self._on_first is not None:
            self._first(self._failure(f"{why} before it was ready"))
            return
        self._deaths += 1
        payload: dict[str, Any] = {
            "server": self.name,
            "exit_code": end.exit_code,
            "deaths": self._deaths,
            "stderr": self._said,
        }
        message = f"the MCP server {self.name} died: {why}"
        self._stage.emit("mcp.exited", message, level="warn", payload=payload)
        if self._deaths >= MAX_DEATHS:
            self._give_up(f"it died {self._deaths} times")
            return
        delay = min(RESTART_LONGEST_SECONDS, RESTART_FIRST_SECONDS * 2 ** (self._deaths - 1))
        self._conductor.after_working(delay, self._launch)

    def _give_up(self, why: str) -> None:
        self._stage.emit(
            "mcp.given_up",
            f"the run goes on without the MCP server {self.name}: {why}",
            level="error",
            payload={"server": self.name},
        )

    def _first(self, error: str | None) -> None:
        on_first, self._on_first = self._on_first, None
        if on_first is not None:
            on_first(error)

    def _failure(self, why: str) -> str:
        said = f"; its last words: {self._said}" if self._said else ""
        return f"skill mcp:{self.name}: the MCP server did not start: {why}{said}"

    @property
    def _said(self) -> str:
        return self._words.decode(errors="replace").strip()
