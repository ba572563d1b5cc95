"""The way to a run's sidecar through its supervisor; the journal answers for runs that ended."""

from __future__ import annotations

from collections.abc import Callable

from voidbus.actors.messages.journal import ForgetIntents, TakeIntents
from voidbus.actors.messages.runs import run_node
from voidbus.actors.messages.sidecar import (
    AcknowledgeIntents,
    PushMessage,
    PutInbox,
    ReadIntents,
)
from voidbus.actors.run import SIDECAR_PATH
from voidbus.actors.runtime.actor import Actor
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

SidecarRequest = PutInbox | PushMessage | ReadIntents | AcknowledgeIntents

_ASK_TIMEOUT = 10.0
# How often a run's process is looked for that is coming back.
_COMING_SECONDS = 0.05

# Faults that mean there is no sidecar, or none any more; others are the sidecar's own answer.
_NOT_THERE = frozenset(
    {
        FaultReason.NO_SUCH_NODE,
        FaultReason.NO_SUCH_ACTOR,
        FaultReason.LINK_LOST,
        FaultReason.MAILBOX_CLOSED,
        FaultReason.CLOSED,
    }
)


class SidecarDoor:
    """Used by one actor, in its thread."""

    def __init__(self, actor: Actor, journal: str) -> None:
        self._actor = actor
        self._journal = journal

    def pass_on(
        self,
        message: SidecarRequest,
        delivery: Delivery,
        *,
        alive: bool,
        coming: Callable[[], bool],
    ) -> None:
        """Answer `delivery` with what the sidecar of the run says, or the journal for it. While the
        run's process is `coming` back to a supervisor that was started again, it is waited for."""
        if not alive:
            self._without_sidecar(message, delivery)
            return

        def answered(outcome: Message) -> None:
            if (
                isinstance(outcome, Fault)
                and outcome.reason is FaultReason.NO_SUCH_NODE
                and coming()
            ):
                self._actor.after(_COMING_SECONDS, ask)
            elif isinstance(outcome, Fault) and outcome.reason in _NOT_THERE:
                self._without_sidecar(message, delivery)
            else:
                delivery.reply(outcome)

        def ask() -> None:
            self._actor.ask(
                f"{run_node(message.run_id)}/{SIDECAR_PATH}",
                message,
                answered,
                timeout=_ASK_TIMEOUT,
                key=delivery.key,
            )

        ask()

    def _without_sidecar(self, message: SidecarRequest, delivery: Delivery) -> None:
        if isinstance(message, ReadIntents):
            self._actor.ask(
                self._journal,
                TakeIntents(run_id=message.run_id, drain=message.drain, offset=message.offset),
                delivery.reply,
                timeout=_ASK_TIMEOUT,
            )
        elif isinstance(message, AcknowledgeIntents):
            self._actor.ask(
                self._journal,
                ForgetIntents(run_id=message.run_id, intent_ids=message.intent_ids),
                delivery.reply,
                timeout=_ASK_TIMEOUT,
            )
        else:
            delivery.fail(
                FaultReason.NO_SUCH_ACTOR,
                f"no sidecar for run {message.run_id}: it has ended, is not up yet, or its "
                "specification does not enable messaging",
            )
