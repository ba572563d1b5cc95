"""The kinds of agent programs: their command lines, their configuration files, their streams.

Pure: what a program is given and how it is read, for every provider that uses it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from voidbus.actors.workloads.agent_stream import AgentStream
from voidbus.actors.workloads.codex_events import CodexEvents
from voidbus.actors.workloads.plain_output import PlainOutput
from voidbus.actors.workloads.stream_json import StreamParser

MCP_CONFIG = "/workspace/.mcp.json"
GUEST_HOME = "/home/sandbox"
_PROMPT = "{prompt}"
_CODEX_MODEL = """\
model_provider = "voidbus"

[model_providers.voidbus]
name = "voidbus"
base_url = {url}
env_key = "OPENAI_API_KEY"
wire_api = "responses"
"""


@dataclass(frozen=True)
class AgentKind(ABC):
    """A program of one kind; `program` is its name on the guest's PATH, or its path."""

    skills_folder: ClassVar[str | None] = None
    """Where it looks for skills, if not where all of them are."""

    layer: ClassVar[str | None] = None
    """The layer of a machine that has it, where there is one."""

    environment: ClassVar[Mapping[str, str]] = {}
    """Variables it is given unless the specification has others."""

    program: str

    @abstractmethod
    def arguments(self, prompt: str, *, mcp: bool) -> tuple[str, ...]:
        """Its arguments; `mcp`: there are MCP servers."""

    @abstractmethod
    def stream(self) -> AgentStream:
        """Who reads what it prints."""

    def stdin(self, prompt: str) -> bytes:
        """What it reads."""
        return b""

    def files(self, servers: Mapping[str, str], model_url: str | None = None) -> dict[str, bytes]:
        """Its configuration, by guest path; `servers` are URLs of MCP servers by name, `model_url`
        is that of its model where that is not its usual one."""
        if not servers:
            return {}
        entries = {name: {"type": "http", "url": url} for name, url in servers.items()}
        return {MCP_CONFIG: json.dumps({"mcpServers": entries}, indent=2).encode() + b"\n"}


@dataclass(frozen=True)
class ClaudeCode(AgentKind):
    """Claude Code, without questions: the machine is what stands between it and the host."""

    layer: ClassVar[str | None] = "claude"
    # Else it asks its model without the tools of MCP servers that take longer to connect to than
    # it cares to wait, and where guests are slow an agent can't reach its peers.
    environment: ClassVar[Mapping[str, str]] = {"MCP_CONNECTION_NONBLOCKING": "0"}
    model: str | None = None

    def arguments(self, prompt: str, *, mcp: bool) -> tuple[str, ...]:
        args = ["-p", prompt, "--output-format", "stream-json", "--verbose"]
        args += ["--dangerously-skip-permissions"]
        if self.model:
            args += ["--model", self.model]
        args += ["--settings", _compact({"skipWebFetchPreflight": True})]
        if mcp:
            args += ["--mcp-config", MCP_CONFIG]
        return tuple(args)

    def stream(self) -> AgentStream:
        return StreamParser()

    def files(self, servers: Mapping[str, str], model_url: str | None = None) -> dict[str, bytes]:
        return {
            # Else its first start asks for a colour scheme.
            f"{GUEST_HOME}/.claude.json": _compact({"hasCompletedOnboarding": True}).encode(),
            "/workspace/.claude/settings.json": _compact({"skipWebFetchPreflight": True}).encode(),
            **super().files(servers),
        }


@dataclass(frozen=True)
class Codex(AgentKind):
    """Codex, without questions and without a sandbox of its own."""

    skills_folder: ClassVar[str | None] = "/workspace/.agents/skills"
    layer: ClassVar[str | None] = "codex"

    def arguments(self, prompt: str, *, mcp: bool) -> tuple[str, ...]:
        return (
            "exec",
            "--json",
            "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox",
            prompt,
        )

    def stream(self) -> AgentStream:
        return CodexEvents()

    def files(self, servers: Mapping[str, str], model_url: str | None = None) -> dict[str, bytes]:
        # A JSON string is a basic string of TOML 1.0 too, where it is ASCII.
        tables = [] if model_url is None else [_CODEX_MODEL.format(url=json.dumps(model_url))]
        tables += [
            f"[mcp_servers.{json.dumps(name)}]\nurl = {json.dumps(url)}\n"
            for name, url in servers.items()
        ]
        config = {f"{GUEST_HOME}/.codex/config.toml": "\n".join(tables).encode()} if tables else {}
        return {**super().files(servers), **config}


@dataclass(frozen=True)
class AnyProgram(AgentKind):
    """A program that takes its prompt where an argument says `{prompt}`, else on its standard
    input, and whose output is its result."""

    args: tuple[str, ...] = ()

    def arguments(self, prompt: str, *, mcp: bool) -> tuple[str, ...]:
        return tuple(arg.replace(_PROMPT, prompt) for arg in self.args)

    def stdin(self, prompt: str) -> bytes:
        return b"" if any(_PROMPT in arg for arg in self.args) else prompt.encode()

    def stream(self) -> AgentStream:
        return PlainOutput()


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
