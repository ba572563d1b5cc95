"""Providers: which program, which command line, which variables, which files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conductor_kit import FakeConductor

from voidbus.actors.workloads.make import make_workload
from voidbus.actors.workloads.providers import Launch, launch_of
from voidbus.spec.loader import parse_run_spec
from voidbus.spec.problem import SpecError
from voidbus.spec.run import AgentCommand, LlmSpec, RunSpec

CLAUDE = (
    *("-p", "Go.", "--output-format", "stream-json", "--verbose"),
    "--dangerously-skip-permissions",
)
SETTINGS = ("--settings", '{"skipWebFetchPreflight":true}')
SERVERS = {"void-mcp": "http://127.0.0.1:8222/mcp"}
HOME = {"HOME": "/home/sandbox"}


def launch(provider: str | None = None, host_env: dict[str, str] | None = None, **llm: Any) -> Any:
    """What is launched where the key may be in the guest; by a gateway is tested below."""
    llm.setdefault("key_in_guest", True)
    spec = None if provider is None else LlmSpec.model_validate({"provider": provider, **llm})
    return launch_of(spec, host_env or {})


def argv(of: Launch, *, mcp: bool = False) -> tuple[str, ...]:
    return (of.kind.program, *of.kind.arguments("Go.", mcp=mcp))


# -- claude ------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [None, "claude", "CLAUDE"])
def test_claude_is_what_runs_where_nothing_else_is_said(provider: str | None) -> None:
    named: dict[str, Any] = {"model": "m"} if provider else {}
    made = launch(provider, **named)
    assert argv(made) == ("claude-code", *CLAUDE, *SETTINGS), "its own model is not ours to name"
    assert made.env == HOME
    assert not made.network, "there is nothing for it to reach"


def test_a_key_is_in_the_guest_where_the_specification_says_so() -> None:
    made = launch("claude", {"ANTHROPIC_API_KEY": "k"})
    assert made.env == {**HOME, "ANTHROPIC_API_KEY": "k"}
    assert (made.network, made.endpoint) == (True, None)


def test_mcp_servers_are_named_to_claude_where_there_are_any() -> None:
    made = launch("claude")
    with_servers = argv(made, mcp=True)
    assert with_servers == (*argv(made), "--mcp-config", "/workspace/.mcp.json")
    files = made.kind.files(SERVERS)
    assert files["/workspace/.mcp.json"].decode().rstrip() == json.dumps(
        {"mcpServers": {"void-mcp": {"type": "http", "url": SERVERS["void-mcp"]}}}, indent=2
    )
    assert "/workspace/.mcp.json" not in made.kind.files({})


def test_claude_finds_its_settings_and_asks_nothing_at_its_first_start() -> None:
    assert launch("claude").kind.files({}) == {
        "/home/sandbox/.claude.json": b'{"hasCompletedOnboarding":true}',
        "/workspace/.claude/settings.json": b'{"skipWebFetchPreflight":true}',
    }


def test_the_key_of_the_variable_that_is_named_stands_over_the_usual_one() -> None:
    host = {"ANTHROPIC_API_KEY": "usual", "TEAM_KEY": "team"}
    assert launch("claude", host, api_key_env="TEAM_KEY").env["ANTHROPIC_API_KEY"] == "team"


def test_a_named_key_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="no variable 'TEAM_KEY'"):
        launch("custom", api_key_env="TEAM_KEY")


def test_a_key_is_not_shown_where_a_launch_is_printed() -> None:
    assert "secret-key" not in repr(launch("claude", {"ANTHROPIC_API_KEY": "secret-key"}))


# -- claude-personal ---------------------------------------------------------------------------


def test_personal_credentials_are_copied_from_the_supervisors_user(tmp_path: Path) -> None:
    (tmp_path / ".claude").mkdir()
    (tmp_path / ".claude/.credentials.json").write_text('{"token": "t"}')
    made = launch("claude-personal", {"HOME": str(tmp_path), "ANTHROPIC_API_KEY": "k"})
    assert made.files == {"/home/sandbox/.claude/.credentials.json": b'{"token": "t"}'}
    assert made.env == HOME
    assert argv(made)[0] == "claude-code"
    assert made.network


def test_missing_personal_credentials_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"needs {tmp_path}/.claude/.credentials.json"):
        launch("claude-personal", {"HOME": str(tmp_path)})


# -- other models for claude -------------------------------------------------------------------


def test_ollama_listens_on_the_host_has_a_model_and_costs_nothing() -> None:
    made = launch("ollama", {"ANTHROPIC_API_KEY": "k"})
    assert argv(made) == ("claude-code", *CLAUDE, "--model", "qwen3-coder:7b", *SETTINGS)
    assert made.env == {
        **HOME,
        "ANTHROPIC_BASE_URL": "http://10.0.2.2:11434",
        "ANTHROPIC_API_KEY": "",
        "ANTHROPIC_AUTH_TOKEN": "ollama",
    }
    assert (made.free, made.network, made.host_port) == (True, True, 11434)


def test_lm_studio_is_no_claude_and_costs_nothing() -> None:
    made = launch("lm-studio", model="m")
    assert argv(made) == ("claude-code", *CLAUDE, "--model", "m", *SETTINGS)
    assert made.env == {
        **HOME,
        "ANTHROPIC_BASE_URL": "http://10.0.2.2:1234",
        "ANTHROPIC_API_KEY": "lm-studio",
    }
    assert made.free


def test_a_custom_model_is_where_the_specification_says() -> None:
    made = launch("custom", {"K": "key"}, base_url="https://models.example/v1", api_key_env="K")
    assert argv(made) == ("claude-code", *CLAUDE, *SETTINGS)
    assert made.env == {
        **HOME,
        "ANTHROPIC_BASE_URL": "https://models.example/v1",
        "ANTHROPIC_API_KEY": "key",
    }
    assert (made.free, made.network, made.host_port) == (False, True, None)
    assert launch("custom").env["ANTHROPIC_BASE_URL"] == "http://10.0.2.2:11434"


# -- codex -------------------------------------------------------------------------------------


def test_codex_has_a_command_line_and_a_configuration_of_its_own(tmp_path: Path) -> None:
    made = launch("codex", {"HOME": str(tmp_path), "OPENAI_API_KEY": "k"}, model="m")
    assert argv(made) == (
        *("codex", "exec", "--json", "--skip-git-repo-check"),
        *("--dangerously-bypass-approvals-and-sandbox", "Go."),
    )
    assert made.env == {**HOME, "OPENAI_API_KEY": "k"}
    assert made.files == {}, "no sign-in of its own is needed where there is a key"
    files = made.kind.files({'odd "name"': "http://127.0.0.1:8222/mcp"})
    assert tomllib.loads(files["/home/sandbox/.codex/config.toml"].decode()) == {
        "mcp_servers": {'odd "name"': {"url": "http://127.0.0.1:8222/mcp"}}
    }
    assert "/workspace/.mcp.json" in files


def test_codex_gets_its_sign_in_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex/auth.json").write_text("{}")
    made = launch("codex", {"HOME": str(tmp_path)})
    assert made.files == {"/home/sandbox/.codex/auth.json": b"{}"}


def test_a_codex_sign_in_that_cannot_be_read_is_an_error_that_names_the_file(
    tmp_path: Path,
) -> None:
    (tmp_path / ".codex/auth.json").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{tmp_path}/.codex/auth.json can't be read"):
        launch("codex", {"HOME": str(tmp_path)})


# -- by the gateway ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("llm", "host_env", "upstream", "key", "bearer", "variable"),
    [
        (
            {"provider": "claude"},
            {"ANTHROPIC_API_KEY": "secret"},
            "https://api.anthropic.com",
            "secret",
            False,
            "ANTHROPIC_API_KEY",
        ),
        (
            {"provider": "claude", "base_url": "http://10.0.2.2:9/v2"},
            {},
            "http://127.0.0.1:9/v2",
            "",
            False,
            "ANTHROPIC_API_KEY",
        ),
        (
            {"provider": "ollama"},
            {},
            "http://127.0.0.1:11434",
            "ollama",
            True,
            "ANTHROPIC_AUTH_TOKEN",
        ),
        (
            {"provider": "lm-studio"},
            {},
            "http://127.0.0.1:1234",
            "lm-studio",
            False,
            "ANTHROPIC_API_KEY",
        ),
        (
            {"provider": "custom", "api_key_env": "K", "base_url": "https://m.example"},
            {"K": "secret"},
            "https://m.example",
            "secret",
            False,
            "ANTHROPIC_API_KEY",
        ),
        (
            {"provider": "codex", "base_url": "http://10.0.2.2:8/v1"},
            {},
            "http://127.0.0.1:8/v1",
            "",
            True,
            "OPENAI_API_KEY",
        ),
        (
            {"provider": "codex"},
            {"OPENAI_API_KEY": "secret"},
            "https://api.openai.com/v1",
            "secret",
            True,
            "OPENAI_API_KEY",
        ),
    ],
    ids=lambda value: value.get("provider") if isinstance(value, dict) and value else None,
)
def test_a_guest_has_a_placeholder_and_the_gateway_the_key(
    llm: dict[str, Any],
    host_env: dict[str, str],
    upstream: str,
    key: str,
    bearer: bool,
    variable: str,
) -> None:
    made = launch_of(LlmSpec.model_validate(llm), host_env)
    assert made.endpoint is not None
    assert made.endpoint.base_url == upstream
    assert (made.endpoint.key, made.endpoint.bearer) == (key, bearer)
    assert made.env[variable] == made.endpoint.token
    assert "secret" not in str(made.env)
    assert "secret" not in repr(made)
    assert "ANTHROPIC_BASE_URL" not in made.env, "it is known once the machine is up"
    assert (made.network, made.files) == (False, {})


def test_who_gives_the_guest_a_key_by_hand_has_no_gateway() -> None:
    guest_env = {"ANTHROPIC_API_KEY": "own"}
    assert launch_of(None, {"ANTHROPIC_API_KEY": "k"}, guest_env=guest_env).endpoint is None


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'models\.example' is no http"):
        launch_of(LlmSpec(provider="custom", base_url="models.example"), {})


def test_codex_is_told_of_the_gateway_in_its_configuration() -> None:
    config = launch("codex").kind.files({}, "http://127.0.0.1:5")
    parsed = tomllib.loads(config["/home/sandbox/.codex/config.toml"].decode())
    assert parsed["model_provider"] == "voidbus"
    assert parsed["model_providers"]["voidbus"]["base_url"] == "http://127.0.0.1:5"


# -- any program -------------------------------------------------------------------------------


def test_a_command_gets_its_prompt_where_it_says() -> None:
    command = AgentCommand(program="aider", args=("--message", "Task: {prompt}", "--yes"))
    made = launch_of(None, {}, command=command)
    assert argv(made) == ("aider", "--message", "Task: Go.", "--yes")
    assert made.kind.stdin("Go.") == b""


def test_a_command_without_a_place_for_the_prompt_reads_it() -> None:
    made = launch_of(None, {}, command=AgentCommand(program="cat"))
    assert argv(made) == ("cat",)
    assert made.kind.stdin("Go.") == b"Go."


def test_a_program_of_another_name_keeps_its_providers_command_line() -> None:
    made = launch_of(None, {}, program="/opt/claude/claude")
    assert argv(made) == ("/opt/claude/claude", *CLAUDE, *SETTINGS)


def run(**agent: Any) -> FakeConductor:
    conductor = FakeConductor()
    spec = {"kind": "agent", "name": "scout", "agent": {"prompt": "Go.", **agent}}
    make_workload(
        RunSpec.model_validate(spec),
        conductor,
        run_id="r1",
        host_env={},
        input_text=None,
        policy=None,
    ).begin()
    conductor.settle()
    return conductor


def test_what_a_command_prints_is_its_result() -> None:
    conductor = run(command={"program": "cat"})
    assert conductor.commands["scout"].stdin.startswith(b"Go.\n\nWrite your output to ")
    conductor.end("scout", stdout=b'{"type": "result"}\nline \xff\n')
    report = conductor.verdict.report
    assert report is not None
    assert report.output == '{"type": "result"}\nline \ufffd'
    assert conductor.logged[1] == ("scout", "stdout", "line \ufffd\n".encode())
    assert conductor.verdict.success


def test_a_command_fails_by_its_exit_code_with_its_last_words() -> None:
    conductor = run(command={"program": "cat"})
    conductor.end("scout", 3, stdout=b"almost\n", stderr=b"no disk\n")
    assert conductor.verdict.error == "cat ended with exit code 3: no disk"


def test_a_free_model_costs_nothing_whatever_the_agent_says() -> None:
    conductor = FakeConductor()
    spec = {
        "kind": "agent",
        "name": "scout",
        "llm": {"provider": "ollama", "key_in_guest": True},
        "agent": {"prompt": "x"},
    }
    workload = make_workload(
        RunSpec.model_validate(spec),
        conductor,
        run_id="r1",
        host_env={},
        input_text=None,
        policy=None,
    )
    workload.begin()
    conductor.settle()
    (opened,) = conductor.machines
    assert opened.request.sandbox.network
    assert opened.request.sandbox.host_ports == (11434,)
    conductor.end("scout", stdout=b'{"type":"result","result":"x","total_cost_usd":3}\n')
    assert conductor.verdict.report is not None
    assert conductor.verdict.report.total_cost_usd == 0


# -- the specification -------------------------------------------------------------------------


def problems(agent: str, llm: str = "{provider: claude}") -> str:
    text = f"kind: agent\nname: a\nllm: {llm}\nagent: {agent}\n"
    with pytest.raises(SpecError) as raised:
        parse_run_spec(text, name="run.yaml", format="yaml")
    return str(raised.value)


def test_an_unknown_provider_is_refused_with_the_list() -> None:
    told = problems("{prompt: x}", "{provider: gemini}")
    assert "allowed claude, claude-personal, ollama, lm-studio, custom, codex" in told


@pytest.mark.parametrize(
    ("llm", "says"),
    [
        (
            "{provider: claude, key_in_guest: true, credential_proxy: true}",
            "llm.key_in_guest and llm.credential_proxy are mutually exclusive",
        ),
        (
            "{provider: claude, key_in_guest: true, max_requests: 3}",
            "llm.max_requests can't be enforced with key_in_guest",
        ),
        (
            "{provider: claude-personal, max_requests: 3}",
            "llm.max_requests can't be enforced with provider claude-personal",
        ),
        ("{provider: claude, max_requests: 0}", "llm.max_requests"),
        (
            "{provider: claude-personal, max_cost: 3, prices: {input: 3, output: 15}}",
            "llm.max_cost can't be enforced with provider claude-personal",
        ),
        ("{provider: claude, max_cost: 3}", "llm.max_cost requires llm.prices"),
        ("{provider: claude, max_cost: .nan, prices: {input: 3, output: 15}}", "llm.max_cost"),
        ("{provider: claude, max_cost: 1, prices: {input: -3, output: 15}}", "prices.input"),
    ],
)
def test_what_the_gateway_can_not_do_is_refused(llm: str, says: str) -> None:
    assert says in problems("{prompt: x}", llm)


def test_a_program_and_a_command_exclude_each_other() -> None:
    told = problems("{prompt: x, program: p, command: {program: q}}")
    assert "agent.program and agent.command are mutually exclusive" in told
    assert "agent.command.program" in problems("{prompt: x, command: {program: ' '}}")


# -- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "host_env", "llm", "layer"),
    [
        ("claude", {"ANTHROPIC_API_KEY": "k"}, {}, "claude"),
        ("claude", {"ANTHROPIC_API_KEY": "k"}, {"key_in_guest": True}, "claude"),
        ("claude", {}, {"base_url": "http://127.0.0.1:1"}, "claude"),
        ("ollama", {}, {}, "claude"),
        ("lm-studio", {}, {}, "claude"),
        ("custom", {}, {}, "claude"),
        ("codex", {"OPENAI_API_KEY": "k", "HOME": "/nowhere"}, {}, "codex"),
        ("codex", {"HOME": "/nowhere"}, {}, "codex"),
    ],
)
def test_the_provider_decides_the_layer(
    provider: str, host_env: dict[str, str], llm: dict[str, Any], layer: str
) -> None:
    found = launch(provider, host_env, **llm)
    assert (found.layer, found.stand_in) == (layer, False)


@pytest.mark.parametrize("provider", [None, "claude"])
def test_without_a_way_to_a_model_claudio_stands_in_and_that_is_said(provider: str | None) -> None:
    found = launch(provider)
    assert (found.layer, found.stand_in) == (None, True)
    assert "claudio plays the agent" in run().event("agent.stand_in").message
    assert "agent.stand_in" not in run(program="claudio").types()


def test_a_key_by_hand_is_a_way_to_a_model() -> None:
    spec = LlmSpec(provider="claude")
    found = launch_of(spec, {}, guest_env={"ANTHROPIC_API_KEY": "k"})
    assert (found.layer, found.stand_in) == ("claude", False)


def test_a_program_of_ones_own_needs_no_layer() -> None:
    spec, key = LlmSpec(provider="claude"), {"ANTHROPIC_API_KEY": "k"}
    for found in (
        launch_of(spec, key, program="/opt/claude"),
        launch_of(spec, key, command=AgentCommand(program="aider")),
    ):
        assert (found.layer, found.stand_in) == (None, False)


def test_a_box_may_have_a_program_of_its_own_too() -> None:
    text = (
        "kind: pipeline\nname: p\npipeline:\n  boxes:\n"
        "    - {name: a, prompt: x, program: claudio}\n"
        "    - {name: b, prompt: x, command: {program: sh, args: [-c, cat]}}\n"
    )
    conductor = FakeConductor()
    make_workload(
        parse_run_spec(text, name="run.yaml", format="yaml").spec,
        conductor,
        run_id="r1",
        host_env={},
        input_text=None,
        policy=None,
    ).begin()
    conductor.settle()
    assert conductor.commands["a"].program == "claudio"
    conductor.end("a", stdout=json.dumps({"type": "result", "result": "done"}).encode())
    assert (conductor.commands["b"].program, conductor.commands["b"].args) == ("sh", ("-c", "cat"))
    with pytest.raises(SpecError, match="box 'a': program and box 'a': command are mutually"):
        parse_run_spec(
            text.replace("program: claudio", "program: p, command: {program: q}"),
            name="run.yaml",
            format="yaml",
        )
