"""A model that follows a script, without a model and a key: endpoints of two APIs.

`/v1/messages` is Anthropic's, for Claude Code; `/responses` is OpenAI's, for Codex.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOOLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("read_peer_messages", {}),
    ("broadcast_observation", {"summary_text": "the workspace is empty"}),
    ("recommend_to_leader", {"summary_text": "begin with the tests", "disposition": "promote"}),
)
"""What it wants called, one after another, where it is offered: a tool's name and its input."""

_SEARCH = "ToolSearch"
LAST_WORDS = "All told."
USAGE = (10, 5)
"""Tokens it says an answer took: in, out."""


class ScriptedModel:
    """Answers each request by the conversation in it. `requests` are (path, headers, body)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def offered(self) -> set[str]:
        """The names of all tools of MCP servers that any request offered or announced."""
        bodies = [body for _, _, body in self.requests]
        tools = {str(tool["name"]) for body in bodies for tool in body.get("tools") or []}
        return tools.union(*(announced(body) for body in bodies))

    @property
    def results(self) -> list[str]:
        """What the tools answered, as the last request has it."""
        if not self.requests:
            return []
        return [_text(part) for part in _parts(self.requests[-1][2], "tool_result")]


@contextmanager
def scripted_model() -> Iterator[ScriptedModel]:
    """One on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    model = ScriptedModel(f"http://127.0.0.1:{server.server_address[1]}")
    _Handler.models[server.server_address[1]] = model
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield model
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    models: dict[int, ScriptedModel] = {}  # noqa: RUF012 - by port, of all servers

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        return

    def do_HEAD(self) -> None:
        self._answer(b"", "text/plain")

    def do_GET(self) -> None:
        self._answer(b"{}", "application/json")

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = json.loads(data or b"{}")
        path = self.path.partition("?")[0]
        if path == "/responses":
            self._ask(path, body)
            self._answer(_stream(_responses(body)), "text/event-stream")
            return
        if path != "/v1/messages":
            self._answer(b'{"input_tokens": 1}', "application/json")
            return
        self._ask(path, body)
        message = _message(body)
        if body.get("stream"):
            self._answer(_events(message), "text/event-stream")
        else:
            self._answer(json.dumps(message).encode(), "application/json")

    def _ask(self, path: str, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.models[self.server.server_address[1]].requests.append((path, headers, body))  # type: ignore[index]

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _message(body: dict[str, Any]) -> dict[str, Any]:
    """The next tool call of the script, or the end of it."""
    called = [str(part["name"]) for part in _parts(body, "tool_use")]
    content = _next_call(body, called) or {"type": "text", "text": LAST_WORDS}
    return {
        "id": f"msg_{len(called)}",
        "type": "message",
        "role": "assistant",
        "model": body.get("model"),
        "content": [content],
        "stop_reason": "tool_use" if content["type"] == "tool_use" else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": USAGE[0], "output_tokens": USAGE[1]},
    }


def _next_call(body: dict[str, Any], called: list[str]) -> dict[str, Any] | None:
    loaded = {str(tool["name"]) for tool in body.get("tools") or []}
    names = sorted(loaded | announced(body))
    script = [
        (name, given) for tool, given in TOOLS for name in names if name.endswith(f"__{tool}")
    ]
    left = [(name, given) for name, given in script if name not in called]
    if not left:
        return None
    name, given = left[0]
    if _SEARCH in loaded and name not in loaded and _SEARCH not in called:
        # The tools of MCP servers may have to be loaded before they can be called.
        name, given = _SEARCH, {"query": "select:" + ",".join(each for each, _ in script)}
    return {"type": "tool_use", "id": f"toolu_{len(called) + 1}", "name": name, "input": given}


def announced(body: dict[str, Any]) -> set[str]:
    """The tools of MCP servers that a request names anywhere."""
    return set(re.findall(r"mcp__[\w-]+?__\w+", json.dumps(body.get("messages") or [])))


def _events(message: dict[str, Any]) -> bytes:
    """The message as server-sent events."""
    (content,) = message["content"]
    if content["type"] == "text":
        empty: dict[str, Any] = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": content["text"]}
    else:
        empty = {**content, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(content["input"])}
    usage = {"input_tokens": USAGE[0], "output_tokens": 1}
    begun = {**message, "content": [], "stop_reason": None, "usage": usage}
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": empty},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": USAGE[1]}},
        {"type": "message_stop"},
    ]
    return _stream(events)


def _responses(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The script for Codex, which has its tools called by a program in its own sandbox."""
    items = body.get("input") or []
    if any(item.get("type") == "custom_tool_call_output" for item in items):
        words = [{"type": "output_text", "text": LAST_WORDS}]
        item = {"type": "message", "role": "assistant", "id": "m1", "content": words}
    else:
        calls = (
            f"text(await tools.mcp__void_mcp__{t}({json.dumps(given)}));" for t, given in TOOLS
        )
        item = {
            "type": "custom_tool_call",
            "id": "t1",
            "call_id": "c1",
            "name": "exec",
            "input": "\n".join(calls),
        }
    usage = {
        "input_tokens": USAGE[0],
        "input_tokens_details": None,
        "output_tokens": USAGE[1],
        "output_tokens_details": None,
        "total_tokens": sum(USAGE),
    }
    return [
        {"type": "response.created", "response": {"id": "r1"}},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"id": "r1", "usage": usage}},
    ]


def _stream(events: list[dict[str, Any]]) -> bytes:
    texts = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return "".join(texts).encode()


def _parts(body: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    messages = body.get("messages") or []
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part for content in contents for part in content if part.get("type") == kind]


def _text(part: dict[str, Any]) -> str:
    content = part.get("content")
    if isinstance(content, list):
        return "".join(str(each.get("text", "")) for each in content)
    return str(content)
