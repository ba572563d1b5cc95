"""What `codex exec --json` prints, one JSON object a line."""

from __future__ import annotations

from typing import Any, ClassVar

from voidbus.actors.workloads.agent_stream import (
    TOOL_NAME_LIMIT,
    AgentStream,
    Said,
    event_of,
    number,
    plain,
    shown,
)

_KNOWN = frozenset(
    {
        "thread.started",
        "turn.started",
        "turn.completed",
        "turn.failed",
        "item.started",
        "item.updated",
        "item.completed",
        "error",
    }
)
# Items that are words and not deeds: shown, and no tool calls.
_WORDS = ("reasoning", "error")


class CodexEvents(AgentStream):
    """Unknown objects and lines that are no JSON are passed over. The last message is the result;
    `error` is what Codex tries again by itself, and counts for nothing."""

    speaks: ClassVar[str] = "JSON events"

    def feed(self, line: bytes) -> list[Said]:
        if not line.strip():
            return []
        event = event_of(line)
        if event is None:
            return [Said("raw", line.decode(errors="replace"))]
        result = self.result
        if event["type"] in _KNOWN:
            result.events += 1
        match event["type"]:
            case "item.completed":
                return self._item(event.get("item"))
            case "turn.completed":
                result.ended = True
                result.num_turns += 1
                # Codex counts from the thread's start: the last has them all.
                result.input_tokens = number(event.get("usage"), "input_tokens")
                result.output_tokens = number(event.get("usage"), "output_tokens")
            case "turn.failed":
                result.ended = result.is_error = True
                result.error = result.result = _message(event.get("error"))
        return []

    def judge(self, program: str, exit_code: int, stderr: bytes) -> str | None:
        error = super().judge(program, exit_code, stderr)
        if error is None and exit_code:
            self.result.is_error = True
            return f"{program} ended with exit code {exit_code}"
        return error

    def _item(self, item: object) -> list[Said]:
        if not isinstance(item, dict):
            return []
        kind = item.get("type")
        if not isinstance(kind, str):
            return []
        text = item.get("text", item.get("message"))
        if kind == "agent_message":
            if not isinstance(text, str):
                return []
            self.result.result = plain(text)
            return [Said("text", self.result.result)]
        if kind in _WORDS:
            return [Said("text", plain(text))] if isinstance(text, str) else []
        return [Said("tool", _tool(kind, item), shown(_input(kind, item)))]


def _tool(kind: str, item: dict[str, Any]) -> str:
    """A tool's name; those of MCP servers as Claude Code spells them."""
    if kind == "mcp_tool_call":
        server, tool = item.get("server"), item.get("tool")
        if isinstance(server, str) and isinstance(tool, str):
            kind = f"mcp__{server}__{tool}"
    return plain(kind)[:TOOL_NAME_LIMIT]


def _input(kind: str, item: dict[str, Any]) -> object:
    """What the tool was given, without what came of it."""
    if kind == "command_execution":
        return {"command": item.get("command")}
    if kind == "file_change":
        return {"changes": item.get("changes")}
    if kind == "mcp_tool_call":
        return item.get("arguments")
    return {name: value for name, value in item.items() if name not in ("id", "type", "status")}


def _message(error: object) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return plain(text) if isinstance(text, str) and text else "the turn failed"
