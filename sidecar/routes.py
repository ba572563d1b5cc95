"""The guest-facing HTTP interface of one sidecar: requests to state, state to JSON."""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import BaseModel, TypeAdapter

from voidbus.sidecar.model import (
    InboxView,
    Intent,
    Rejected,
    Rejection,
    SidecarContext,
    SidecarHealth,
    invalid,
    too_large,
)
from voidbus.sidecar.signals import Signals
from voidbus.sidecar.state import Submitted

MAX_REQUEST_BYTES = 65536
"""A request's body, at most."""

_LONGEST_ECHO = 200
_log = logging.getLogger("voidbus.sidecar")
_intent_list = TypeAdapter(list[Intent])


class Guest(Protocol):
    """What the routes may do. Called on the server's event loop; must return at once."""

    def health(self) -> SidecarHealth: ...
    def context(self) -> SidecarContext: ...
    def inbox(self, since: int | None) -> InboxView: ...
    def submit(self, body: bytes, idempotency_key: str | None) -> Submitted: ...


class Routes:
    """Answers every request with JSON, whatever it asks. One request a connection."""

    def __init__(self, guest: Guest, signals: Signals) -> None:
        self._guest = guest
        self._follow = signals
        self._handlers: dict[
            tuple[str, str], Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
        ] = {
            ("GET", "/v1/health"): self._health,
            ("GET", "/v1/context"): self._context,
            ("GET", "/v1/inbox"): self._inbox,
            ("POST", "/v1/intents"): self._intents,
            ("GET", "/v1/signals"): self._signals,
        }

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        response: web.StreamResponse
        try:
            handler = self._handlers.get((request.method, request.path), self._unknown)
            response = await handler(request)
        except Rejected as refused:
            response = _refusal(refused.rejection)
        except Exception:  # noqa: BLE001 - the last resort of a server: answered and logged
            # Ours to mend, not the guest's to read: the traceback goes to the log only.
            _log.exception("sidecar: %s %s failed", request.method, request.path[:_LONGEST_ECHO])
            response = _refusal(
                Rejection(
                    status=500,
                    code="INTERNAL_ERROR",
                    message="the sidecar failed to answer; its log says why",
                    retryable=True,
                )
            )
        response.force_close()
        return response

    async def _health(self, _request: web.BaseRequest) -> web.Response:
        return _json(200, self._guest.health())

    async def _context(self, _request: web.BaseRequest) -> web.Response:
        return _json(200, self._guest.context())

    async def _inbox(self, request: web.BaseRequest) -> web.Response:
        return _json(200, self._guest.inbox(_since(request.query.get("since"))))

    async def _intents(self, request: web.BaseRequest) -> web.Response:
        body = await _read_body(request)
        submitted = self._guest.submit(body, request.headers.get("Idempotency-Key"))
        if submitted.rejection is not None:
            return _refusal(submitted.rejection)
        if submitted.is_batch:
            return _bytes(201, _intent_list.dump_json(list(submitted.intents)))
        return _json(201, submitted.intents[0])

    async def _signals(self, request: web.BaseRequest) -> web.StreamResponse:
        since = _since(request.query.get("since"))
        if _wants_events(request.headers.get("Accept", "")):
            resumed = _since(request.headers.get("Last-Event-ID"))
            return await self._follow.stream(request, since if resumed is None else resumed)
        return await self._follow.poll(request, since, _seconds(request.query.get("timeout")))

    async def _unknown(self, request: web.BaseRequest) -> web.Response:
        path = request.path[:_LONGEST_ECHO].encode("utf-8", "replace").decode()
        message = f"no route for {request.method[:_LONGEST_ECHO]} {path}"
        return _refusal(Rejection(status=404, code="NOT_FOUND", message=message))


def _since(text: str | None) -> int | None:
    """A version, or None for what is no version: that asks for everything."""
    # 20 digits hold any 64-bit version; int() of a longer text would cost without use.
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    return int(text)


def _seconds(text: str | None) -> float | None:
    """A timeout in whole or decimal seconds. Raises Rejected (400) for anything else."""
    if text is None:
        return None
    whole, _, part = text[:21].partition(".")
    if len(text) > 20 or not all(
        digits.isascii() and digits.isdigit() for digits in (whole, part or "0")
    ):
        raise Rejected(
            invalid(
                "invalid timeout: expected seconds, for example 25",
                field="timeout",
                found=repr(text[:_LONGEST_ECHO]),
            )
        )
    return float(text)


def _wants_events(accept: str) -> bool:
    return any(
        part.partition(";")[0].strip().lower() == "text/event-stream" for part in accept.split(",")
    )


async def _read_body(request: web.BaseRequest) -> bytes:
    """The whole body. Raises Rejected: 413 past the limit, 400 when it is framed wrongly."""
    refusal = too_large(f"request body is over the limit of {MAX_REQUEST_BYTES} bytes")
    if (request.content_length or 0) > MAX_REQUEST_BYTES:
        raise Rejected(refusal)
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    body = bytearray()
    try:
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                raise Rejected(refusal)
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise Rejected(invalid(f"the request body can't be read: {error}")) from None
    return bytes(body)


def _json(status: int, model: BaseModel) -> web.Response:
    return _bytes(status, model.model_dump_json().encode())


def _refusal(rejection: Rejection) -> web.Response:
    return _bytes(rejection.status, rejection.model_dump_json(exclude_none=True).encode())


def _bytes(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
