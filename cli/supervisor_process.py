"""The supervisor process: one for a state directory, from its lock to its last actor."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import zmq

from voidbus.actors.archive import Archive, Retention
from voidbus.actors.artifact_store import ArtifactStore
from voidbus.actors.event import timestamp
from voidbus.actors.journal import Journal
from voidbus.actors.messages.actor import ActorStuck, ActorWentOn, liveness_topic
from voidbus.actors.messages.journal import CountRuns, NodeJoined, ProcessExited
from voidbus.actors.messages.runs import run_node
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.actors.root import ROOT_PATH, Identity, Root
from voidbus.actors.run_process import ENTRY, PRELOAD
from voidbus.actors.runs import Runs, RunsSettings
from voidbus.actors.runtime.policy import ChildPolicy, ExitKind, ExitReason, Restart
from voidbus.actors.runtime.process import ProcessIdentity, current_identity
from voidbus.actors.runtime.spawner import Spawner
from voidbus.actors.runtime.supervisor import ChildSpec, actor_child
from voidbus.actors.runtime.system import System
from voidbus.actors.telemetry import Telemetry
from voidbus.cli.state import KEYS_FOLDER
from voidbus.gateway.open import ListenError, Opened, TokenError, open_doors
from voidbus.spec.supervisor import SupervisorConfig
from voidbus.transport.access import (
    AccessError,
    Endpoints,
    ipc_endpoints,
    secure_directory,
    socket_directory,
)
from voidbus.transport.admission import CLIENT_PREFIX
from voidbus.transport.control import Hello
from voidbus.transport.fault import Fault
from voidbus.transport.hub import Hub
from voidbus.transport.message import Right
from voidbus.transport.remote import remote_endpoints
from voidbus.transport.topics import Publication

log = logging.getLogger("voidbus.supervisor")

HUB_NAME = "supervisor"
DESCRIPTION_FILE = "supervisor.json"
LOCK_FILE = "supervisor.lock"
JOURNAL_FILE = "journal.sqlite"
ARTIFACTS_FOLDER = "artifacts"
GATEWAY_PATH = "gateway"
# The actors have this long (seconds) to come up; a journal that can't be opened ends it sooner.
_START_SECONDS = 15.0


class SupervisorError(Exception):
    """The supervisor can't start here; the text says why and what to do."""


