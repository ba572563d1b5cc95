"""void-mcp over HTTP: what each request of the streamable HTTP transport is answered with.

https://modelcontextprotocol.io/specification/2025-11-25/basic/transports: a message comes by
POST and is answered in its response; GET opens a stream of what a session is to be told; DELETE
ends a session. Since 2026-07-28 there are no sessions, and POST alone.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from voidbus.mcp import versions
from voidbus.mcp.http_wire import Head, HttpFault, HttpRequest
from voidbus.mcp.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    Body,
    Incoming,
    Invalid,
    Request,
    RpcError,
    decode,
    encode,
    error,
)
from voidbus.mcp.link import Link, new_key
from voidbus.mcp.local_only import check_local
from voidbus.mcp.server import Session, Work
from voidbus.mcp.sessions import Client, Sessions
from voidbus.mcp.watch import Watch
from voidbus.sidecar.client import SidecarClient

PATH = "/mcp"
SESSION_HEADER = "Mcp-Session-Id"

HEADER_MISMATCH = -32020
"""Headers that say otherwise than the body (2026-07-28)."""

CANCELLED = -32800
"""A request that was cancelled, where its response has to be something (from LSP)."""

# Since 2026-07-28 an error's code decides the status.
_STATUS = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    INVALID_PARAMS: 400,
    HEADER_MISMATCH: 400,
    versions.UNSUPPORTED_VERSION: 400,
    METHOD_NOT_FOUND: 404,
}
_NAMES = {"tools/call": "name", "resources/read": "uri"}


Perform = Callable[[Link, Work], list[dict[str, Any]]]


class Respond(NamedTuple):
    """One answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] | None = None
    as_event: bool = False
    """Whether the client takes server-sent events only."""


class Stream(NamedTuple):
    """A stream of what a client is to be told, after `first`; `is_own`: the client is gone with
    it."""

    client: Client
    first: tuple[dict[str, Any], ...] = ()
    is_own: bool = False


class Endpoint:
    """Everything of the transport but sockets. Its methods are called from any thread.

    `perform` is how work is done: it is given a link and its work, and gives what to send. The
    owner of the connection does it, who can end the work when the client has gone.
    """

    def __init__(self, client: SidecarClient) -> None:
        self._client = client
        self._watch = Watch(client)
        self.sessions = Sessions()
        self._lock = threading.Lock()
        self._passing: set[Client] = set()  # those without a session, while they are answered

    def close(self) -> None:
        """End all sessions, what is asked without one, and the watch."""
        self.sessions.close()
        with self._lock:
            passing = list(self._passing)
        for client in passing:
            client.link.cancel_all()
        self._watch.close()

    def answer(self, request: HttpRequest, perform: Perform) -> Respond | Stream:
        """What to answer a request with. Raises HttpFault."""
        head = request.head
        check_local(head.headers)
        if head.path != PATH:
            raise HttpFault(404, f"there is only {PATH} here")
        if head.method == "POST":
            return self._post(request, perform)
        if head.method == "GET":
            if "text/event-stream" not in head.headers.get("accept", "").lower():
                raise HttpFault(406, "GET is for a stream: accept text/event-stream")
            return Stream(self._required(head))
        if head.method == "DELETE":
            self._required(head)
            self.sessions.end(head.headers[SESSION_HEADER.lower()])
            return Respond(200)
        raise HttpFault(405, "POST, GET and DELETE are the methods here")

    def _post(self, request: HttpRequest, perform: Perform) -> Respond | Stream:
        as_event = _wants_events_only(request.head.headers.get("accept", ""))
        body = decode(request.body)
        if len(body.messages) == 1 and not body.is_batch:
            (message,) = body.messages
            if isinstance(message, Invalid):
                return Respond(400, encode(message.answer))
            if isinstance(message, Request) and _is_stateless(request.head, message):
                return self._stateless(request.head, message, perform, as_event)
            if isinstance(message, Request) and message.method == "initialize":
                client = self._new_client(versions.ASSUMED)
                answers, _ = client.link.receive(message)
                headers = {SESSION_HEADER: self.sessions.add(client)}
                return Respond(200, encode(answers[0]), headers, as_event)
        known = self._known(request.head)
        version = _version(request.head)
        if known is not None:
            return self._in_session(known.link, body, perform, as_event)
        with self._passing_client(version) as client:
            return self._in_session(client.link, body, perform, as_event)

    def _in_session(
        self,
        link: Link,
        body: Body,
        perform: Perform,
        as_event: bool,
    ) -> Respond:
        answers: list[dict[str, Any]] = []
        for message in body.messages:
            answers += _answers(link, message, perform)
        if not answers:
            return Respond(202)
        return Respond(200, encode(answers if body.is_batch else answers[0]), as_event=as_event)

    def _stateless(
        self,
        head: Head,
        message: Request,
        perform: Perform,
        as_event: bool,
    ) -> Respond | Stream:
        try:
            _check_headers(head, message)
        except RpcError as fault:
            return _refused(error(message.id, fault))
        client = self._new_client(versions.STATELESS[-1])
        try:
            answers = _answers(client.link, message, perform)
            if client.link.is_watching:
                return Stream(client, tuple(answers), is_own=True)
        except BaseException:
            client.close()
            raise
        client.close()
        (answer,) = answers
        if "error" in answer:
            return _refused(answer)
        return Respond(200, encode(answer), as_event=as_event)

    @contextlib.contextmanager
    def _passing_client(self, version: str) -> Iterator[Client]:
        client = self._new_client(version)
        with self._lock:
            self._passing.add(client)
        try:
            yield client
        finally:
            with self._lock:
                self._passing.discard(client)
            client.close()

    def _new_client(self, version: str) -> Client:
        return Client(lambda send: Link(Session(new_key, version), self._client, self._watch, send))

    def _required(self, head: Head) -> Client:
        """The client of the session a request has to name. Raises HttpFault."""
        client = self._known(head)
        if client is None:
            raise HttpFault(400, f"the header {SESSION_HEADER} is missing; initialize first")
        return client

    def _known(self, head: Head) -> Client | None:
        """The client of the session a request names, if it names one. Raises HttpFault (404)
        where there is no such session."""
        session_id = head.headers.get(SESSION_HEADER.lower())
        if session_id is None:
            return None
        client = self.sessions.get(session_id)
        if client is None:
            raise HttpFault(404, "there is no such session; initialize anew")
        return client


