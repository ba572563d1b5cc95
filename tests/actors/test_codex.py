"""The real Codex with a scripted model, on the process machine."""

from __future__ import annotations

import json

import pytest
from npm_agents import codex_program
from run_kit import House
from scripted_model import LAST_WORDS, TOOLS, USAGE, scripted_model

pytestmark = [pytest.mark.needs("codex"), pytest.mark.timeout(120)]

KEY = "sk-the-real-key"


def test_codex_calls_our_tools_and_its_intents_arrive(house: House) -> None:
    with scripted_model() as model:
        spec = {
            "kind": "agent",
            "name": "scout",
            "sandbox": {"mode": "mock"},
            "llm": {"provider": "codex", "base_url": model.url},
            "agent": {
                "prompt": "Tell your peers what you see, and your leader what to do.",
                "program": str(codex_program()),
                "timeout_secs": 60,
                "messaging": {"enabled": True},
            },
        }
        house.start(spec, host_env={"OPENAI_API_KEY": KEY, "HOME": str(house.folder / "nobody")})
        state = house.wait_over()
    used = [event.message for event in house.events() if event.event_type == "agent.tool_used"]
    assert used == [f"mcp__void-mcp__{tool}" for tool, _ in TOOLS], (state.error, house.log())
    assert house.desk is not None
    assert [(each.kind, each.audience) for each in house.desk.state.peek()] == [
        ("signal", "broadcast"),
        ("proposal", "leader"),
    ]
    assert LAST_WORDS in house.log()
    report = state.report
    assert report is not None
    assert report.output == LAST_WORDS
    assert (report.input_tokens, report.output_tokens) == (2 * USAGE[0], 2 * USAGE[1])
    _, headers, first = model.requests[0]
    assert headers["authorization"] == f"Bearer {KEY}", "the gateway adds it"
    assert "void-messaging" in json.dumps(first["input"]), "its skill is offered to the model"
    (spent,) = [event.payload for event in house.events() if event.event_type == "model.used"]
    assert spent is not None
    assert (spent["requests"], spent["output_tokens"]) == (2, 2 * USAGE[1])
