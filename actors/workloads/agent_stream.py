"""What an agent's program prints, read line by line: what it came to, and what is worth showing.

Agents print what they like: what is not understood is passed over or shown as it is. Every text
that comes out can be written as UTF-8: JSON may spell half of a surrogate pair, which can't.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

TOOL_NAME_LIMIT = 200
# How much of a tool's input is shown (characters); it may be a whole file.
_TOOL_INPUT_LIMIT = 2000
# How much of standard error an error repeats (characters).
_STDERR_SHOWN = 500


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


class AgentStream(ABC):
    """Reads lines, keeps the result, returns what is worth showing. For one program."""

    speaks: ClassVar[str]
    """What a line of it is called, where an error says that none came."""

    def __init__(self) -> None:
        self.result = StreamResult()

    @abstractmethod
    def feed(self, line: bytes) -> list[Said]:
        """One line, without its end."""

    def judge(self, program: str, exit_code: int, stderr: bytes) -> str | None:
        """Once the program has ended by itself: why it failed, or None where it succeeded."""
        result = self.result
        if not result.events:
            said = stderr.decode(errors="replace").strip()[-_STDERR_SHOWN:]
            detail = f"exit code {exit_code}" + (f", stderr: {said}" if said else "")
            return f"{program} returned no {self.speaks} ({detail})"
        if result.is_error:
            return result.error or result.result or "the agent reported an error"
        if exit_code and not result.ended:
            return f"{program} ended with exit code {exit_code}, no result"
        return None


def event_of(line: bytes) -> dict[str, Any] | None:
    """The JSON object with a `type` that a line is, if it is one."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        return None
    return event


def plain(text: str) -> str:
    """A text that can be written as UTF-8."""
    return text.encode(errors="replace").decode()


def shown(tool_input: object) -> str:
    """The beginning of a tool's input, as JSON."""
    try:
        text = json.dumps(tool_input, ensure_ascii=False)
    except (ValueError, RecursionError):  # nested nearly as deep as could be read
        return "?"
    return plain(text[:_TOOL_INPUT_LIMIT])


def number(table: object, key: str) -> int:
    """A count in a JSON object; 0 where there is none."""
    value = table.get(key) if isinstance(table, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        return value
    return 0
