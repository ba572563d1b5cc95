"""Thespian's actor in a process of its own, asked through its multi-process queue base."""

from __future__ import annotations

from typing import Any, Self

from thespian.actors import Actor, ActorSystem


class EchoActor(Actor):  # type: ignore[misc]  # thespian has no types
    def receiveMessage(self, message: Any, sender: Any) -> None:  # noqa: N802 - thespian's name
        if isinstance(message, str):
            self.send(sender, message)


class ThespianEcho:
    """The actor system and its echo. A context manager."""

    def __init__(self, base: str = "multiprocQueueBase") -> None:
        self._system = ActorSystem(base, logDefs={"version": 1, "disable_existing_loggers": False})
        self._actor = self._system.createActor(EchoActor)
        if self._system.ask(self._actor, "warm", 10.0) != "warm":
            self._system.shutdown()
            raise TimeoutError(f"thespian's {base} does not answer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._system.shutdown()

    def asks(self, count: int, text: str) -> None:
        for _ in range(count):
            self._system.ask(self._actor, text, 10.0)
