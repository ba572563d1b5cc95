"""What every actor and every system answers."""

from __future__ import annotations

from voidbus.transport.fault import Fault
from voidbus.transport.message import Message, Right


class Done(Message, tag="actor.done"):
    """The answer to a command that has nothing else to say."""


class Accepted(Message, tag="actor.accepted"):
    """A command was taken and goes on: its completion is a message of its own."""

    operation: str


class Inspect(Message, tag="actor.inspect", right=Right.OBSERVE):
    """How are you? Answered from the actor's own mailbox with an ActorStatus."""


class InspectSystem(Message, tag="actor.inspect_system", right=Right.OBSERVE):
    """How are all actors of this node? Answered without them, so stuck ones are seen."""


class ActorStatus(Message, tag="actor.status"):
    """One actor. Ages in seconds; `head_age` is how long its oldest message waits.

    `state`: running, stopping or stuck. One that is stuck is in `handler` for `stuck_for` seconds.
    """

    path: str
    kind: str
    generation: int
    state: str
    age: float
    depth: int
    control_depth: int
    limit: int
    head_age: float
    handled: int
    refused: int
    shed: int
    restarts: int
    last_fault: str
    stuck_for: float = 0.0
    handler: str = ""


class SystemStatus(Message, tag="actor.system_status"):
    """All actors of a node, and the node's own counters."""

    node: str
    pid: int
    threads: int
    actors: tuple[ActorStatus, ...]
    counters: dict[str, int]


class Terminated(Message, tag="actor.terminated"):
    """An actor that was watched has ended, its resources freed."""

    path: str
    generation: int
    reason: str
    detail: str


class ActorStuck(Message, tag="actor.stuck"):
    """An actor has been at one message for too long, published once on `NODE/liveness`.

    `handler` is the type of the message, or the function it is in; `seconds` since it began.
    """

    path: str
    handler: str
    seconds: float


class ActorWentOn(Message, tag="actor.went_on"):
    """An actor that was stuck takes messages again, published on `NODE/liveness`.

    `seconds` after it had begun with what it was stuck in, at most: it was seen by a later check.
    """

    path: str
    handler: str
    seconds: float


def liveness_topic(node: str) -> str:
    return f"{node}/liveness"


def detail_of(outcome: Message) -> str:
    """Why an ask did not get the reply it wanted."""
    return outcome.detail if isinstance(outcome, Fault) else f"unexpected {outcome.tag}"
