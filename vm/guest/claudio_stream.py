"""What claudio prints: stream-json, as Claude Code does. Standard library only."""

import hashlib
import json
import sys
import uuid
from pathlib import Path
from typing import Any

TOOLS = ["Bash", "Read", "Write"]
NOISE = (
    b"npm warn deprecated: this is not JSON",
    b'{"type":"assistant","mess',
    b"\xff\xfe\x00",
    b"",
)


class Stream:
    """Prints stream-json: one object a line, flushed at once. Counts tokens as it goes."""

    def __init__(self, prompt: str, model: str) -> None:
        self._seed = hashlib.sha256(prompt.encode("utf-8", "surrogateescape")).digest()
        self.session_id = str(uuid.UUID(bytes=self._seed[:16], version=4))
        self._model = model
        self._serial = 0
        self.input_tokens = 0
        self.output_tokens = 0
        self.tool_calls = 0
        self._prompt_tokens = len(prompt) // 4 + 1

    def system(self, skills: list[str], mcp_servers: list[str]) -> None:
        """The first line: the session and what it has."""
        self._line(
            type="system",
            subtype="init",
            cwd=str(Path.cwd()),
            session_id=self.session_id,
            tools=TOOLS,
            mcp_servers=[{"name": name, "status": "connected"} for name in mcp_servers],
            model=self._model,
            permissionMode="bypassPermissions",
            apiKeySource="none",
            skills=skills,
        )

    def say(self, text: str) -> None:
        """An assistant's line of text."""
        self._assistant({"type": "text", "text": text}, text)

    def tool(self, name: str, arguments: dict[str, Any], result: str, *, failed: bool) -> None:
        """A tool call and its result."""
        self.tool_calls += 1
        use_id = f"toolu_{self._id()}"
        self._assistant(
            {"type": "tool_use", "id": use_id, "name": name, "input": arguments},
            json.dumps(arguments),
        )
        content = {
            "type": "tool_result",
            "tool_use_id": use_id,
            "content": result,
            "is_error": failed,
        }
        self._line(
            type="user",
            message={"role": "user", "content": [content]},
            parent_tool_use_id=None,
            session_id=self.session_id,
        )

    def result(self, text: str, *, turns: int, duration_ms: int, error: str | None) -> None:
        """The last line: how it ended and what it took."""
        outcome: dict[str, Any] = {
            "subtype": "success" if error is None else "error_during_execution",
            "is_error": error is not None,
            "result": text if error is None else error,
        }
        if error is not None:
            outcome["error"] = error
        self._line(
            type="result",
            **outcome,
            duration_ms=duration_ms,
            duration_api_ms=duration_ms * 4 // 5,
            num_turns=turns,
            session_id=self.session_id,
            # Prices of no model in particular: 3 and 15 dollars a million tokens.
            total_cost_usd=round((self.input_tokens * 3 + self.output_tokens * 15) / 1e6, 6),
            usage=self._usage(self.input_tokens, self.output_tokens),
        )

    def noise(self) -> None:
        """Lines that a parser must step over."""
        for line in NOISE:
            self._write(line)

    def _assistant(self, content: dict[str, Any], text: str) -> None:
        spent = (self._prompt_tokens, len(text) // 4 + 1)
        self.input_tokens += spent[0]
        self.output_tokens += spent[1]
        self._line(
            type="assistant",
            message={
                "id": f"msg_{self._id()}",
                "type": "message",
                "role": "assistant",
                "model": self._model,
                "content": [content],
                "stop_reason": None,
                "usage": self._usage(*spent),
            },
            parent_tool_use_id=None,
            session_id=self.session_id,
        )

    def _id(self) -> str:
        self._serial += 1
        return hashlib.sha256(self._seed + self._serial.to_bytes(4, "big")).hexdigest()[:24]

    @staticmethod
    def _usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
        return {
            "input_tokens": input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": output_tokens,
        }

    def _line(self, **event: Any) -> None:
        self._write(json.dumps(event).encode())

    @staticmethod
    def _write(line: bytes) -> None:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
