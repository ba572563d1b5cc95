"""JSON-RPC 2.0 (https://www.jsonrpc.org/specification): bytes to messages, answers to bytes.

Records are named tuples here and in the other files of void-mcp, not dataclasses: those load
inspect, which would be a third of the program's start.
"""

import json
from typing import Any, NamedTuple, NoReturn

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
BUSY = -32000
"""Too much is under way; of the codes that are the implementation's."""

MAX_MESSAGE_BYTES = 256 * 1024
"""A message, at most. A tool's arguments are within the 4096 bytes of an intent."""

MAX_BATCH = 32
"""Messages in an array, at most. Arrays were part of MCP up to 2025-03-26."""

_LONGEST_ID = 256  # characters

RequestId = int | str


class RpcError(Exception):
    """An error a request is answered with."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


class Request(NamedTuple):
    """Something that wants an answer."""

    id: RequestId
    method: str
    params: dict[str, Any] = {}  # noqa: RUF012 - nobody changes what was received


class Notification(NamedTuple):
    """Something that wants none. A response counts as one without a name: we ask nothing."""

    method: str
    params: dict[str, Any] = {}  # noqa: RUF012 - nobody changes what was received


class Invalid(NamedTuple):
    """Something that is neither; `answer` is what to say about it."""

    answer: dict[str, Any]


Incoming = Request | Notification | Invalid


class Body(NamedTuple):
    """What came at once: a message, or with `is_batch` the messages of an array."""

    messages: tuple[Incoming, ...]
    is_batch: bool = False


def decode(data: bytes) -> Body:
    """Read whatever bytes arrive; nothing is raised."""
    if len(data) > MAX_MESSAGE_BYTES:
        return _wrong(INVALID_REQUEST, f"the message is over {MAX_MESSAGE_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return _wrong(PARSE_ERROR, f"Parse error: {error}"[:200])
    if not isinstance(value, list):
        return Body((_message(value),))
    if not value or len(value) > MAX_BATCH:
        return _wrong(
            INVALID_REQUEST, f"an array of messages has from 1 to {MAX_BATCH}, not {len(value)}"
        )
    return Body(tuple(_message(item) for item in value), is_batch=True)


def encode(answer: Any) -> bytes:
    """An answer as bytes without a line break."""
    # ASCII: ids and texts may hold lone surrogates, which have no UTF-8.
    return json.dumps(answer, separators=(",", ":")).encode("ascii")


def result(request_id: RequestId, value: dict[str, Any]) -> dict[str, Any]:
    """A request's answer."""
    return {"jsonrpc": "2.0", "id": request_id, "result": value}


def error(request_id: RequestId | None, fault: RpcError) -> dict[str, Any]:
    """A request's answer that says what was wrong. Without an id where there is none to say:
    MCP's schema has it left out, not null."""
    told: dict[str, Any] = {"code": fault.code, "message": fault.message}
    if fault.data is not None:
        told["data"] = fault.data
    head: dict[str, Any] = {"jsonrpc": "2.0"}
    if request_id is not None:
        head["id"] = request_id
    return {**head, "error": told}


def notification(method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Something to tell a client."""
    return {"jsonrpc": "2.0", "method": method, "params": params}


def _message(value: Any) -> Incoming:
    if not isinstance(value, dict):
        return _invalid(None, "a message is an object")
    request_id = value.get("id")
    if not _is_id(request_id):
        return _invalid(None, "an id is a whole number, or a text of 256 characters at most")
    if "method" not in value and ("result" in value or "error" in value):
        return Notification("")
    # "jsonrpc" is not asked for: clients exist that leave it out.
    method, params = value.get("method"), value.get("params")
    if not isinstance(method, str):
        return _invalid(request_id, "a message has a method")
    if params is None:
        params = {}
    if not isinstance(params, dict):
        return _invalid(request_id, "params is an object")
    # An id that is null is no id.
    if request_id is None:
        return Notification(method, params)
    return Request(request_id, method, params)


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_ID
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _invalid(request_id: RequestId | None, why: str) -> Invalid:
    return Invalid(error(request_id, RpcError(INVALID_REQUEST, f"Invalid request: {why}")))


def _wrong(code: int, message: str) -> Body:
    return Body((Invalid(error(None, RpcError(code, message))),))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
