"""What Claude Code prints with `--output-format stream-json`, one JSON object a line."""

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


class StreamParser(AgentStream):
    """Unknown objects and lines that are no JSON are passed over."""

    speaks: ClassVar[str] = "stream-json events"

    def __init__(self) -> None:
        super().__init__()
        self._summed_input = 0
        self._summed_output = 0

    def feed(self, line: bytes) -> list[Said]:
        if not line.strip():
            return []
        event = event_of(line)
        if event is None:
            return [Said("raw", line.decode(errors="replace"))]
        match event["type"]:
            case "assistant":
                self.result.events += 1
                return self._assistant(event)
            case "result":
                self.result.events += 1
                self._result(event)
            case "system" | "user":
                self.result.events += 1
        return []

    def _assistant(self, event: dict[str, Any]) -> list[Said]:
        message = event.get("message")
        if not isinstance(message, dict):
            return []
        self._summed_input += number(message.get("usage"), "input_tokens")
        self._summed_output += number(message.get("usage"), "output_tokens")
        self.result.input_tokens = self._summed_input
        self.result.output_tokens = self._summed_output
        content = message.get("content")
        said = []
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict):
                continue
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                said.append(Said("text", plain(part["text"])))
            elif part.get("type") == "tool_use" and isinstance(part.get("name"), str):
                name = plain(part["name"])[:TOOL_NAME_LIMIT]
                said.append(Said("tool", name, shown(part.get("input"))))
        return said

    def _result(self, event: dict[str, Any]) -> None:
        result = self.result
        result.ended = True
        text = event.get("result")
        result.result = plain(text) if isinstance(text, str) else ""
        result.is_error = event.get("is_error") is True
        error = event.get("error")
        result.error = plain(error) if isinstance(error, str) else ""
        cost = event.get("total_cost_usd")
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 1e9:
            result.total_cost_usd = float(cost)
        result.num_turns = number(event, "num_turns")
        if isinstance(event.get("usage"), dict):
            result.input_tokens = number(event["usage"], "input_tokens")
            result.output_tokens = number(event["usage"], "output_tokens")
