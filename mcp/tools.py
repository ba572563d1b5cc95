"""The four tools: what a model is told of them, and what each asks the sidecar."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from voidbus.sidecar.client import Reply, SidecarClientError

_PRIORITIES = ("high", "normal", "low")
_DISPOSITIONS = ("promote", "refine", "reject")
_BIGGEST_VERSION = 2**64 - 1


class BadArguments(Exception):
    """A tool's arguments are not what its schema says; the text is for the model."""


class Ask(NamedTuple):
    """One request to the sidecar."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}  # noqa: RUF012 - nobody changes it


class Tool(NamedTuple):
    """A tool as `tools/list` shows it, and the request its arguments become."""

    name: str
    title: str
    description: str
    properties: dict[str, Any]
    required: tuple[str, ...]
    output: dict[str, Any]
    changes: bool
    ask: Callable[[dict[str, Any], str], Ask]

    def shown(self, *, structured: bool) -> dict[str, Any]:
        """Its row of `tools/list`; `structured`: with title and output schema (2025-06-18)."""
        schema: dict[str, Any] = {"type": "object", "properties": self.properties}
        if self.required:
            schema["required"] = list(self.required)
        row = {
            "name": self.name,
            "description": self.description,
            "inputSchema": schema,
            "annotations": {
                "title": self.title,
                "readOnlyHint": not self.changes,
                # What is sent is added to what others read, and takes nothing away; and the
                # same observation sent again is recognised.
                "destructiveHint": False,
                "idempotentHint": True,
                "openWorldHint": False,
            },
        }
        if structured:
            row |= {"title": self.title, "outputSchema": self.output}
        return row


def call(name: str, arguments: dict[str, Any], key: str) -> Ask:
    """What a call asks the sidecar; `key` is the call's own, against sending it twice.

    Raises KeyError for a tool there is not, and BadArguments.
    """
    tool = TOOLS[name]
    for required in tool.required:
        if required not in arguments:
            raise BadArguments(f"{name} needs {required!r}")
    return tool.ask(arguments, key)


def outcome(answer: Reply | SidecarClientError, *, structured: bool) -> dict[str, Any]:
    """The result of a call: the sidecar's JSON as it is, or an error for the model to read."""
    if isinstance(answer, SidecarClientError):
        return failed(str(answer))
    text = answer.body.decode("utf-8", "replace")
    if answer.status >= 400:
        return failed(_refusal(answer.status, text))
    result: dict[str, Any] = {"content": [{"type": "text", "text": text}]}
    if structured:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return failed("the sidecar's answer is no JSON")
        if not isinstance(value, dict):
            return failed("the sidecar's answer is no object")
        result["structuredContent"] = value
    return result


def failed(why: str) -> dict[str, Any]:
    """The result of a call that failed."""
    return {"content": [{"type": "text", "text": f"Error: {why}"}], "isError": True}


def _refusal(status: int, text: str) -> str:
    try:
        told = json.loads(text)
        return f"{told['message']} ({told['code']}, HTTP {status})"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"HTTP {status}: {text[:500]}"


def _context(_arguments: dict[str, Any], _key: str) -> Ask:
    return Ask("GET", "/v1/context")


def _messages(arguments: dict[str, Any], _key: str) -> Ask:
    since = arguments.get("since")
    if since is None:
        return Ask("GET", "/v1/inbox")
    # A float that is a whole number is an integer to JSON Schema.
    if isinstance(since, float) and since.is_integer():
        since = int(since)
    if isinstance(since, bool) or not isinstance(since, int) or not 0 <= since <= _BIGGEST_VERSION:
        raise BadArguments(f"since must be a version, a whole number from 0, not {_short(since)}")
    return Ask("GET", f"/v1/inbox?since={since}")


def _observation(arguments: dict[str, Any], key: str) -> Ask:
    return _intent("signal", "broadcast", {"summary_text": _summary(arguments)}, arguments, key)


def _recommendation(arguments: dict[str, Any], key: str) -> Ask:
    payload = {"summary_text": _summary(arguments)}
    disposition = _choice(arguments, "disposition", _DISPOSITIONS, "promote")
    if "disposition" in arguments:
        # Of an evaluation it is all that tells refine from reject.
        payload["disposition"] = disposition
    kind = "proposal" if disposition == "promote" else "evaluation"
    return _intent(kind, "leader", payload, arguments, key)


