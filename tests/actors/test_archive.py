"""The archive actor: parts of files, and what is swept when runs are forgotten."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from actor_kit import PATIENCE
from journal_kit import a_batch, a_run

from voidbus.actors.archive import Archive, Retention
from voidbus.actors.artifact_store import ArtifactStore
from voidbus.actors.journal import Journal
from voidbus.actors.messages.archive import ArchivePruned, PruneArchive
from voidbus.actors.messages.artifacts import ArtifactPart, ReadArtifact, StoredArtifact
from voidbus.actors.messages.journal import RunOutcome
from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.runtime.system import System
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Ask
from voidbus.transport.fault import BusError, Fault, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message


class Place:
    """A journal and an archive on a hub."""

    def __init__(self, folder: Path, retention: Retention) -> None:
        self.folder = folder
        self.hub = Hub("supervisor", inproc_endpoints(f"archive-{time.monotonic_ns()}"))
        self.system = System(self.hub)
        self.store = ArtifactStore(folder / "artifacts")
        self.system.start(Journal, "journal", folder / "journal.sqlite", "supervisor/runs")
        self.system.start(Archive, "archive", self.store, folder / "runs", retention)

    def begin(self, message: Message, path: str = "archive") -> Ask:
        return self.hub.ask(f"supervisor/{path}", message, timeout=PATIENCE, sender="test")

    def ask(self, message: Message, path: str = "archive") -> Message:
        return self.begin(message, path).result()

    def run(self, run_id: str, content: bytes, *, over: bool = True) -> StoredArtifact:
        """A run that has left one file."""
        self.ask(a_run(run_id), "journal")
        artifact = StoredArtifact(
            stage="s",
            name="",
            media_type="text/plain",
            size_bytes=len(content),
            digest=self.store.put(content),
        )
        outcome = RunOutcome(status=RunStatus.SUCCEEDED) if over else None
        batch = a_batch(run_id, first=2, outcome=outcome)
        self.ask(batch.model_copy(update={"artifacts": (artifact,)}), "journal")
        return artifact

    def age(self, seconds: float) -> None:
        for path in (self.folder / "artifacts").rglob("*"):
            if path.is_file():
                then = time.time() - seconds
                os.utime(path, (then, then))

    def close(self) -> None:
        self.system.stop(PATIENCE)
        self.hub.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    built = Place(tmp_path, Retention())
    yield built
    built.close()


def read(place: Place, **fields: object) -> bytes:
    asked = place.begin(ReadArtifact.model_validate({"run_id": "a", "stage": "s", **fields}))
    part = asked.result()
    assert isinstance(part, ArtifactPart)
    return asked.attachments[0]


def test_a_file_is_read_in_parts_of_one_content(place: Place) -> None:
    artifact = place.run("a", b"0123456789")
    assert read(place, offset=2, limit=3) == b"234"
    assert read(place, offset=8, digest=artifact.digest) == b"89"
    assert read(place, offset=99) == b""
    with pytest.raises(BusError) as stale:
        read(place, digest="f" * 64)
    assert stale.value.reason is FaultReason.STALE


def test_what_is_not_kept_is_said_by_name(place: Place) -> None:
    place.run("a", b"x")
    with pytest.raises(BusError, match="no artifact 'y' of stage 's' is kept of run a"):
        read(place, name="y")
    with pytest.raises(BusError, match="run 'nope' not found"):
        read(place, run_id="nope")


def test_a_listed_file_that_is_gone_from_disk_is_a_fault_and_no_crash(place: Place) -> None:
    artifact = place.run("a", b"x")
    (place.folder / "artifacts" / artifact.digest[:2] / artifact.digest[2:]).unlink()
    with pytest.raises(BusError, match=r"listed and can't be read: No such file or directory"):
        read(place)
    place.run("b", b"y")
    assert read(place, run_id="b") == b"y"


def test_a_prune_sweeps_files_nobody_lists_any_more_and_keeps_shared_ones(place: Place) -> None:
    place.run("a", b"only a")
    shared = place.run("b", b"shared")
    place.run("c", b"shared", over=False)
    consoles = place.folder / "consoles"
    consoles.mkdir()
    (consoles / "a.log").write_text("boot")
    # The run that goes on began long ago, so that the files are older than it by their age only.
    place.age(10**9)
    pruned = place.ask(PruneArchive(older_than=0.0))
    assert isinstance(pruned, ArchivePruned)
    assert set(pruned.runs) == {"a", "b"}
    assert (pruned.count, pruned.freed_bytes) == (2, 6)
    assert place.store.read(shared.digest, 0, 9) == b"shared"
    assert not (consoles / "a.log").exists()


def test_a_dry_run_forgets_nothing(place: Place) -> None:
    place.run("a", b"x")
    pruned = place.ask(PruneArchive(older_than=0.0, dry_run=True))
    assert isinstance(pruned, ArchivePruned)
    assert pruned.runs == ("a",)
    assert read(place) == b"x"


def test_many_runs_are_forgotten_a_few_at_a_time(place: Place) -> None:
    for number in range(20):
        place.run(f"r{number}", b"x")
    pruned = place.ask(PruneArchive(max_bytes=0))
    assert isinstance(pruned, ArchivePruned)
    assert (pruned.count, len(pruned.runs)) == (20, 20)


def test_what_the_configuration_says_about_keeping_is_done_by_itself(tmp_path: Path) -> None:
    """The clock of the system says when; here half a minute passes at once."""
    passed = threading.Event()
    hub = Hub("supervisor", inproc_endpoints(f"archive-{time.monotonic_ns()}"))
    began = time.monotonic()
    system = System(hub, clock=lambda: time.monotonic() + (60.0 if passed.is_set() else 0.0))
    built = Place.__new__(Place)
    built.folder, built.hub, built.system = tmp_path, hub, system
    built.store = ArtifactStore(tmp_path / "artifacts")
    try:
        system.start(Journal, "journal", tmp_path / "journal.sqlite", "supervisor/runs")
        built.run("a", b"x")
        system.start(Archive, "archive", built.store, tmp_path / "runs", Retention(max_age=0.0))
        passed.set()
        deadline = began + PATIENCE
        message = ReadArtifact(run_id="a", stage="s")
        while time.monotonic() < deadline:
            # Any message has the actor look at its timers.
            outcome = built.begin(message).wait()
            if isinstance(outcome, Fault):
                break
        assert isinstance(outcome, Fault), "the run was not forgotten"
        assert outcome.reason is FaultReason.NO_SUCH_ACTOR
    finally:
        built.close()
