"""Messages: frozen pydantic models registered by tag and version."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Right(IntEnum):
    """What a link may ask for. A link's right is the socket it came in by, never a field.

    OBSERVE reads; OPERATE changes and reads; WORK is what a run's process may say to the
    supervisor, and is not a superset of the others.
    """

    OBSERVE = 1
    OPERATE = 2
    WORK = 3

    def allows(self, needed: Right) -> bool:
        """Whether a link with this right may send a message that needs `needed`."""
        return self is needed or (self is Right.OPERATE and needed is Right.OBSERVE)


class CodecError(ValueError):
    """Bytes that are no message of a known type and version."""


class UnknownType(CodecError):
    """No message is registered under this tag and version."""


class Message(BaseModel):
    """Base of everything that travels on the bus.

    A subclass names its tag: `class ListRuns(Message, tag="runs.list", right=Right.OBSERVE)`.
    `right` is what a link needs to send it to a receiver; without one it is a reply, or is sent
    inside a process only, and no link may bring it as a message of its own. `changes` marks a
    command: its receiver stores the reply and answers a repeat with it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_bytes="base64")

    tag: ClassVar[str] = ""
    version: ClassVar[int] = 1
    right: ClassVar[Right | None] = None
    changes: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        tag: str = "",
        version: int = 1,
        right: Right | None = None,
        changes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if not tag:
            return
        known = _registry.get((tag, version))
        if known is not None:
            raise TypeError(
                f"message {tag!r} version {version} is already "
                f"{known.__module__}.{known.__qualname__}"
            )
        cls.tag, cls.version, cls.right, cls.changes = tag, version, right, changes
        _registry[tag, version] = cls

    def to_json(self) -> bytes:
        """The body as it travels: UTF-8 JSON."""
        return self.__pydantic_serializer__.to_json(self)

    @classmethod
    def from_json(cls, body: bytes) -> Self:
        """Read a body. Raises CodecError naming the fields that are wrong."""
        try:
            message: Self = cls.__pydantic_validator__.validate_json(body)
        except ValidationError as error:
            fields = ", ".join(
                f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {problem['msg']}"
                for problem in error.errors(include_url=False, include_input=False)[:5]
            )
            raise CodecError(f"{cls.tag}: {fields}") from None
        except RecursionError:
            raise CodecError(f"{cls.tag}: the body nests too deeply") from None
        return message


_registry: dict[tuple[str, int], type[Message]] = {}


def message_type(tag: str, version: int) -> type[Message]:
    """The registered class. Raises UnknownType, naming the versions that are known."""
    found = _registry.get((tag, version))
    if found is None:
        versions = sorted(v for name, v in _registry if name == tag)
        known = f"; known versions are {versions}" if versions else ""
        raise UnknownType(f"no message {tag[:80]!r} version {version}{known}")
    return found


def registered() -> list[type[Message]]:
    """Every registered message class, by tag and version."""
    return [_registry[key] for key in sorted(_registry)]