def _intent(
    kind: str, audience: str, payload: dict[str, str], arguments: dict[str, Any], key: str
) -> Ask:
    intent = {
        "kind": kind,
        "audience": audience,
        "payload": payload,
        "priority": _choice(arguments, "priority", _PRIORITIES, "normal"),
    }
    body = json.dumps(intent, ensure_ascii=False).encode("utf-8", "replace")
    return Ask("POST", "/v1/intents", body, {"Idempotency-Key": key})


def _summary(arguments: dict[str, Any]) -> str:
    text = arguments["summary_text"]
    if not isinstance(text, str) or not text.strip():
        raise BadArguments("summary_text must be a text that is not empty")
    return text


def _choice(arguments: dict[str, Any], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = arguments.get(name, default)
    if value is None:
        return default
    if value not in allowed:
        raise BadArguments(f"{name} must be one of {', '.join(allowed)}, not {_short(value)}")
    return str(value)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}
_PRIORITY = {
    "type": "string",
    "enum": list(_PRIORITIES),
    "description": "How urgently others should look at it. Defaults to normal.",
}
_INTENT = _object(
    intent_id=_TEXT, from_candidate_id=_TEXT, iteration=_NUMBER, kind=_TEXT, audience=_TEXT,
    payload={}, priority=_TEXT, ttl_iterations=_NUMBER,
)  # fmt: skip
_ENTRY = _object(message_id=_TEXT, from_candidate_id=_TEXT, kind=_TEXT, payload={})
INBOX = _object(
    version=_NUMBER, execution_id=_TEXT, candidate_id=_TEXT, iteration=_NUMBER,
    entries={"type": "array", "items": _ENTRY},
)  # fmt: skip
_CONTEXT = _object(
    execution_id=_TEXT, candidate_id=_TEXT, iteration=_NUMBER, role=_TEXT,
    peers={"type": "array", "items": _TEXT}, sidecar_version=_TEXT,
)  # fmt: skip

_LIMIT = "You have three messages in each iteration, broadcasts and recommendations together."

TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "read_shared_context",
            "Read shared context",
            "Find out who you are among the agents working on this task, and where the work "
            "stands: your candidate_id, the execution_id all of you share, your role, your peers, "
            "and the iteration. Call it once when you begin, and again when you need to know "
            "whether a new iteration has begun.",
            {},
            (),
            _CONTEXT,
            changes=False,
            ask=_context,
        ),
        Tool(
            "read_peer_messages",
            "Read peer messages",
            "Read what other agents and the leader have sent you: findings, proposals and "
            "evaluations, each with its sender and payload. Call it before you decide on an "
            "approach and between larger steps. The answer's version is what to pass as since "
            "next time, to be given only what is new.",
            {
                "since": {
                    "type": "integer",
                    "minimum": 0,
                    "description": "Only messages that came after this version of the inbox, "
                    "which is the version of an earlier answer. Leave it out to read all.",
                }
            },
            (),
            INBOX,
            changes=False,
            ask=_messages,
        ),
        Tool(
            "broadcast_observation",
            "Broadcast an observation",
            "Tell every other agent something you have found that would help them: a result, a "
            "pitfall, a measurement, a fact about the code. One concise and complete statement; "
            f"they don't see your work or your conversation. {_LIMIT}",
            {
                "summary_text": {
                    "type": "string",
                    "description": "The observation, in a few sentences that stand by themselves "
                    "(at most about 4000 bytes).",
                },
                "priority": _PRIORITY,
            },
            ("summary_text",),
            _INTENT,
            changes=True,
            ask=_observation,
        ),
        Tool(
            "recommend_to_leader",
            "Recommend to the leader",
            "Tell the leader what should become of your approach: promote it because it works, "
            "refine it because it needs more work, or reject it because it leads nowhere. Say why, "
            "with the evidence. Only the leader sees it. Do this when you have reached a "
            f"conclusion, and before you end. {_LIMIT}",
            {
                "summary_text": {
                    "type": "string",
                    "description": "The recommendation and its reasons, in a few sentences that "
                    "stand by themselves (at most about 4000 bytes).",
                },
                "disposition": {
                    "type": "string",
                    "enum": list(_DISPOSITIONS),
                    "description": "What should become of the approach. Defaults to promote.",
                },
                "priority": _PRIORITY,
            },
            ("summary_text",),
            _INTENT,
            changes=True,
            ask=_recommendation,
        ),
    )
}  # fmt: skip