class StateLock:
    """The one supervisor of a state directory. The kernel drops the lock when the process ends."""

    def __init__(self, state_dir: Path) -> None:
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SupervisorError(
                f"state directory {state_dir}: {error.strerror}; make it writable for this user, "
                "or name another with --state-dir"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise SupervisorError(
                f"state directory {state_dir} belongs to {_describe_holder(state_dir)}; stop it "
                "with `voidbus stop`, or use another --state-dir"
            ) from None

    def release(self) -> None:
        os.close(self._fd)


def _describe_holder(state_dir: Path) -> str:
    try:
        described = json.loads((state_dir / DESCRIPTION_FILE).read_text())
        return f"a running supervisor (pid {int(described['pid'])})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another supervisor, which is just starting"


@dataclass
class SupervisorProcess:
    """Everything the supervisor process holds."""

    config: SupervisorConfig

    def run(self) -> int:
        """Run until asked to stop. Returns the exit status.

        Raises SupervisorError where it can't start; nothing is left running then.
        """
        with contextlib.ExitStack() as stack:
            state_dir = Path(self.config.state_dir)
            _require_program(self.config)
            lock = StateLock(state_dir)
            stack.callback(lock.release)
            try:
                sockets = secure_directory(socket_directory(state_dir))
                remote = _remote(self.config, state_dir)
                api = open_doors(self.config.api, os.environ)
            except (AccessError, ListenError, TokenError) as error:
                raise SupervisorError(str(error)) from error
            stack.callback(api.close)
            return _Tree(self.config, state_dir, sockets, remote, api, stack).run()


def _require_program(config: SupervisorConfig) -> None:
    """Raises SupervisorError where a program is named that machines could not have."""
    program = config.machines.virtiofsd
    if program is not None and not (program.is_file() and os.access(program, os.X_OK)):
        raise SupervisorError(
            f"machines.virtiofsd: {program} is no program that this user may run; install "
            "virtiofsd 1.13 or later and name it, or leave it unset"
        )


def _remote(config: SupervisorConfig, state_dir: Path) -> Endpoints | None:
    """Where to listen for other machines. Raises AccessError where there are no keys for it."""
    given = config.remote
    urls = {Right.OBSERVE: given.observe, Right.OPERATE: given.operate}
    rights = {right: url for right, url in urls.items() if url is not None}
    if not rights and given.topics is None:
        return None
    folder = given.keys or state_dir / KEYS_FOLDER
    try:
        return remote_endpoints(folder, rights, given.topics or "")
    except AccessError as error:
        raise AccessError(f"{error}. Make them: voidbus keys server --folder {folder}") from error


class _Tree:
    """Hub, zygote and actors, built in order and taken down in reverse by the stack."""

    def __init__(
        self,
        config: SupervisorConfig,
        state_dir: Path,
        sockets: Path,
        remote: Endpoints | None,
        api: Opened,
        stack: contextlib.ExitStack,
    ) -> None:
        self._config = config
        self._state_dir = state_dir
        self._sockets = sockets
        self._remote = remote
        self._api = api
        self._stack = stack
        self._over = threading.Event()
        self._reason: ExitReason | None = None
        self._signals = 0
        self._stop_asked: str | None = None
        self._root: Root | None = None

    def run(self) -> int:
        spawner = Spawner(
            on_exit=self._exited, preload=PRELOAD, entries=frozenset({ENTRY}), use_zygote=True
        )
        self._stack.callback(spawner.close)
        # The zygote imports for a moment; meanwhile the rest comes up.
        warming = threading.Thread(target=spawner.start, name="zygote-start", daemon=True)
        warming.start()
        self._stack.callback(warming.join, 10.0)
        self._hub = self._make_hub()
        self._stack.callback(self._hub.close)
        # What run processes say of themselves: their actors' liveness.
        self._hub.subscribe(run_node(""), _log_liveness)
        system = System(self._hub)
        self._stack.callback(system.stop, 10.0)
        identity = Identity(version("voidbus"), str(self._state_dir), timestamp(time.time_ns()))
        self._root = system.start(
            Root, ROOT_PATH, self._children(system, spawner), identity, self._stopped
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._await_runs()
        self._describe(identity)
        self._stack.callback(self._undescribe)
        _notify_systemd("READY=1")
        for url in self._api.urls:
            # Who starts a supervisor to drive it by HTTP waits for this line.
            print(f"[voidbus] daemon listening on {url}", flush=True)
        log.info("supervisor %d is up, state in %s", os.getpid(), self._state_dir)
        while not self._over.wait(timeout=3600.0):
            pass  # a signal's handler runs between waits
        for number in (signal.SIGTERM, signal.SIGINT):
            # The handler takes a lock that taking everything down takes too.
            signal.signal(number, signal.SIG_IGN)
        _notify_systemd("STOPPING=1")
        assert self._reason is not None
        if self._reason.kind is ExitKind.FAULT:
            log.error("the supervisor failed: %s", self._reason.detail)
            return 1
        return 0

    def _make_hub(self) -> Hub:
        try:
            hub = Hub(
                HUB_NAME,
                ipc_endpoints(self._sockets),
                remote=self._remote,
                on_join=self._joined,
                hold_work=True,
            )
        except zmq.ZMQError as error:
            wanted = self._config.remote
            urls = [url for url in (wanted.observe, wanted.operate, wanted.topics) if url]
            where = ", ".join([str(self._sockets), *urls])
            raise SupervisorError(
                f"cannot listen on all of {where}: {error.strerror}; see who listens there, or "
                "configure other addresses"
            ) from error
        if hub.remote is not None:
            bound = [*hub.remote.rights.values(), hub.remote.topics]
            log.info("for other machines: %s", ", ".join(filter(None, bound)))
        return hub

    def _children(self, system: System, spawner: Spawner) -> tuple[ChildSpec, ...]:
        config = self._config

        def permanent(name: str) -> ChildPolicy:
            return ChildPolicy(name, Restart.PERMANENT, stop_timeout=5.0)

        settings = RunsSettings(
            runs_dir=self._state_dir / "runs",
            artifacts_dir=self._state_dir / ARTIFACTS_FOLDER,
            max_parallel=config.max_parallel_runs,
            adoption_deadline=config.adoption_deadline_secs,
            machines=config.machines,
        )
        return (
            actor_child(
                system,
                permanent("journal"),
                Journal,
                self._state_dir / JOURNAL_FILE,
                "supervisor/runs",
            ),
            actor_child(
                system,
                permanent("telemetry"),
                Telemetry,
                interval=config.telemetry.interval_secs,
                ring_size=config.telemetry.buffer_size,
            ),
            actor_child(
                system,
                permanent("archive"),
                Archive,
                ArtifactStore(settings.artifacts_dir),
                settings.runs_dir,
                _retention(config),
            ),
            actor_child(
                system,
                permanent("runs"),
                Runs,
                settings,
                self._hub,
                spawner,
                f"supervisor/{ROOT_PATH}",
            ),
            *self._gateway(system),
        )

    def _gateway(self, system: System) -> tuple[ChildSpec, ...]:
        """Last, for it asks all others; the import takes a while, and not all offer the API."""
        if not self._api.doors:
            return ()
        from voidbus.gateway.actor import Gateway

        policy = ChildPolicy(GATEWAY_PATH, Restart.PERMANENT, stop_timeout=7.0)
        doors = self._api.doors
        return (actor_child(system, policy, Gateway, doors, version("voidbus"), path=GATEWAY_PATH),)

    def _await_runs(self) -> None:
        """Wait until the last of the actors answers: who reads the description may rely on it."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._over.is_set() and time.monotonic() < deadline:
            outcome = self._hub.ask("supervisor/runs", CountRuns(), timeout=_START_SECONDS).wait()
            if not isinstance(outcome, Fault):
                return
            self._over.wait(0.01)

    # -- called by other threads -----------------------------------------------------------

    def _exited(self, identity: ProcessIdentity, returncode: int | None) -> None:
        self._hub.tell(
            "supervisor/runs",
            ProcessExited(pid=identity.pid, start_time=identity.start_time, returncode=returncode),
        )

    def _joined(self, hello: Hello) -> None:
        if not hello.node.startswith(CLIENT_PREFIX):
            self._hub.tell("supervisor/runs", NodeJoined(node=hello.node))

    def _stopped(self, reason: ExitReason) -> None:
        self._reason = reason
        self._over.set()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        """The first signal stops politely, the second cancels what runs, the third leaves it."""
        self._signals += 1
        root = self._root
        if root is None:
            return
        deadline = self._config.stop_deadline_secs
        modes = {
            1: StopSupervisor(runs="finish", deadline=deadline),
            2: StopSupervisor(runs="cancel", deadline=min(deadline, 10.0)),
        }
        message = modes.get(self._signals, StopSupervisor(runs="leave", deadline=1.0))
        root.post(lambda: root.stop_supervisor(message))

    # -- how others find us ----------------------------------------------------------------

    def _describe(self, identity: Identity) -> None:
        own = current_identity()
        described = {
            "pid": own.pid,
            "start_time": own.start_time,
            "version": identity.version,
            "sockets": str(self._sockets),
            "api": list(self._api.urls),
            "started_at": identity.started_at,
        }
        path = self._state_dir / DESCRIPTION_FILE
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(described) + "\n")
        fresh.replace(path)

    def _undescribe(self) -> None:
        with contextlib.suppress(OSError):
            (self._state_dir / DESCRIPTION_FILE).unlink()


def _retention(config: SupervisorConfig) -> Retention:
    days = config.retention.max_age_days
    return Retention(None if days is None else days * 86_400, config.retention.max_bytes)


def _log_liveness(publication: Publication) -> None:
    node, message = publication.topic.partition("/")[0], publication.message
    if publication.topic != liveness_topic(node):
        return
    if isinstance(message, ActorStuck):
        # A run process may publish what it likes; a log has a line for each event.
        said = (message.path[:200], message.handler[:200], message.seconds)
        log.error("%s: its actor %r is stuck: in %r for %.0f s", node, *said)
    elif isinstance(message, ActorWentOn):
        log.warning("%s: its actor %r goes on", node, message.path[:200])


def _notify_systemd(state: str) -> None:
    """Tell systemd, where it started us (sd_notify(3))."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify,
    ):
        notify.sendto(state.encode(), address)
