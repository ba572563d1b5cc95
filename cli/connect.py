"""A command's connection to the supervisor."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Literal, TypeVar

from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.state import Remote, SupervisorRecord, find_supervisor, read_record
from voidbus.transport.access import AccessError
from voidbus.transport.delivery import Ask
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message
from voidbus.transport.remote import load_client_keys

M = TypeVar("M", bound=Message)

ROOT = "supervisor/root"
RUNS = "supervisor/runs"
JOURNAL = "supervisor/journal"
TELEMETRY = "supervisor/telemetry"
SYSTEM = "supervisor/system"

# How long a question to a healthy supervisor may take, and a link to it (seconds). Both are
# milliseconds in practice; a disk that is slow to sync is what takes longest.
ASK_TIMEOUT = 10.0
LINK_TIMEOUT = 5.0

# A supervisor is found before its last actor is up, and starts one that failed again (seconds).
SETTLE = 5.0
_INTERVAL = 0.02
# What a node says for an address that nobody has; an actor uses the reason with words of its own.
_NOBODY = "nothing receives at this address"

Right = Literal["observe", "operate"]


class Refusal(Failure):
    """A question came back with a fault instead of its reply."""

    def __init__(self, fault: Fault, text: str, code: ExitCode) -> None:
        super().__init__(text, code)
        self.fault = fault


class Supervisor:
    """A link to a running supervisor. Use it with `with`."""

    def __init__(self, record: SupervisorRecord, state: Path | Remote, leaf: Leaf) -> None:
        self.record = record
        self.state = state
        self.leaf = leaf

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leaf.close()

    def begin(self, dest: str, message: Message, timeout: float = ASK_TIMEOUT) -> Ask:
        """Ask without waiting. A command gets a key of its own, so that it is done once."""
        key = secrets.token_hex(16) if message.changes else ""
        return self.leaf.ask(dest, message, timeout=timeout, key=key)

    def ask(self, dest: str, message: Message, reply: type[M], timeout: float = ASK_TIMEOUT) -> M:
        """Ask and wait. Raises Refusal where a fault comes back.

        An actor of the supervisor that is not there is being started: it gets SETTLE seconds.
        """
        patience = time.monotonic() + min(SETTLE, timeout)
        while True:
            try:
                return self.finish(self.begin(dest, message, timeout), reply)
            except Refusal as refusal:
                starting = dest.startswith("supervisor/") and _starting(refusal.fault)
                if not starting or time.monotonic() >= patience:
                    raise
            time.sleep(_INTERVAL)

    def finish(self, ask: Ask, reply: type[M]) -> M:
        """Wait for the reply of an ask that `begin` began. Raises Refusal."""
        outcome = ask.wait()
        if isinstance(outcome, Fault):
            raise explain(outcome, self.state)
        if not isinstance(outcome, reply):
            raise Failure(
                f"{ask.address} answered with {outcome.tag}, which this voidbus does not expect; "
                f"the supervisor is version {self.record.version}: use the same version"
            )
        return outcome


def _starting(fault: Fault) -> bool:
    """Whether the message came back unread from an actor that is not there yet, or again."""
    return fault.reason is FaultReason.MAILBOX_CLOSED or (
        fault.reason is FaultReason.NO_SUCH_ACTOR and fault.detail == _NOBODY
    )


def connect(
    state: Path | Remote, right: Right = "observe", *, link_timeout: float = LINK_TIMEOUT
) -> Supervisor:
    """Connect to the supervisor that runs on `state`. Raises Failure where there is none."""
    if isinstance(state, Remote):
        return _connect_remote(state, link_timeout)
    record = find_supervisor(state)
    if record is None:
        raise no_supervisor(state)
    return open_link(record, state, right, link_timeout=link_timeout)


def open_link(
    record: SupervisorRecord, state: Path, right: Right, *, link_timeout: float = LINK_TIMEOUT
) -> Supervisor:
    """Connect to the supervisor `record` describes. Raises Failure where it doesn't answer."""
    try:
        leaf = Leaf(
            _client_name(),
            f"ipc://{record.sockets}/{right}.sock",
            topics_url=f"ipc://{record.sockets}/topics.sock",
        )
    except AccessError as error:
        raise Failure(str(error), ExitCode.NO_SUPERVISOR) from error
    try:
        if not leaf.wait_up(link_timeout):
            raise _no_link(record, state, right, leaf.refused, link_timeout)
    except BaseException:
        leaf.close()
        raise
    return Supervisor(record, state, leaf)


