"""One client's session: messages in, answers and work out. Pure: no I/O, no thread, no clock.

Whoever drives it sends the answers, puts the work's question to the sidecar, and hands what
came of it back with `finish`. A session is not thread-safe; its driver guards it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from voidbus.mcp import inbox_resource, tools, versions
from voidbus.mcp.jsonrpc import (
    BUSY,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    Incoming,
    Invalid,
    Notification,
    Request,
    RequestId,
    RpcError,
    error,
    notification,
    result,
)
from voidbus.mcp.tools import Ask
from voidbus.sidecar.client import Reply, SidecarClientError

SERVER_INFO = {"name": "void-mcp", "title": "voidbus messaging", "version": "0.1.0"}

INSTRUCTIONS = (
    "You work beside other agents on the same task. These tools connect you: read what peers "
    "found, share what would help them, and tell the leader what should become of your approach. "
    "The resource void://inbox holds what was sent to you; subscribe to it to be told of more."
)

MAX_RUNNING = 16
"""Requests of one session that may be under way at once."""

LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
"""Severities of log messages, the least first (RFC 5424)."""

_LISTS_KEEP_MS = 3_600_000  # how long a client may keep what does not change while we run

Answer = Reply | SidecarClientError


class Send(NamedTuple):
    """Something to send to the client."""

    body: dict[str, Any]


class Stop(NamedTuple):
    """End the work of this request; its client no longer wants it."""

    id: RequestId


class Work(NamedTuple):
    """A question for the sidecar. `complete` makes the answer's result of what it says; it
    raises RpcError. With `watches`, the inbox is to be watched from the answer's version on."""

    id: RequestId
    ask: Ask
    complete: Callable[[Answer], dict[str, Any] | None]
    watches: bool = False


Effect = Send | Stop | Work


