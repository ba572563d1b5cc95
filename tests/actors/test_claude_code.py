"""The real Claude Code with a scripted model, on the process machine, where it takes seconds.

That it does the same in a virtual machine: tests/e2e/test_real_agents_in_machines.py.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from npm_agents import claude_program
from run_kit import House
from scripted_model import LAST_WORDS, TOOLS, USAGE, ScriptedModel, scripted_model

from voidbus.actors.messages.runs import RunStatus

pytestmark = [pytest.mark.needs("claude"), pytest.mark.timeout(120)]

# It refuses --dangerously-skip-permissions to root elsewhere, and would call home.
QUIET = {"IS_SANDBOX": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}


def claude(model: ScriptedModel, **agent: Any) -> dict[str, Any]:
    return {
        "kind": "agent",
        "name": "scout",
        "sandbox": {"mode": "mock", "env": QUIET},
        "llm": {"provider": "claude", "base_url": model.url},
        "agent": {
            "prompt": "Tell your peers what you see, and your leader what to do.",
            "program": str(claude_program()),
            "timeout_secs": 60,
            "messaging": {"enabled": True},
            **agent,
        },
    }


def test_claude_code_calls_our_tools_and_its_intents_arrive(house: House) -> None:
    with scripted_model() as model:
        house.start(claude(model), host_env={"ANTHROPIC_API_KEY": "the-real-key"})
        house.wait_over()
    names = [f"mcp__void-mcp__{tool}" for tool, _ in TOOLS]
    assert set(names) <= model.offered, house.log()
    used = [event.message for event in house.events() if event.event_type == "agent.tool_used"]
    assert [tool for tool in used if tool.startswith("mcp__")] == names
    assert house.desk is not None
    intents = house.desk.state.peek()
    assert [(each.kind, each.audience) for each in intents] == [
        ("signal", "broadcast"),
        ("proposal", "leader"),
    ]
    assert intents[0].payload == {"summary_text": "the workspace is empty"}
    assert any('"entries"' in result for result in model.results), "its tool answered the inbox"
    assert LAST_WORDS in house.log()
    _, headers, first = model.requests[0]
    assert "void-messaging" in json.dumps(first), "its skill is offered to the model"
    assert headers["x-api-key"] == "the-real-key", "the gateway adds it"
    (used_model,) = [event for event in house.events() if event.event_type == "model.used"]
    assert used_model.payload is not None
    assert used_model.payload["requests"] == len(model.requests)
    assert used_model.payload["output_tokens"] == USAGE[1] * len(model.requests)


def test_what_claude_code_reports_is_the_runs_report(house: House) -> None:
    with scripted_model() as model:
        house.start(claude(model))
        state = house.wait_over()
    report = state.report
    assert report is not None
    assert report.output == LAST_WORDS
    answers = len(model.requests)
    assert (report.input_tokens, report.output_tokens) == (USAGE[0] * answers, USAGE[1] * answers)
    # It writes no output file, which a task owes.
    assert state.status == RunStatus.FAILED
    assert "STRUCTURED" in str(state.terminal_reason), state


def test_claude_code_ends_when_its_requests_are_used_up(house: House) -> None:
    with scripted_model() as model:
        spec = claude(model)
        spec["llm"]["max_requests"] = 2
        house.start(spec)
        state = house.wait_over()
    assert len(model.requests) == 2
    assert state.status == RunStatus.FAILED
    assert "llm.max_requests of this run, 2, is used up" in (state.error or "")


def test_a_model_that_cannot_be_reached_is_the_runs_error_in_claude_codes_words(
    house: House,
) -> None:
    with scripted_model() as model:
        gone = model
    spec = claude(gone)
    spec["sandbox"]["env"] = {**QUIET, "CLAUDE_CODE_MAX_RETRIES": "0"}
    house.start(spec)
    state = house.wait_over()
    assert state.status == RunStatus.FAILED
    assert state.error
    assert "API Error" in state.error
