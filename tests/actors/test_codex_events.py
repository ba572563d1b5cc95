"""What Codex prints: its events, unknown ones, and bytes of any kind."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from voidbus.actors.workloads.agent_stream import Said
from voidbus.actors.workloads.codex_events import CodexEvents
from voidbus.actors.workloads.conductor import LineSplitter


def feed(*events: Any) -> tuple[CodexEvents, list[Said]]:
    parser = CodexEvents()
    said = [item for event in events for item in parser.feed(json.dumps(event).encode())]
    return parser, said


def done(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": "item.completed", "item": {"id": "item_0", "type": kind, **fields}}


TURN = {"type": "turn.completed", "usage": {"input_tokens": 9, "output_tokens": 4}}


def test_the_last_message_is_the_result_and_the_last_turn_has_the_tokens() -> None:
    parser, said = feed(
        {"type": "thread.started", "thread_id": "t"},
        {"type": "turn.started"},
        done("agent_message", text="Looking."),
        TURN,
        done("agent_message", text="Done."),
        {**TURN, "usage": {"input_tokens": 20, "cached_input_tokens": 3, "output_tokens": 6}},
    )
    assert said == [Said("text", "Looking."), Said("text", "Done.")]
    result = parser.result
    assert (result.result, result.ended, result.num_turns) == ("Done.", True, 2)
    assert (result.input_tokens, result.output_tokens) == (20, 6)
    assert parser.judge("codex", 0, b"") is None


def test_deeds_are_tool_calls_once_they_are_done() -> None:
    started = {"type": "item.started", "item": {"type": "command_execution", "command": "ls"}}
    _, said = feed(
        started,
        done("command_execution", command="ls", aggregated_output="a" * 9000, exit_code=0),
        done("file_change", changes=[{"path": "a.py", "kind": "add"}], status="completed"),
        done("mcp_tool_call", server="void-mcp", tool="read_peer_messages", arguments={"since": 1}),
        done("web_search", query="q"),
        done("reasoning", text="Hm."),
    )
    assert said == [
        Said("tool", "command_execution", '{"command": "ls"}'),
        Said("tool", "file_change", '{"changes": [{"path": "a.py", "kind": "add"}]}'),
        Said("tool", "mcp__void-mcp__read_peer_messages", '{"since": 1}'),
        Said("tool", "web_search", '{"query": "q"}'),
        Said("text", "Hm."),
    ]


def test_a_failed_turn_is_an_error_in_its_own_words() -> None:
    parser, _ = feed(
        done("agent_message", text="Trying."),
        {"type": "error", "message": "reconnecting"},
        {"type": "turn.failed", "error": {"message": "overloaded"}},
    )
    assert parser.result.is_error
    assert parser.result.result == "overloaded"
    assert parser.judge("codex", 1, b"") == "overloaded"


def test_an_error_that_codex_gets_over_counts_for_nothing() -> None:
    parser, said = feed({"type": "error", "message": "reconnecting"}, TURN)
    assert said == []
    assert parser.judge("codex", 0, b"") is None


def test_an_exit_code_is_an_error_whatever_was_said() -> None:
    parser, _ = feed(done("agent_message", text="Done."), TURN)
    assert parser.judge("codex", 2, b"") == "codex ended with exit code 2"
    assert parser.result.is_error


def test_nothing_but_garbage_is_a_failure_that_shows_stderr() -> None:
    parser, said = feed("x", [], {"no": "type"}, {"type": "item.novel"})
    assert [item.kind for item in said] == ["raw", "raw", "raw"]
    error = parser.judge("codex", 127, b"codex: not found\n")
    assert error == "codex returned no JSON events (exit code 127, stderr: codex: not found)"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(), inside, max_size=3),
    max_leaves=8,
)
kinds = st.sampled_from(
    ["agent_message", "command_execution", "file_change", "mcp_tool_call", "reasoning", "new"]
)
NAMES = ("text", "message", "command", "changes", "server", "tool", "arguments")
items = st.fixed_dictionaries(
    {"type": kinds | values},
    optional=dict.fromkeys(
        ("text", "message", "command", "changes", "server", "tool", "arguments"), values
    ),
)
types = st.sampled_from(
    ["thread.started", "item.completed", "turn.completed", "turn.failed", "error", "new"]
)
events = st.fixed_dictionaries(
    {"type": types | values}, optional={"item": items | values, "usage": values, "error": values}
)
lines = events.map(lambda event: json.dumps(event).encode() + b"\n") | st.binary(max_size=40)


@settings(max_examples=150, deadline=None)
@given(stream=st.lists(lines, max_size=12).map(b"".join), cuts=st.lists(st.integers(1, 60)))
def test_any_bytes_are_read_without_an_error_and_come_out_as_utf8(
    stream: bytes, cuts: list[int]
) -> None:
    parser, splitter = CodexEvents(), LineSplitter(200)
    said: list[Said] = []
    for size in [*cuts, len(stream)]:
        for line in splitter.feed(stream[:size]):
            said += parser.feed(line)
        stream = stream[size:]
    for line in splitter.flush():
        said += parser.feed(line)
    for item in said:
        item.text.encode()
        item.tool_input.encode()
        assert len(item.tool_input) <= 2000
    parser.result.result.encode()
    (parser.judge("codex", 1, b"\xff") or "").encode()
    assert 0 <= parser.result.input_tokens < 2**60


def test_nesting_as_deep_as_can_be_read_is_no_harm() -> None:
    parser = CodexEvents()
    deep = "[" * 900 + "]" * 900
    for kind in ("mcp_tool_call", "web_search", "agent_message"):
        item = f'{{"type":"{kind}","server":{deep},"tool":{deep},"text":{deep}}}'
        parser.feed(f'{{"type":"item.completed","item":{item}}}'.encode())
    assert parser.result.events <= 3
