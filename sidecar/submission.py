"""Reads the body of `POST /v1/intents`: bytes from the guest to checked submissions."""

from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from voidbus.sidecar.model import (
    Audience,
    IntentKind,
    IntentSubmission,
    Priority,
    Rejected,
    invalid,
)

_ALLOWED: dict[str, tuple[str, ...]] = {
    "kind": get_args(IntentKind),
    "audience": get_args(Audience),
    "priority": get_args(Priority),
}
_LONGEST_FOUND = 80

MAX_DEPTH = 64
"""Objects and arrays in one another in a payload. What parses at twice that and more (the JSON
parser stops at 200) no longer does inside the messages that carry intents on."""


@dataclass(frozen=True, slots=True)
class Submissions:
    """The intents of one request, in order."""

    items: tuple[IntentSubmission, ...]
    is_batch: bool
    """Whether the body was an array; the answer then is one too."""


def read_submissions(body: bytes) -> Submissions:
    """Parse and check a whole body before any of it is acted on.

    Raises Rejected (400 INVALID_PARAMS) for bytes that are not JSON, and for the first item
    that is not an intent, naming the field, what it held and what it may hold.
    """
    parsed = _parse(body)
    if isinstance(parsed, list):
        items = tuple(_check(item, f"[{index}]") for index, item in enumerate(parsed))
        return Submissions(items, is_batch=True)
    return Submissions((_check(parsed, ""),), is_batch=False)


def _parse(body: bytes) -> Any:
    # from_json bounds nesting (200) and number length (4300 digits), and refuses lone
    # surrogates, which json.loads lets through and which can't be encoded again.
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Rejected(invalid(f"invalid JSON: {error}")) from None


def _check(item: Any, place: str) -> IntentSubmission:
    if not isinstance(item, dict):
        raise Rejected(
            invalid(
                f"invalid intent{place}: expected an object with kind, audience, payload and "
                f"priority, found {_shown(item)}",
                field=place or None,
                found=_shown(item),
            )
        )
    try:
        submission = IntentSubmission.model_validate(item)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], place) from None
    if _is_deeper(submission.payload, MAX_DEPTH):
        raise Rejected(
            invalid(
                f"invalid intent{place}: 'payload' is nested too deeply; "
                f"at most {MAX_DEPTH} levels",
                field=f"{place}.payload" if place else "payload",
            )
        )
    return submission


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and arrays nest more than ``levels`` deep; without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for item in layer if isinstance(item, dict | list)]
        if not layer:
            return False
        layer = [
            below for item in layer for below in (item.values() if isinstance(item, dict) else item)
        ]
    return True


def _refusal(error: ErrorDetails, place: str) -> Rejected:
    name = str(error["loc"][0])
    field = f"{place}.{name}" if place else name
    allowed = _ALLOWED.get(name)
    wanted = f"; allowed: {', '.join(allowed)}" if allowed else ""
    if error["type"] == "missing":
        message = f"invalid intent{place}: '{name}' is missing{wanted}"
        return Rejected(invalid(message, field=field, allowed=allowed))
    found = _shown(error["input"])
    message = f"invalid intent{place}: '{name}' is {found}{wanted}"
    return Rejected(invalid(message, field=field, found=found, allowed=allowed))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if value is None:
        return "null"
    text = repr(value[: _LONGEST_FOUND + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_FOUND else f"{text[:_LONGEST_FOUND]}..."