def _connect_remote(remote: Remote, link_timeout: float) -> Supervisor:
    """Connect to a supervisor on another machine; its address decides what the link may do."""
    if not remote.url.startswith("tcp://"):
        raise Failure(
            f"--connect {remote.url}: write it as tcp://HOST:PORT. For a supervisor on this host "
            "use --state-dir",
            ExitCode.USAGE,
        )
    try:
        leaf = Leaf(_client_name(), remote.url, keys=load_client_keys(remote.keys))
    except AccessError as error:
        raise Failure(str(error), ExitCode.NO_SUPERVISOR) from error
    try:
        if not leaf.wait_up(link_timeout):
            refused = f": {leaf.refused}" if leaf.refused else f" within {link_timeout:g} s"
            raise Failure(
                f"no link to {remote.url}{refused}. Nothing listens there, or the keys in "
                f"{remote.keys} are not let in: on the supervisor's host, see remote in its "
                "configuration, and make keys with: voidbus keys client NAME",
                ExitCode.NO_SUPERVISOR,
            )
    except BaseException:
        leaf.close()
        raise
    return Supervisor(SupervisorRecord(0, 0, "unknown", remote.url, ""), remote, leaf)


def _client_name() -> str:
    return f"client-{os.getpid()}-{secrets.token_hex(4)}"


def no_supervisor(state: Path) -> Failure:
    """Nobody runs on `state`: what to do about it."""
    record = read_record(state)
    ended = f" (the last one, process {record.pid}, has ended)" if record is not None else ""
    return Failure(
        f"no supervisor runs on {state}{ended}. Start one: voidbus serve --state-dir {state}; "
        "or: voidbus run FILE, which starts one for itself",
        ExitCode.NO_SUPERVISOR,
    )


def _no_link(
    record: SupervisorRecord, state: Path, right: Right, refused: str, timeout: float
) -> Failure:
    if refused:
        return Failure(
            f"the supervisor (process {record.pid}) refused this connection: {refused}",
            ExitCode.NO_SUPERVISOR,
        )
    if not record.alive:
        return no_supervisor(state)
    socket = Path(record.sockets) / f"{right}.sock"
    return Failure(
        f"the supervisor (process {record.pid}, {record.phase or 'running'}) did not answer on "
        f"{socket} within {timeout:g} s. See {state / 'supervisor.log'}; if it is stuck, end it "
        f"with: kill {record.pid}",
        ExitCode.NO_SUPERVISOR,
    )


def explain(fault: Fault, state: Path | Remote) -> Refusal:
    """What a fault means to an operator."""
    reason = fault.reason
    if reason in (FaultReason.LINK_LOST, FaultReason.CLOSED):
        look = f"on {state}" if isinstance(state, Remote) else f"voidbus doctor --state-dir {state}"
        return Refusal(
            fault,
            f"the connection to the supervisor was lost ({fault.detail}). See whether it still "
            f"runs: {look}",
            ExitCode.NO_SUPERVISOR,
        )
    if reason is FaultReason.EXPIRED:
        return Refusal(
            fault,
            f"{fault.address} did not answer in time ({fault.detail}). Look at what it is busy "
            "with: voidbus actors",
            ExitCode.TIMED_OUT,
        )
    if reason is FaultReason.MAILBOX_FULL:
        return Refusal(fault, f"{fault.address} is overloaded; try again", ExitCode.FAILED)
    if reason is FaultReason.UNHANDLED:
        return Refusal(
            fault,
            f"{fault.address} does not know this command: {fault.detail}. Use the same version of "
            "voidbus for the supervisor and for this command",
            ExitCode.FAILED,
        )
    # The others carry the receiver's own words.
    return Refusal(fault, fault.detail or f"{fault.address}: {reason}", ExitCode.FAILED)
