"""The real Claude Code and Codex in machines, their layers under them and a scripted model behind
the gateway. Emulated, each takes a minute or two; no network and no key is in the guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from npm_agents import CLAUDE_CODE, CODEX
from scripted_model import LAST_WORDS, TOOLS, scripted_model
from supervisor_kit import running_supervisor

from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.cli.event_line import log_text
from voidbus.vm.image.agent_layers import AGENTS, build_agent_layer
from voidbus.vm.image.store import default_store

KEY = "sk-the-real-key-never-in-a-guest"
_PATIENCE = 500.0


@pytest.mark.needs("vm")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("provider", "key_name"),
    [
        pytest.param("claude", "ANTHROPIC_API_KEY", marks=pytest.mark.needs("claude")),
        pytest.param("codex", "OPENAI_API_KEY", marks=pytest.mark.needs("codex")),
    ],
)
def test_an_agent_finds_our_tools_in_its_machine_and_its_intents_arrive(
    tmp_path: Path, provider: str, key_name: str
) -> None:
    build_agent_layer(default_store().root, provider, lambda _: None)
    path = tmp_path / "agent.json"
    with scripted_model() as model, running_supervisor(**{key_name: KEY}) as supervisor:
        quiet = {"IS_SANDBOX": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        spec = {
            "kind": "agent",
            "name": "scout",
            "sandbox": {"mode": "auto", "memory_mb": 2048, "env": quiet},
            "llm": {"provider": provider, "base_url": model.url},
            "agent": {
                "prompt": "Tell your peers what you see, and your leader what to do.",
                "messaging": {"enabled": True},
            },
        }
        path.write_text(json.dumps(spec))
        with supervisor.connect() as client:
            run_id = client.start(path)
            state = client.wait_end(run_id, _PATIENCE)
            events = client.events(run_id)
            drained = client.ask("runs", ReadIntents(run_id=run_id, drain=True))
    said = [text for event in events if (text := log_text(event)) is not None]
    used = [event.message for event in events if event.event_type == "agent.tool_used"]
    names = [f"mcp__void-mcp__{tool}" for tool, _ in TOOLS]
    assert [tool for tool in used if tool.startswith("mcp__")] == names, (state.error, said)
    assert isinstance(drained, IntentList)
    assert [(each.kind, each.audience) for each in drained.intents] == [
        ("signal", "broadcast"),
        ("proposal", "leader"),
    ]
    assert LAST_WORDS in "".join(said)
    # It writes no output file, which a task owes.
    assert state.status == RunStatus.FAILED
    assert "STRUCTURED" in str(state.terminal_reason), state
    _, headers, _ = model.requests[0]
    assert KEY in (headers.get("x-api-key", ""), headers.get("authorization", "")[7:])
    assert KEY not in "".join(event.model_dump_json() for event in events)


@pytest.mark.parametrize(("name", "tried"), [("claude", CLAUDE_CODE), ("codex", CODEX)])
def test_the_layers_have_the_versions_that_are_tried_on_the_process_machine(
    name: str, tried: str
) -> None:
    assert tried.rpartition("@")[2] == AGENTS[name].version
