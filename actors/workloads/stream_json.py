"""What Claude Code prints with `--output-format stream-json`, one JSON object a line.

Unknown objects and lines that are no JSON are passed over: agents print what they like. Every
text that comes out can be written as UTF-8: JSON may spell half of a surrogate pair, which can't.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_TOOL_NAME_LIMIT = 200
# How much of a tool's input is shown (characters); it may be a whole file.
_TOOL_INPUT_LIMIT = 2000


@dataclass
class StreamResult:
    """What the stream said so far."""

    events: int = 0
    result: str = ""
    is_error: bool = False
    error: str = ""
    ended: bool = False
    total_cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    num_turns: int = 0


@dataclass(frozen=True)
class Said:
    """One thing worth showing: the agent's words, a tool it uses, or a line that is no JSON."""

    kind: str  # text, tool, raw
    text: str
    tool_input: str = ""


class StreamParser:
    """Reads lines, keeps the result, returns what is worth showing."""

    def __init__(self) -> None:
        self.result = StreamResult()
        self._summed_input = 0
        self._summed_output = 0

    def feed(self, line: bytes) -> list[Said]:
        if not line.strip():
            return []
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
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
        self._summed_input += _number(message.get("usage"), "input_tokens")
        self._summed_output += _number(message.get("usage"), "output_tokens")
        self.result.input_tokens = self._summed_input
        self.result.output_tokens = self._summed_output
        content = message.get("content")
        said = []
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict):
                continue
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                said.append(Said("text", _plain(part["text"])))
            elif part.get("type") == "tool_use" and isinstance(part.get("name"), str):
                name = _plain(part["name"])[:_TOOL_NAME_LIMIT]
                said.append(Said("tool", name, _shown(part.get("input"))))
        return said

    def _result(self, event: dict[str, Any]) -> None:
        result = self.result
        result.ended = True
        text = event.get("result")
        result.result = _plain(text) if isinstance(text, str) else ""
        result.is_error = event.get("is_error") is True
        error = event.get("error")
        result.error = _plain(error) if isinstance(error, str) else ""
        cost = event.get("total_cost_usd")
        if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 1e9:
            result.total_cost_usd = float(cost)
        result.num_turns = _number(event, "num_turns")
        if isinstance(event.get("usage"), dict):
            result.input_tokens = _number(event["usage"], "input_tokens")
            result.output_tokens = _number(event["usage"], "output_tokens")


def _plain(text: str) -> str:
    return text.encode(errors="replace").decode()


def _shown(tool_input: object) -> str:
    try:
        text = json.dumps(tool_input, ensure_ascii=False)
    except (ValueError, RecursionError):  # nested nearly as deep as could be read
        return "?"
    return _plain(text[:_TOOL_INPUT_LIMIT])


def _number(table: object, key: str) -> int:
    value = table.get(key) if isinstance(table, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    return 0
