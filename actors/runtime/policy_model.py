"""The vocabulary of supervision: policies, state, events and actions, all immutable values.

Times are seconds on whatever clock the caller passes as `now`; nothing here reads a clock.
The meaning of the words is Erlang/OTP's (the `supervisor` module of stdlib).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum


class Restart(StrEnum):
    """When a child that ended by itself is started again."""

    PERMANENT = "permanent"  # always
    TRANSIENT = "transient"  # only after a fault
    TEMPORARY = "temporary"  # never


class Strategy(StrEnum):
    """Which siblings are restarted along with a child."""

    ONE_FOR_ONE = "one_for_one"  # none
    ONE_FOR_ALL = "one_for_all"  # all of them
    REST_FOR_ONE = "rest_for_one"  # those started after it


class ExitKind(StrEnum):
    NORMAL = "normal"
    SHUTDOWN = "shutdown"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class ExitReason:
    """Why a child ended. Only `FAULT` makes a transient child restart."""

    kind: ExitKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ChildPolicy:
    """How one child is kept.

    `stop_timeout` is the longest time, in seconds, its stop may take. When a `significant` child
    ends and is not to be restarted, the supervisor stops all the others and finishes (OTP's
    `auto_shutdown: any_significant`); a permanent child can't be significant.
    """

    name: str
    restart: Restart
    stop_timeout: float
    significant: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a child needs a name")
        if not (math.isfinite(self.stop_timeout) and self.stop_timeout >= 0):
            raise ValueError(
                f"child {self.name!r}: stop_timeout must be a finite number of seconds, 0 or more, "
                f"not {self.stop_timeout}"
            )
        if self.significant and self.restart is Restart.PERMANENT:
            raise ValueError(
                f"child {self.name!r} is permanent, so it never ends for good and can't be "
                "significant; make it transient or temporary"
            )


@dataclass(frozen=True, slots=True)
class SupervisorPolicy:
    """How a supervisor restarts its children.

    More than `max_restarts` restarts within `window` seconds escalate. The first restart of a
    streak is immediate, the second waits `backoff_initial` seconds, each later one
    `backoff_factor` times longer up to `backoff_max`; every wait is spread by plus or minus the
    fraction `jitter`, never past `backoff_max`. A child that lived for `stable_after` seconds has
    ended its streak.
    """

    strategy: Strategy
    max_restarts: int
    window: float
    backoff_initial: float
    backoff_max: float
    backoff_factor: float
    jitter: float
    stable_after: float

    def __post_init__(self) -> None:
        seconds = (self.window, self.backoff_initial, self.backoff_max, self.stable_after)
        if not all(math.isfinite(value) and value >= 0 for value in seconds):
            raise ValueError(
                "window, backoff_initial, backoff_max and stable_after must be finite seconds, "
                "0 or more"
            )
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts must be 0 or more, not {self.max_restarts}")
        if self.backoff_max < self.backoff_initial:
            raise ValueError("backoff_max must not be below backoff_initial")
        if not (math.isfinite(self.backoff_factor) and self.backoff_factor >= 1):
            raise ValueError(f"backoff_factor must be 1 or more, not {self.backoff_factor}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be between 0 and 1, not {self.jitter}")


# ---- events ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChildStarted:
    """The child asked for by `StartChild` is up."""

    name: str
    generation: int


@dataclass(frozen=True, slots=True)
class ChildExited:
    """A generation of a child is gone and its resources are freed; or it failed to start."""

    name: str
    generation: int
    reason: ExitReason


@dataclass(frozen=True, slots=True)
class ChildStopped:
    """A generation of a child is gone because `StopChild` asked for it."""

    name: str
    generation: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: the timer of a `ScheduleTick`, and the first event of a new supervisor."""


@dataclass(frozen=True, slots=True)
class AddChild:
    """A new child, last in order. `adopted` names the generation of one that already runs."""

    policy: ChildPolicy
    adopted: int | None = None


@dataclass(frozen=True, slots=True)
class RemoveChild:
    """Stop the child if it is alive, then forget it."""

    name: str


@dataclass(frozen=True, slots=True)
class StopAll:
    """Stop everything by `deadline` (absolute, same clock as `now`), then finish."""

    deadline: float


Event = ChildStarted | ChildExited | ChildStopped | Tick | AddChild | RemoveChild | StopAll


# ---- actions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartChild:
    """Start this generation; answer with `ChildStarted`, or `ChildExited` if it can't start."""

    name: str
    generation: int


@dataclass(frozen=True, slots=True)
class StopChild:
    """Stop this generation within `timeout` seconds (0: kill it now); answer `ChildStopped`.

    A second one for the same generation shortens the time of the first.
    """

    name: str
    generation: int
    timeout: float


@dataclass(frozen=True, slots=True)
class ScheduleTick:
    """Send a `Tick` at this time. A new one replaces the one before."""

    at: float


@dataclass(frozen=True, slots=True)
class Escalate:
    """Everything is stopped after too many restarts; the supervisor itself has failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything is stopped as asked, or because a significant child ended (`detail` says)."""

    detail: str = ""


Action = StartChild | StopChild | ScheduleTick | Escalate | Finished


# ---- state -----------------------------------------------------------------------------------


class ChildPhase(StrEnum):
    DOWN = "down"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"  # StopChild was sent, the end is not yet reported


class StopCause(StrEnum):
    """Why an alive child has to stop."""

    GROUP = "group"  # a sibling's restart
    REMOVAL = "removal"
    SHUTDOWN = "shutdown"  # of the supervisor


@dataclass(frozen=True, slots=True)
class ChildState:
    """One child. `wanted`: it should be up. `ordered`: its start waits for the earlier ones."""

    policy: ChildPolicy
    phase: ChildPhase = ChildPhase.DOWN
    generation: int = 0
    wanted: bool = True
    ordered: bool = True
    removed: bool = False
    stop_cause: StopCause | None = None
    stop_by: float = math.inf
    started_at: float | None = None
    due: float = -math.inf
    streak: int = 0
    restarts: int = 0
    last_exit: ExitReason | None = None

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def alive(self) -> bool:
        return self.phase is not ChildPhase.DOWN


class SupervisorPhase(StrEnum):
    RUNNING = "running"
    STOPPING = "stopping"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SupervisorState:
    """All a supervisor remembers. Children are in start order."""

    policy: SupervisorPolicy
    children: tuple[ChildState, ...] = ()
    phase: SupervisorPhase = SupervisorPhase.RUNNING
    last_generation: int = 0
    restarts: tuple[float, ...] = ()  # times of the restarts within the window
    stop_deadline: float = math.inf
    outcome: Escalate | Finished = field(default_factory=Finished)
    tick_at: float | None = None

    def child(self, name: str) -> ChildState | None:
        return next((child for child in self.children if child.name == name), None)


class DuplicateChildError(ValueError):
    """A child of that name exists, or is not yet gone."""


class UnknownChildError(LookupError):
    """No child has that name."""


class SupervisorStoppingError(RuntimeError):
    """The supervisor is stopping and takes no more children."""
