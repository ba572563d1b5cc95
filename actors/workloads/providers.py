"""Providers: whose model is behind an agent, and so how its program is launched.

Pure but for the credentials some of them need, which are read from the supervisor's user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from voidbus.actors.workloads.agent_kinds import (
    GUEST_HOME,
    AgentKind,
    AnyProgram,
    ClaudeCode,
    Codex,
)
from voidbus.spec.run import DEFAULT_PROVIDER, AgentCommand, LlmSpec

CLAUDE_PROGRAM = "claude-code"
CODEX_PROGRAM = "codex"
OLLAMA_MODEL = "qwen3-coder:7b"
# The host's 127.0.0.1 as a guest with a network card sees it.
GATEWAY = "10.0.2.2"
_OLLAMA_PORT = 11434
_LM_STUDIO_PORT = 1234
# A file of credentials is some hundred bytes; more is another file.
_CREDENTIALS_LIMIT = 1024 * 1024


@dataclass(frozen=True)
class Launch:
    """How an agent is launched. `env` are its provider's variables and `files` its credentials, by
    guest path; `free`: what it says it cost is nothing; `network`: its model is out of reach
    without a network card, and `host_port` the port of the host where it listens."""

    kind: AgentKind
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    free: bool = False
    network: bool = False
    host_port: int | None = None


def launch_of(
    llm: LlmSpec | None,
    host_env: Mapping[str, str],
    *,
    gateway: str = GATEWAY,
    program: str | None = None,
    command: AgentCommand | None = None,
) -> Launch:
    """The launch of an agent. `gateway` is the host's address as the guest has it; `program`
    stands for the provider's own, and `command` for a program of no provider.

    Raises ValueError where a key or credentials are missing, naming what is to be there.
    """
    provider = _Provider(llm or LlmSpec(provider=DEFAULT_PROVIDER), host_env, gateway, program)
    launch = provider.launch()
    # A provider that has neither key, address nor credentials for its agent needs no network.
    network = llm is not None and bool(launch.files or launch.env.keys() - {"HOME"})
    if command is not None:
        # It gets what its provider has for it, and is read as text.
        launch = Launch(
            AnyProgram(command.program, command.args), launch.env, launch.files, launch.free
        )
    url = urlsplit(launch.env.get("ANTHROPIC_BASE_URL", ""))
    port = url.port if url.hostname == GATEWAY else None
    return Launch(launch.kind, launch.env, launch.files, launch.free, network, port)


class _Provider:
    def __init__(
        self, llm: LlmSpec, host_env: Mapping[str, str], gateway: str, program: str | None
    ) -> None:
        self._llm = llm
        self._host_env = host_env
        self._gateway = gateway
        self._program = program

    def launch(self) -> Launch:
        match self._llm.provider:
            case "claude":
                env = self._base_url(None) | self._key("ANTHROPIC_API_KEY")
                return Launch(self._claude(), env)
            case "claude-personal":
                return Launch(self._claude(), self._base_url(None), self._personal())
            case "ollama":
                env = self._base_url(_OLLAMA_PORT)
                env |= {"ANTHROPIC_API_KEY": "", "ANTHROPIC_AUTH_TOKEN": "ollama"}
                return Launch(self._claude(self._llm.model or OLLAMA_MODEL), env, free=True)
            case "lm-studio":
                env = self._base_url(_LM_STUDIO_PORT) | {"ANTHROPIC_API_KEY": "lm-studio"}
                return Launch(self._claude(self._llm.model), env, free=True)
            case "custom":
                env = self._base_url(_OLLAMA_PORT) | self._key(None)
                return Launch(self._claude(self._llm.model), env)
            case "codex":
                kind = Codex(self._program or CODEX_PROGRAM)
                env = {"HOME": GUEST_HOME} | self._key("OPENAI_API_KEY", "OPENAI_API_KEY")
                return Launch(kind, env, self._codex_login())
            case other:  # the specification's rules have refused it already
                raise ValueError(f"llm.provider: unknown provider '{other}'")

    def _claude(self, model: str | None = None) -> ClaudeCode:
        return ClaudeCode(self._program or CLAUDE_PROGRAM, model)

    def _base_url(self, default_port: int | None) -> dict[str, str]:
        """Where the model listens: as the specification says, else a port of the host's."""
        env = {"HOME": GUEST_HOME}
        url = self._llm.base_url
        if not url and default_port is not None:
            url = f"http://{self._gateway}:{default_port}"
        return env | ({"ANTHROPIC_BASE_URL": url} if url else {})

    def _key(self, default: str | None, target: str = "ANTHROPIC_API_KEY") -> dict[str, str]:
        """The key from the supervisor's variable that the specification names, else `default`."""
        named = self._llm.api_key_env
        name = named or default
        key = self._host_env.get(name, "") if name else ""
        if named and not key:
            raise ValueError(
                f"llm.api_key_env: the supervisor's environment has no variable {named!r}; set it "
                "where the supervisor is started, or leave the field out"
            )
        return {target: key} if key else {}

    def _personal(self) -> dict[str, bytes]:
        path = self._home() / ".claude/.credentials.json"
        try:
            content = _read(path)
        except OSError as error:
            raise ValueError(
                f"llm.provider claude-personal needs {path}, which can't be read "
                f"({error.strerror}); sign in with Claude Code as the supervisor's user"
            ) from error
        return {f"{GUEST_HOME}/.claude/.credentials.json": content}

    def _codex_login(self) -> dict[str, bytes]:
        """Codex's own sign-in, where there is one; a key does as well."""
        try:
            return {f"{GUEST_HOME}/.codex/auth.json": _read(self._home() / ".codex/auth.json")}
        except OSError:
            return {}

    def _home(self) -> Path:
        return Path(self._host_env.get("HOME") or Path("~").expanduser())


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_CREDENTIALS_LIMIT)