class Session:
    """What one client has told us. `make_key` gives each call of a tool a key of its own."""

    def __init__(self, make_key: Callable[[], str], version: str = versions.ASSUMED) -> None:
        self._make_key = make_key
        self.version = version
        self._level = LEVELS.index("info")
        self._subscribed = False
        self._listening: set[RequestId] = set()
        self._running: set[RequestId] = set()

    # Messages

    def receive(self, message: Incoming) -> list[Effect]:
        """What a message leads to."""
        if isinstance(message, Invalid):
            return [Send(message.answer)]
        if isinstance(message, Notification):
            return self._note(message)
        try:
            return self._begin(message)
        except RpcError as fault:
            return [Send(error(message.id, fault))]

    def finish(self, work: Work, answer: Answer) -> list[dict[str, Any]]:
        """What to send once the sidecar has answered, or could not be asked."""
        self._running.discard(work.id)
        try:
            completed = work.complete(answer)
        except RpcError as fault:
            return [error(work.id, fault)]
        if completed is None:  # it listens now, and is answered when that ends
            acknowledged = {"notifications": {"resourceSubscriptions": [inbox_resource.INBOX_URI]}}
            return [_tagged("notifications/subscriptions/acknowledged", work.id, acknowledged)]
        return [result(work.id, completed)]

    def forget(self, work: Work) -> None:
        """The work was stopped; nothing is said about it."""
        self._running.discard(work.id)

    # What happens by itself

    @property
    def is_watching(self) -> bool:
        """Whether it wants to be told of changes of the inbox."""
        return self._subscribed or bool(self._listening)

    def inbox_changed(self) -> list[dict[str, Any]]:
        """What to send when something new is in the inbox."""
        method, params = "notifications/resources/updated", {"uri": inbox_resource.INBOX_URI}
        told = [notification(method, params)] if self._subscribed else []
        return told + [_tagged(method, listener, params) for listener in self._listening]

    def log(self, level: str, text: str) -> list[dict[str, Any]]:
        """What to send to tell the client of something that it may want to log."""
        # Since 2026-07-28 log messages go to a request that asks for them, and to no session.
        if self.version in versions.STATELESS or LEVELS.index(level) < self._level:
            return []
        params = {"level": level, "logger": "void-mcp", "data": text}
        return [notification("notifications/message", params)]

    def end(self) -> list[dict[str, Any]]:
        """What to send when we stop: whoever listens has its answer."""
        ended = [result(each, versions.stamp(_tag(each), SERVER_INFO)) for each in self._listening]
        self._listening.clear()
        return ended

    # Requests

    def _begin(self, request: Request) -> list[Effect]:
        stateless = versions.stateless_version(request.params)
        if request.id in self._running or request.id in self._listening:
            raise RpcError(INVALID_REQUEST, "a request with this id is under way")
        if stateless is None:
            return self._handle(request, self.version, _HANDSHAKE)
        return self._handle(request, stateless, _STATELESS)

    def _handle(self, request: Request, version: str, methods: dict[str, Any]) -> list[Effect]:
        method = methods.get(request.method)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, f"Method not found: {request.method[:200]}")
        made = method(self, request, version)
        if isinstance(made, Work):
            if len(self._running) + len(self._listening) >= MAX_RUNNING:
                raise RpcError(
                    BUSY,
                    f"{MAX_RUNNING} requests of this session are under way, which is the limit; "
                    "wait until one has ended",
                )
            self._running.add(made.id)
            return [made]
        if version in versions.STATELESS:
            made = versions.stamp(made, SERVER_INFO, lifetime_ms=_LISTS_KEEP_MS)
        return [Send(result(request.id, made))]

    def _note(self, message: Notification) -> list[Effect]:
        if message.method != "notifications/cancelled":
            return []
        wanted = message.params.get("requestId")
        if isinstance(wanted, bool) or not isinstance(wanted, int | str):
            return []
        self._listening.discard(wanted)
        return [Stop(wanted)] if wanted in self._running else []

    def _initialize(self, request: Request, _version: str) -> dict[str, Any]:
        self.version = versions.negotiate(request.params.get("protocolVersion"))
        return {
            "protocolVersion": self.version,
            "capabilities": {"tools": {}, "resources": {"subscribe": True}, "logging": {}},
            "serverInfo": SERVER_INFO,
            "instructions": INSTRUCTIONS,
        }

    def _discover(self, _request: Request, _version: str) -> dict[str, Any]:
        return {
            "supportedVersions": list(versions.SUPPORTED),
            "capabilities": {"tools": {}, "resources": {"subscribe": True}},
            "instructions": INSTRUCTIONS,
        }

    def _ping(self, _request: Request, _version: str) -> dict[str, Any]:
        return {}

    def _set_level(self, request: Request, _version: str) -> dict[str, Any]:
        level = request.params.get("level")
        if level not in LEVELS:
            raise RpcError(INVALID_PARAMS, f"level must be one of {', '.join(LEVELS)}")
        self._level = LEVELS.index(level)
        return {}

    def _list_tools(self, _request: Request, version: str) -> dict[str, Any]:
        structured = versions.has_structure(version)
        return {"tools": [tool.shown(structured=structured) for tool in tools.TOOLS.values()]}

    def _call_tool(self, request: Request, version: str) -> Work | dict[str, Any]:
        name, arguments = request.params.get("name"), request.params.get("arguments")
        if not isinstance(name, str):
            raise RpcError(INVALID_PARAMS, "Missing tool name")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RpcError(INVALID_PARAMS, "a tool's arguments are an object")
        try:
            ask = tools.call(name, arguments, self._make_key())
        except KeyError:
            raise RpcError(INVALID_PARAMS, f"Unknown tool: {name[:200]}") from None
        except tools.BadArguments as wrong:
            return tools.failed(str(wrong))
        structured = versions.has_structure(version)
        return self._work(request, version, ask, lambda a: tools.outcome(a, structured=structured))

    def _list_resources(self, _request: Request, version: str) -> dict[str, Any]:
        return {"resources": [inbox_resource.shown(structured=versions.has_structure(version))]}

    def _list_templates(self, _request: Request, _version: str) -> dict[str, Any]:
        return {"resourceTemplates": []}

    def _read_resource(self, request: Request, version: str) -> Work:
        self._known_uri(request, version)
        return self._work(
            request, version, inbox_resource.READ, inbox_resource.contents, lifetime_ms=0
        )

    def _subscribe(self, request: Request, version: str) -> Work:
        self._known_uri(request, version)

        def complete(answer: Answer) -> dict[str, Any]:
            inbox_resource.version(answer)
            self._subscribed = True
            return {}

        return Work(request.id, inbox_resource.HEADER, complete, watches=True)

    def _unsubscribe(self, request: Request, version: str) -> dict[str, Any]:
        self._known_uri(request, version)
        self._subscribed = False
        return {}

    def _listen(self, request: Request, _version: str) -> Work:
        wanted = request.params.get("notifications")
        uris = wanted.get("resourceSubscriptions") if isinstance(wanted, dict) else None
        if not isinstance(uris, list) or inbox_resource.INBOX_URI not in uris:
            raise RpcError(
                INVALID_PARAMS,
                "nothing that was asked for changes here; listen with "
                f'"resourceSubscriptions": ["{inbox_resource.INBOX_URI}"]',
            )

        def complete(answer: Answer) -> None:
            inbox_resource.version(answer)
            self._listening.add(request.id)

        return Work(request.id, inbox_resource.HEADER, complete, watches=True)

    def _known_uri(self, request: Request, version: str) -> None:
        uri = request.params.get("uri")
        if uri == inbox_resource.INBOX_URI:
            return
        if not isinstance(uri, str):
            raise RpcError(INVALID_PARAMS, "Missing uri")
        # -32002 was the code for it until 2026-07-28 retired that.
        code = INVALID_PARAMS if version in versions.STATELESS else -32002
        raise RpcError(code, "Resource not found", {"uri": uri[:200]})

    def _work(
        self,
        request: Request,
        version: str,
        ask: Ask,
        complete: Callable[[Answer], dict[str, Any]],
        *,
        lifetime_ms: int | None = None,
    ) -> Work:
        if version not in versions.STATELESS:
            return Work(request.id, ask, complete)
        return Work(
            request.id,
            ask,
            lambda a: versions.stamp(complete(a), SERVER_INFO, lifetime_ms=lifetime_ms),
        )


_BOTH = {
    "tools/list": Session._list_tools,
    "tools/call": Session._call_tool,
    "resources/list": Session._list_resources,
    "resources/templates/list": Session._list_templates,
    "resources/read": Session._read_resource,
}
_HANDSHAKE = {
    **_BOTH,
    "initialize": Session._initialize,
    "ping": Session._ping,
    "logging/setLevel": Session._set_level,
    "resources/subscribe": Session._subscribe,
    "resources/unsubscribe": Session._unsubscribe,
}
_STATELESS = {
    **_BOTH,
    "server/discover": Session._discover,
    "subscriptions/listen": Session._listen,
}


def _tag(request_id: RequestId) -> dict[str, Any]:
    return {"_meta": {versions.SUBSCRIPTION_KEY: request_id}}


def _tagged(method: str, request_id: RequestId, params: dict[str, Any]) -> dict[str, Any]:
    return notification(method, {**params, **_tag(request_id)})
