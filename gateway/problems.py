"""What a request that can't be served gets: a code, words, and whether to try again."""

from __future__ import annotations

from enum import StrEnum

from aiohttp import web
from pydantic import BaseModel

from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message


class Code(StrEnum):
    """The codes clients tell errors apart by."""

    INVALID_SPEC = "INVALID_SPEC"
    INVALID_POLICY = "INVALID_POLICY"
    INVALID_PARAMS = "INVALID_PARAMS"
    UNAUTHORIZED = "UNAUTHORIZED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_TERMINAL = "ALREADY_TERMINAL"
    STRUCTURED_OUTPUT_MISSING = "STRUCTURED_OUTPUT_MISSING"
    STRUCTURED_OUTPUT_MALFORMED = "STRUCTURED_OUTPUT_MALFORMED"
    ARTIFACT_NOT_FOUND = "ARTIFACT_NOT_FOUND"
    ARTIFACT_PUBLICATION_INCOMPLETE = "ARTIFACT_PUBLICATION_INCOMPLETE"
    ARTIFACT_STORE_UNAVAILABLE = "ARTIFACT_STORE_UNAVAILABLE"
    RETRIEVAL_TIMEOUT = "RETRIEVAL_TIMEOUT"
    RESOURCE_LIMIT_EXCEEDED = "RESOURCE_LIMIT_EXCEEDED"
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    INTERNAL_ERROR = "INTERNAL_ERROR"


_STATUS = {
    Code.INVALID_SPEC: 400,
    Code.INVALID_POLICY: 400,
    Code.INVALID_PARAMS: 400,
    Code.UNAUTHORIZED: 401,
    Code.NOT_FOUND: 404,
    Code.ALREADY_TERMINAL: 409,
    Code.STRUCTURED_OUTPUT_MISSING: 404,
    Code.STRUCTURED_OUTPUT_MALFORMED: 422,
    Code.ARTIFACT_NOT_FOUND: 404,
    Code.ARTIFACT_PUBLICATION_INCOMPLETE: 409,
    Code.ARTIFACT_STORE_UNAVAILABLE: 503,
    Code.RETRIEVAL_TIMEOUT: 504,
    Code.RESOURCE_LIMIT_EXCEEDED: 429,
    Code.TOO_MANY_REQUESTS: 429,
    Code.INTERNAL_ERROR: 500,
}
_RETRYABLE = frozenset(
    {
        Code.ARTIFACT_PUBLICATION_INCOMPLETE,
        Code.ARTIFACT_STORE_UNAVAILABLE,
        Code.RETRIEVAL_TIMEOUT,
        Code.RESOURCE_LIMIT_EXCEEDED,
        Code.TOO_MANY_REQUESTS,
        Code.INTERNAL_ERROR,
    }
)
# An error repeats what it was given; what was given may be megabytes (characters).
_MESSAGE_LIMIT = 2000


class ErrorBody(BaseModel):
    """The body of every error."""

    code: Code
    message: str
    retryable: bool


class Problem(Exception):
    """Raised by a handler to answer with an error. `status` is the code's unless another fits
    better."""

    def __init__(self, code: Code, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status or _STATUS[code]

    def response(self) -> web.Response:
        body = ErrorBody(
            code=self.code,
            message=str(self)[:_MESSAGE_LIMIT],
            retryable=self.code in _RETRYABLE,
        )
        return web.json_response(body.model_dump(), status=self.status)


def problem_of(fault: Message) -> Problem:
    """What a question's fault means for the client who asked."""
    if not isinstance(fault, Fault):
        return Problem(Code.INTERNAL_ERROR, f"unexpected answer {fault.tag}")
    match fault.reason:
        case FaultReason.NO_SUCH_ACTOR | FaultReason.NO_SUCH_NODE:
            return Problem(Code.NOT_FOUND, fault.detail)
        case FaultReason.INVALID:
            return Problem(Code.INVALID_PARAMS, fault.detail)
        case FaultReason.OVERLOADED | FaultReason.MAILBOX_FULL:
            return Problem(Code.RESOURCE_LIMIT_EXCEEDED, fault.detail)
        case FaultReason.EXPIRED:
            return Problem(Code.RETRIEVAL_TIMEOUT, fault.detail)
        case FaultReason.REFUSED:
            return Problem(Code.INTERNAL_ERROR, fault.detail, 503)
        case _:
            return Problem(Code.INTERNAL_ERROR, fault.detail)
