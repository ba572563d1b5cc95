"""Messages that tell a guest what its programs get and must keep to."""

from __future__ import annotations

from typing import Any, NamedTuple

from .bodies import decode_body, encode_body
from .fields import number, optional_text, pairs, texts
from .frames import ProtocolError
from .limits import Limits


class Configure(NamedTuple):
    """What programs find and must keep to. ``env`` is under that of each request; ``allowed``
    None allows every program; ``limits`` None leaves the protocol's. ``seed`` is mixed into
    the kernel's random numbers; ``clock`` is the time in seconds since 1970, or None."""

    env: tuple[tuple[str, str], ...] = ()
    allowed: tuple[str, ...] | None = None
    limits: Limits | None = None
    seed: bytes = b""
    clock: float | None = None


class Configured(NamedTuple):
    """Answer to Configure: what went wrong since the machine booted, or in ``error`` why it is
    not configured."""

    warnings: tuple[str, ...] = ()
    error: str | None = None


MAX_SEED = 4096
"""Most bytes of a seed."""

MAX_CLOCK = 2.0**33
"""The latest time taken, in seconds since 1970: the year 2242."""


def encode_configure(message: Configure) -> bytes:
    values: dict[str, Any] = message._asdict()
    values["limits"] = None if message.limits is None else message.limits._asdict()
    values["seed"] = message.seed.hex()
    return encode_body(values)


def decode_configure(body: bytes) -> Configure:
    values = decode_body(body)[0]
    limits = values.get("limits")
    if limits is not None and not isinstance(limits, dict):
        raise ProtocolError("field 'limits' is not an object")
    return Configure(
        pairs(values, "env"),
        None if values.get("allowed") is None else texts(values, "allowed"),
        None if limits is None else decode_limits(limits),
        _seed(values),
        _clock(values),
    )


def decode_limits(values: dict[str, Any]) -> Limits:
    """Limits out of an object; one that is missing or null has the protocol's value."""
    return Limits(
        *(
            default if values.get(name) is None else number(values, name, low=1)
            for name, default in Limits()._asdict().items()
        )
    )


def _seed(values: dict[str, Any]) -> bytes:
    text = optional_text(values, "seed") or ""
    try:
        seed = bytes.fromhex(text)
    except ValueError:
        raise ProtocolError("field 'seed' is not hexadecimal") from None
    if len(seed) > MAX_SEED:
        raise ProtocolError("field 'seed' is too long")
    return seed


def _clock(values: dict[str, Any]) -> float | None:
    value = values.get("clock")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProtocolError("field 'clock' is not a number")
    if not 0 <= value < MAX_CLOCK:
        raise ProtocolError("field 'clock' is out of range")
    return float(value)


def encode_configured(message: Configured) -> bytes:
    return encode_body(message._asdict())


def decode_configured(body: bytes) -> Configured:
    values = decode_body(body)[0]
    return Configured(texts(values, "warnings"), optional_text(values, "error"))