def _answers(link: Link, message: Incoming, perform: Perform) -> list[dict[str, Any]]:
    answers, works = link.receive(message)
    for work in works:
        told = perform(link, work)
        # On a stream a cancelled request is just not answered; a response has to say something.
        answers += told or [error(work.id, RpcError(CANCELLED, "the request was cancelled"))]
    return answers


def _refused(answer: dict[str, Any]) -> Respond:
    return Respond(_STATUS.get(answer["error"]["code"], 200), encode(answer))


def refusal(fault: HttpFault) -> bytes:
    """The body that goes with a refused request."""
    code = INTERNAL_ERROR if fault.status >= 500 else INVALID_REQUEST
    return encode(error(None, RpcError(code, fault.message)))


def _wants_events_only(accept: str) -> bool:
    """Whether a client takes events and no JSON; HttpFault (406) for one that takes neither."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    if not accept.strip() or {"application/json", "application/*", "*/*"} & set(kinds):
        return False
    if "text/event-stream" in kinds or "text/*" in kinds:
        return True
    raise HttpFault(406, "answers are application/json or text/event-stream")


def _version(head: Head) -> str:
    asked = head.headers.get("mcp-protocol-version")
    if asked is None:
        return versions.ASSUMED
    if asked not in versions.SUPPORTED:
        raise HttpFault(400, f"MCP-Protocol-Version is none of {', '.join(versions.SUPPORTED)}")
    return asked


def _is_stateless(head: Head, message: Request) -> bool:
    """Whether a request is of the era without sessions, or at least says so somewhere."""
    if head.headers.get("mcp-protocol-version") in versions.STATELESS:
        return True
    try:
        return versions.stateless_version(message.params) is not None
    except RpcError:
        return True


def _check_headers(head: Head, message: Request) -> None:
    """Raises RpcError where the headers, by which others route, say otherwise than the body."""
    version = versions.stateless_version(message.params)
    params = message.params
    name = params.get(_NAMES.get(message.method, ""))
    pairs = [("MCP-Protocol-Version", version), ("Mcp-Method", message.method)]
    if isinstance(name, str):
        pairs.append(("Mcp-Name", name))
    for header, value in pairs:
        if _decoded(head.headers.get(header.lower())) != value:
            raise RpcError(HEADER_MISMATCH, f"the header {header} differs from the body")


def _decoded(value: str | None) -> str | None:
    """A header's value, which is in base64 where it would not survive otherwise."""
    if value is None or not (value.startswith("=?base64?") and value.endswith("?=")):
        return value
    import binascii

    try:
        return binascii.a2b_base64(value[9:-2].encode("latin-1"), strict_mode=True).decode()
    except ValueError:
        return None
