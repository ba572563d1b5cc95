"""The way from the gateway's event loop to the bus and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from voidbus.gateway.problems import problem_of
from voidbus.transport.delivery import Ask
from voidbus.transport.fault import Fault
from voidbus.transport.message import Message
from voidbus.transport.node import Node

M = TypeVar("M", bound=Message)

ASK_TIMEOUT = 15.0
"""Seconds a question may take; what takes longer answers at once and is waited for by events."""


@dataclass(frozen=True)
class Answer:
    """A reply, or a fault, and what came with it."""

    message: Message
    attachments: Sequence[bytes]


class Bus:
    """Asks on behalf of HTTP requests. Lives in one event loop."""

    def __init__(self, node: Node, sender: str) -> None:
        self.node = node
        self._sender = sender
        self._loop = asyncio.get_running_loop()

    async def ask(self, dest: str, message: Message, timeout: float = ASK_TIMEOUT) -> Answer:
        """The outcome, which may be a fault: every question ends."""
        answered: asyncio.Future[Answer] = self._loop.create_future()

        def settle(answer: Answer) -> None:
            if not answered.done():  # its client may have gone away meanwhile
                answered.set_result(answer)

        def ended(ask: Ask) -> None:
            outcome = ask.outcome
            assert outcome is not None
            answer = Answer(outcome, ask.attachments)
            try:
                self._loop.call_soon_threadsafe(settle, answer)
            except RuntimeError:
                return  # the gateway has stopped; nobody waits for it

        self.node.ask(dest, message, timeout=timeout, sender=self._sender, on_end=ended)
        return await answered

    async def get(
        self, dest: str, message: Message, reply: type[M], timeout: float = ASK_TIMEOUT
    ) -> M:
        """The reply. Raises Problem for anything else."""
        answer = await self.ask(dest, message, timeout)
        if not isinstance(answer.message, reply):
            raise problem_of(answer.message)
        return answer.message

    async def read(
        self, dest: str, message: Message, reply: type[M], timeout: float = ASK_TIMEOUT
    ) -> tuple[M, Sequence[bytes]]:
        """The reply and its attachments. Raises Problem for anything else."""
        answer = await self.ask(dest, message, timeout)
        if not isinstance(answer.message, reply):
            raise problem_of(answer.message)
        return answer.message, answer.attachments

    async def find(
        self, dest: str, message: Message, reply: type[M], timeout: float = ASK_TIMEOUT
    ) -> M | Fault:
        """The reply, or the fault. Raises Problem for anything else."""
        answer = await self.ask(dest, message, timeout)
        if isinstance(answer.message, reply | Fault):
            return answer.message
        raise problem_of(answer.message)
