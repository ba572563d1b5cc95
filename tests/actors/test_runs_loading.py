"""What is asked of runs before a supervisor knows those of the one before it."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from actor_kit import PATIENCE
from journal_kit import NOW

from voidbus.actors.messages.actor import Accepted, Done
from voidbus.actors.messages.journal import (
    ActiveRuns,
    CountRuns,
    LoadActive,
    ProcessRecord,
    RunCount,
    RunsStopped,
    StopRuns,
)
from voidbus.actors.messages.run_process import CancelWork
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    RunState,
    RunStatus,
    run_node,
)
from voidbus.actors.run import RUN_PATH
from voidbus.actors.runs import Runs, RunsSettings
from voidbus.actors.runtime.process import identity_of
from voidbus.actors.runtime.spawner import Spawner
from voidbus.actors.runtime.system import System
from voidbus.transport.access import ipc_endpoints, secure_directory
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right

RUN = "run-1"


class Told:
    """Answers what it is asked, and keeps what it got."""

    def __init__(self, reply: Message) -> None:
        self._reply = reply
        self.got: list[Message] = []
        self._changed = threading.Condition()

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        with self._changed:
            self.got.append(delivery.message)
            self._changed.notify_all()
        delivery.reply(self._reply)
        return None

    def wait(self, kind: type[Message]) -> Message:
        def found() -> Message | None:
            return next((each for each in self.got if isinstance(each, kind)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, PATIENCE)
            message = found()
        assert message is not None
        return message


class SlowJournal:
    """Knows one running run, and tells of it when it is let."""

    def __init__(self, process: ProcessRecord) -> None:
        self._state = RunState(
            id=RUN, status=RunStatus.RUNNING, file="a.yaml", started_at=NOW, updated_at=NOW
        )
        self._process = process
        self._load: Delivery | None = None
        self._asked = threading.Event()

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        if isinstance(delivery.message, LoadActive):
            self._load = delivery
            self._asked.set()
        elif isinstance(delivery.message, InspectRun):
            delivery.reply(self._state)
        else:
            delivery.reply(Done())
        return None

    def tell(self) -> None:
        active = ((self._state, self._process),)
        self._asked_to_load().reply(ActiveRuns(runs=active, last_generation=1))

    def fail(self) -> None:
        self._asked_to_load().fail(FaultReason.FAILED, "the disk is broken")

    def _asked_to_load(self) -> Delivery:
        assert self._asked.wait(PATIENCE)
        assert self._load is not None
        return self._load


class Restarted:
    """A supervisor that was started again, whose run's process has come back already."""

    def __init__(self, folder: Path) -> None:
        self.child = subprocess.Popen(["sleep", "60"])
        identity = identity_of(self.child.pid)
        digest = token_digest("secret")
        self.hub = Hub("supervisor", ipc_endpoints(secure_directory(folder / "bus")))
        self.hub.expect(run_node(RUN), digest, 1)
        self.leaf = Leaf(
            run_node(RUN), self.hub.addresses[Right.WORK], token="secret", generation=1
        )
        self.run = Told(Accepted(operation="cancel"))
        self.leaf.attach(RUN_PATH, self.run)
        assert self.leaf.wait_up(PATIENCE)
        self.journal = SlowJournal(
            ProcessRecord(
                generation=1,
                token_digest=digest.hex(),
                pid=identity.pid,
                start_time=identity.start_time,
            )
        )
        self.root = Told(Done())
        self.hub.attach("journal", self.journal)
        self.hub.attach("root", self.root)
        self.system = System(self.hub)
        self.spawner = Spawner(on_exit=lambda *_: None, use_zygote=False)
        settings = RunsSettings(folder / "runs", folder / "artifacts", 8, PATIENCE)
        self.system.start(Runs, "runs", settings, self.hub, self.spawner, "supervisor/root")

    def close(self) -> None:
        self.child.kill()
        self.child.wait(PATIENCE)
        self.system.stop(PATIENCE)
        self.spawner.close()
        self.leaf.close()
        self.hub.close()


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Restarted]:
    supervisor = Restarted(tmp_path)
    try:
        yield supervisor
    finally:
        supervisor.close()


def test_a_cancel_is_carried_out_once_its_run_is_known(restarted: Restarted) -> None:
    asked = restarted.hub.ask("supervisor/runs", CancelRun(run_id=RUN), timeout=PATIENCE)
    restarted.journal.tell()
    accepted = asked.result()
    assert isinstance(accepted, CancelAccepted)
    assert isinstance(restarted.run.wait(CancelWork), CancelWork)


def test_a_stop_cancels_runs_that_were_not_known_when_it_came(restarted: Restarted) -> None:
    stop = StopRuns(mode="cancel", deadline=20.0)
    restarted.hub.ask("supervisor/runs", stop, timeout=PATIENCE)
    restarted.journal.tell()
    assert isinstance(restarted.run.wait(CancelWork), CancelWork)


def test_a_stop_that_leaves_runs_alone_waits_for_nothing(restarted: Restarted) -> None:
    stop = StopRuns(mode="leave", deadline=20.0)
    restarted.hub.ask("supervisor/runs", stop, timeout=PATIENCE)
    assert isinstance(restarted.root.wait(RunsStopped), RunsStopped)
    restarted.journal.tell()


def test_a_journal_that_cannot_be_read_keeps_nobody_from_stopping(restarted: Restarted) -> None:
    stop = StopRuns(mode="cancel", deadline=20.0)
    restarted.hub.ask("supervisor/runs", stop, timeout=PATIENCE)
    restarted.journal.fail()
    assert isinstance(restarted.root.wait(RunsStopped), RunsStopped)


def test_what_has_expired_meanwhile_is_not_carried_out(restarted: Restarted) -> None:
    cancel = CancelRun(run_id=RUN)
    expired = restarted.hub.ask("supervisor/runs", cancel, timeout=0.01).wait()
    assert isinstance(expired, Fault)
    assert expired.reason is FaultReason.EXPIRED
    restarted.journal.tell()
    counted = restarted.hub.ask("supervisor/runs", CountRuns(), timeout=PATIENCE).result()
    assert counted == RunCount(active=1, adopted=1)
    # Behind what the runs actor may have sent by the same link.
    question = InspectRun(run_id=RUN)
    restarted.hub.ask(f"{run_node(RUN)}/{RUN_PATH}", question, timeout=PATIENCE).result()
    assert restarted.run.got == [question]
