"""Providers: whose model is behind an agent, and so how its program is launched.

Pure but for the credentials some of them need, which are read from the supervisor's user.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from voidbus.actors.workloads.agent_kinds import (
    GUEST_HOME,
    AgentKind,
    AnyProgram,
    ClaudeCode,
    Codex,
)
from voidbus.sidecar.model_endpoint import ModelEndpoint, ModelSpending, Prices
from voidbus.spec.run import DEFAULT_PROVIDER, AgentCommand, LlmSpec

CLAUDE_PROGRAM = "claude-code"
CODEX_PROGRAM = "codex"
OLLAMA_MODEL = "qwen3-coder:7b"
# The host's 127.0.0.1 as a guest with a network card sees it.
GATEWAY = "10.0.2.2"
_OLLAMA_PORT = 11434
_LM_STUDIO_PORT = 1234
_UPSTREAMS = {
    "claude": "https://api.anthropic.com",
    "codex": "https://api.openai.com/v1",
    "ollama": f"http://127.0.0.1:{_OLLAMA_PORT}",
    "lm-studio": f"http://127.0.0.1:{_LM_STUDIO_PORT}",
    "custom": f"http://127.0.0.1:{_OLLAMA_PORT}",
}
# Where agents look for a key, the first that is set; and for the model's address.
_KEY_VARIABLES = ("ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
_MODEL_VARIABLES = frozenset({*_KEY_VARIABLES, "ANTHROPIC_BASE_URL", "OPENAI_BASE_URL"})
# A file of credentials is some hundred bytes; more is another file.
_CREDENTIALS_LIMIT = 1024 * 1024


@dataclass(frozen=True)
class Launch:
    """How an agent is launched. `env` are its provider's variables and `files` its credentials, by
    guest path; `free`: what it says it cost is nothing. It reaches its model by a gateway to
    `endpoint`, whose URL is in `url_variable`; or where there is none and `network` by a network
    card, and `host_port` is the port of the host where the model listens. `layer` is the layer of
    a machine that has the program, where it is not in every one; `stand_in`: it has no model, so
    the program is the one that plays Claude Code."""

    kind: AgentKind
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    free: bool = False
    url_variable: str = "ANTHROPIC_BASE_URL"
    endpoint: ModelEndpoint | None = None
    network: bool = False
    host_port: int | None = None
    layer: str | None = None
    stand_in: bool = False


def launch_of(
    llm: LlmSpec | None,
    host_env: Mapping[str, str],
    *,
    guest_env: Mapping[str, str] | None = None,
    gateway: str = GATEWAY,
    program: str | None = None,
    command: AgentCommand | None = None,
    spending: ModelSpending | None = None,
) -> Launch:
    """The launch of an agent. `gateway` is the host's address as the guest has it; `program`
    stands for the provider's own, and `command` for a program of no provider. `guest_env` are the
    specification's own variables.

    Raises ValueError where a key or credentials are missing, naming what is to be there.
    """
    spec = llm or LlmSpec(provider=DEFAULT_PROVIDER)
    launch = _Provider(spec, host_env, gateway, program).launch()
    if command is not None:
        # It gets what its provider has for it, and is read as text.
        launch = replace(launch, kind=AnyProgram(command.program, command.args))
    # Who gives the guest a key or an address by hand has said how the model is reached.
    by_hand = bool(_MODEL_VARIABLES & (guest_env or {}).keys())
    reaches = launch.env.keys() & _MODEL_VARIABLES or (spec.base_url and not launch.files)
    if not spec.key_in_guest and not by_hand and reaches:
        launch = _by_gateway(spec, launch, spending or spending_of(spec))
    else:
        # A provider that has neither key, address nor credentials for its agent needs no network.
        url = urlsplit(launch.env.get("ANTHROPIC_BASE_URL", ""))
        launch = replace(
            launch,
            network=llm is not None and bool(launch.files or launch.env.keys() - {"HOME"}),
            host_port=url.port if url.hostname == GATEWAY else None,
        )
    if program is not None or command is not None:
        return launch  # its program is where its user has put it
    has_model = launch.endpoint is not None or launch.network or by_hand
    stand_in = isinstance(launch.kind, ClaudeCode) and not has_model
    return replace(launch, layer=None if stand_in else launch.kind.layer, stand_in=stand_in)


def spending_of(llm: LlmSpec | None) -> ModelSpending:
    """What a model may be asked, and nothing of it asked yet."""
    if llm is None:
        return ModelSpending()
    prices = None if llm.prices is None else Prices(llm.prices.input, llm.prices.output)
    return ModelSpending(llm.max_requests, llm.max_cost, prices)


def _by_gateway(spec: LlmSpec, launch: Launch, spending: ModelSpending) -> Launch:
    """The same, with a placeholder in the guest for what the gateway adds."""
    env = dict(launch.env)
    env.pop("ANTHROPIC_BASE_URL", None)
    usual = launch.url_variable.replace("BASE_URL", "API_KEY")
    key_variable = next((name for name in _KEY_VARIABLES if env.get(name)), usual)
    key = env.get(key_variable, "")
    token = f"voidbus-{secrets.token_hex(16)}"
    endpoint = ModelEndpoint(
        _upstream(spec),
        token,
        key,
        bearer=key_variable in ("ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY"),
        spending=spending,
    )
    return replace(launch, env={**env, key_variable: token}, endpoint=endpoint)


def _upstream(spec: LlmSpec) -> str:
    """Where the model listens, as the host has it. Raises ValueError."""
    url = spec.base_url or _UPSTREAMS[spec.provider]
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"llm.base_url: {url!r} is no http:// or https:// address of a model")
    if parts.hostname == GATEWAY:
        parts = parts._replace(netloc=parts.netloc.replace(GATEWAY, "127.0.0.1"))
    return parts.geturl()


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
                return Launch(self._claude(), {"HOME": GUEST_HOME}, self._personal())
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
                # Neither a key nor another's model wants it.
                signs_in = "OPENAI_API_KEY" not in env and not self._llm.base_url
                files = self._codex_login() if signs_in else {}
                return Launch(kind, env, files, url_variable="OPENAI_BASE_URL")
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
        path = self._home() / ".codex/auth.json"
        try:
            content = _read(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ValueError(
                f"llm.provider codex: {path} can't be read ({error.strerror}); let the "
                "supervisor's user read it, or set OPENAI_API_KEY where the supervisor is started"
            ) from error
        return {f"{GUEST_HOME}/.codex/auth.json": content}

    def _home(self) -> Path:
        return Path(self._host_env.get("HOME") or Path("~").expanduser())


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_CREDENTIALS_LIMIT)
