"""OTP supervision as a pure function: `decide(state, event, now, random)`.

It reads no clock, holds no thread and does no I/O: the supervisor actor tells it what happened
and carries out the actions it answers with. Every decision has two halves: the event changes
what is wanted of the children, then `_advance` emits whatever may be done about it now.

What OTP leaves to its own synchronous calls is decided here as follows.
- Generations are unique in a supervisor, not only in a child, so the late exit of a removed child
  can't hit a new one of the same name.
- Stops of a group (a restart of siblings, a shutdown) go in reverse, one after another; a removed
  child stops at once, beside others.
- First starts and group restarts go in order, each after the one before is up. Restarts and
  additions under one_for_one don't wait for siblings.
- A group restart starts every child but the temporary ones again, also a transient one that had
  ended normally, as OTP does.
- A child that ends while it is to be stopped just counts as stopped: one restart is counted for
  the group, whatever its members do on their way down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from voidbus.actors.runtime.policy_model import (
    Action,
    AddChild,
    ChildExited,
    ChildPhase,
    ChildPolicy,
    ChildStarted,
    ChildState,
    ChildStopped,
    DuplicateChildError,
    Escalate,
    Event,
    ExitKind,
    ExitReason,
    Finished,
    RemoveChild,
    Restart,
    ScheduleTick,
    StartChild,
    StopAll,
    StopCause,
    StopChild,
    Strategy,
    SupervisorPhase,
    SupervisorPolicy,
    SupervisorState,
    SupervisorStoppingError,
    Tick,
    UnknownChildError,
)

__all__ = [
    "Action",
    "AddChild",
    "ChildExited",
    "ChildPhase",
    "ChildPolicy",
    "ChildStarted",
    "ChildState",
    "ChildStopped",
    "DuplicateChildError",
    "Escalate",
    "Event",
    "ExitKind",
    "ExitReason",
    "Finished",
    "RemoveChild",
    "Restart",
    "ScheduleTick",
    "StartChild",
    "StopAll",
    "StopCause",
    "StopChild",
    "Strategy",
    "SupervisorPhase",
    "SupervisorPolicy",
    "SupervisorState",
    "SupervisorStoppingError",
    "Tick",
    "UnknownChildError",
    "backoff",
    "decide",
    "initial_state",
]


def initial_state(
    policy: SupervisorPolicy, children: Iterable[ChildPolicy] = (), *, last_generation: int = 0
) -> SupervisorState:
    """A supervisor that has started nothing yet; the first `Tick` starts its children in order.

    `last_generation` is the highest generation an earlier life of it used.
    Raises DuplicateChildError for two children of one name.
    """
    states = tuple(ChildState(child) for child in children)
    names = [child.name for child in states]
    for name in names:
        if names.count(name) > 1:
            raise DuplicateChildError(f"two children are named {name!r}; names must be unique")
    return SupervisorState(policy, states, last_generation=last_generation)


def backoff(policy: SupervisorPolicy, streak: int, random: float) -> float:
    """Seconds to wait before restart number `streak` (1 is the first) of a streak.

    `random` is a number in [0, 1) that places the wait within the jitter.
    """
    if streak <= 1 or policy.backoff_initial == 0:
        return 0.0
    steps = streak - 2
    delay = policy.backoff_max
    if policy.backoff_factor == 1:
        delay = policy.backoff_initial
    elif steps * math.log(policy.backoff_factor) < math.log(
        policy.backoff_max / policy.backoff_initial
    ):
        delay = policy.backoff_initial * policy.backoff_factor**steps
    spread = 1 + policy.jitter * (2 * random - 1)
    return min(delay * spread, policy.backoff_max)


def decide(
    state: SupervisorState, event: Event, now: float, random: float
) -> tuple[SupervisorState, tuple[Action, ...]]:
    """The supervisor's next state and what to do, after `event` at time `now`.

    Events of an old generation are ignored. The last action of a supervisor's life is one
    `Finished` or `Escalate`; after it, every event is ignored.

    Raises DuplicateChildError, UnknownChildError or SupervisorStoppingError for an `AddChild` or
    `RemoveChild` that can't be done.
    """
    if state.phase is SupervisorPhase.FINISHED:
        if isinstance(event, AddChild):
            raise SupervisorStoppingError(_no_more(event.policy.name))
        return state, ()
    match event:
        case ChildStarted():
            state = _started(state, event, now)
        case ChildExited():
            state = _exited(state, event.name, event.generation, event.reason, now, random)
        case ChildStopped():
            asked = ExitReason(ExitKind.SHUTDOWN, "stopped")
            state = _exited(state, event.name, event.generation, asked, now, random)
        case Tick():
            state = replace(state, tick_at=None)
        case AddChild():
            state = _added(state, event, now)
        case RemoveChild():
            state = _removed(state, event.name)
        case StopAll():
            state = _stop_all(state, event.deadline)
    return _advance(state, now)


# ---- what an event changes -------------------------------------------------------------------


def _started(state: SupervisorState, event: ChildStarted, now: float) -> SupervisorState:
    child = state.child(event.name)
    if child is None or child.generation != event.generation:
        return state
    if child.phase is not ChildPhase.STARTING:
        return state
    return _put(state, replace(child, phase=ChildPhase.RUNNING, started_at=now, ordered=False))


def _exited(
    state: SupervisorState,
    name: str,
    generation: int,
    reason: ExitReason,
    now: float,
    random: float,
) -> SupervisorState:
    child = state.child(name)
    if child is None or not child.alive or child.generation != generation:
        return state
    cause, lived_since = child.stop_cause, child.started_at
    stable = lived_since is not None and now - lived_since >= state.policy.stable_after
    child = replace(
        child,
        phase=ChildPhase.DOWN,
        stop_cause=None,
        stop_by=math.inf,
        started_at=None,
        streak=0 if stable else child.streak,
        last_exit=reason,
    )
    state = _put(state, child)
    if cause is not None:
        return _forget_ended(state)
    if child.policy.restart is Restart.PERMANENT or (
        child.policy.restart is Restart.TRANSIENT and reason.kind is ExitKind.FAULT
    ):
        return _restart(state, child, reason, now, random)
    state = _put(state, replace(child, wanted=False))
    if child.policy.significant:
        why = f"significant child {name!r} ended ({_describe(reason)})"
        return _shut_down(state, Finished(why))
    return _forget_ended(state)


def _restart(
    state: SupervisorState, child: ChildState, reason: ExitReason, now: float, random: float
) -> SupervisorState:
    policy = state.policy
    recent = tuple(at for at in state.restarts if now - at <= policy.window)
    if len(recent) >= policy.max_restarts:
        why = (
            f"child {child.name!r} ended ({_describe(reason)}) and would be restart number "
            f"{len(recent) + 1} within {policy.window:g} s; {policy.max_restarts} are allowed"
        )
        return _shut_down(replace(state, restarts=recent), Escalate(why))
    state = replace(state, restarts=(*recent, now))
    streak = child.streak + 1
    due = now + backoff(policy, streak, random)
    state = _put(state, replace(child, streak=streak, restarts=child.restarts + 1, due=due))
    if policy.strategy is Strategy.ONE_FOR_ONE:
        return state
    first = 0
    if policy.strategy is Strategy.REST_FOR_ONE:
        first = [sibling.name for sibling in state.children].index(child.name)
    members = tuple(_join_group(member, due) for member in state.children[first:])
    return _forget_ended(replace(state, children=state.children[:first] + members))


def _join_group(child: ChildState, due: float) -> ChildState:
    """Have a child stop and start again with its group, or only stop if it is temporary."""
    return replace(
        child,
        # A temporary child that has never been started is still owed its one start.
        wanted=not child.removed
        and (child.policy.restart is not Restart.TEMPORARY or not child.generation),
        ordered=True,
        due=max(child.due, due),
        stop_cause=StopCause.GROUP if child.alive else None,
    )


def _added(state: SupervisorState, event: AddChild, now: float) -> SupervisorState:
    name = event.policy.name
    if state.phase is not SupervisorPhase.RUNNING:
        raise SupervisorStoppingError(_no_more(name))
    present = state.child(name)
    if present is not None:
        what = "is still stopping; add it when it is gone" if present.removed else "exists already"
        raise DuplicateChildError(f"child {name!r} {what}")
    child = ChildState(event.policy, ordered=state.policy.strategy is not Strategy.ONE_FOR_ONE)
    last = state.last_generation
    if event.adopted is not None:
        running = ChildPhase.RUNNING
        child = replace(
            child, phase=running, generation=event.adopted, started_at=now, ordered=False
        )
        last = max(last, event.adopted)
    return replace(state, children=(*state.children, child), last_generation=last)


def _removed(state: SupervisorState, name: str) -> SupervisorState:
    child = state.child(name)
    if child is None:
        raise UnknownChildError(f"there is no child {name!r} to remove")
    cause = child.stop_cause or (StopCause.REMOVAL if child.alive else None)
    state = _put(state, replace(child, removed=True, wanted=False, stop_cause=cause))
    return _forget_ended(state)


def _stop_all(state: SupervisorState, deadline: float) -> SupervisorState:
    state = replace(state, stop_deadline=min(state.stop_deadline, deadline))
    if state.phase is SupervisorPhase.STOPPING:
        return state
    return _shut_down(state, Finished("stopped as asked"))


def _shut_down(state: SupervisorState, outcome: Escalate | Finished) -> SupervisorState:
    children = tuple(
        replace(child, wanted=False, stop_cause=StopCause.SHUTDOWN if child.alive else None)
        for child in state.children
    )
    return replace(state, children=children, phase=SupervisorPhase.STOPPING, outcome=outcome)


# ---- what may be done now --------------------------------------------------------------------


def _advance(state: SupervisorState, now: float) -> tuple[SupervisorState, tuple[Action, ...]]:
    state, stops = _stops(state, now)
    state, starts = _starts(state, now)
    actions: list[Action] = [*stops, *starts]
    if state.phase is SupervisorPhase.STOPPING and not any(c.alive for c in state.children):
        actions.append(state.outcome)
        return replace(state, phase=SupervisorPhase.FINISHED, tick_at=None), tuple(actions)
    wake = _next_tick(state, now)
    if wake is not None and wake != state.tick_at:
        actions.append(ScheduleTick(wake))
    return replace(state, tick_at=wake), tuple(actions)


def _stops(state: SupervisorState, now: float) -> tuple[SupervisorState, list[StopChild]]:
    actions: list[StopChild] = []
    deadline = state.stop_deadline
    queue_busy = False  # a group stops one after another
    for child in reversed(state.children):
        if child.stop_cause is None:
            continue
        queued = child.stop_cause is not StopCause.REMOVAL
        if child.phase is ChildPhase.STOPPING:
            queue_busy = queue_busy or queued
            if child.stop_by <= deadline:
                continue
        elif queued and queue_busy and now < deadline:
            continue
        # With no time left they are no longer taken one after another: all are killed now.
        queue_busy = queue_busy or queued
        timeout = max(0.0, min(child.policy.stop_timeout, child.stop_by - now, deadline - now))
        stop_by = min(now + timeout, deadline)  # min: rounding must not make it look late again
        state = _put(state, replace(child, phase=ChildPhase.STOPPING, stop_by=stop_by))
        actions.append(StopChild(child.name, child.generation, timeout))
    return state, actions


def _starts(state: SupervisorState, now: float) -> tuple[SupervisorState, list[StartChild]]:
    actions: list[StartChild] = []
    for child in _startable(state):
        if child.due > now:
            continue
        generation = state.last_generation + 1
        child = replace(child, phase=ChildPhase.STARTING, generation=generation)
        state = replace(_put(state, child), last_generation=generation)
        actions.append(StartChild(child.name, generation))
    return state, actions


def _startable(state: SupervisorState) -> list[ChildState]:
    """Children that only wait for their back-off, if for anything."""
    if any(child.stop_cause is StopCause.GROUP for child in state.children):
        return []
    startable: list[ChildState] = []
    earlier_up = True
    for child in state.children:
        if child.wanted and not child.alive and (earlier_up or not child.ordered):
            startable.append(child)
        earlier_up = earlier_up and (not child.wanted or child.phase is ChildPhase.RUNNING)
    return startable


def _next_tick(state: SupervisorState, now: float) -> float | None:
    times = [child.due for child in _startable(state)]
    unasked = (c.stop_cause and c.phase is not ChildPhase.STOPPING for c in state.children)
    if any(unasked):
        times.append(state.stop_deadline)
    return min((at for at in times if now < at < math.inf), default=None)


def _put(state: SupervisorState, child: ChildState) -> SupervisorState:
    children = tuple(child if old.name == child.name else old for old in state.children)
    return replace(state, children=children)


def _forget_ended(state: SupervisorState) -> SupervisorState:
    """Drop the removed and the temporary children that are gone for good, as OTP does."""

    def ended(child: ChildState) -> bool:
        over = child.removed or (child.policy.restart is Restart.TEMPORARY and not child.wanted)
        return over and not child.alive

    return replace(state, children=tuple(c for c in state.children if not ended(c)))


def _describe(reason: ExitReason) -> str:
    return f"{reason.kind}: {reason.detail}" if reason.detail else str(reason.kind)


def _no_more(name: str) -> str:
    return f"child {name!r} can't be added: the supervisor is stopping"
