"""The archive actor: hands out the files that runs have left, and forgets what is too old.

Blocking reads of the disk are jobs; which file is whose, the journal knows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from voidbus.actors.artifact_store import ArtifactStore, unlisted_before
from voidbus.actors.console_file import forget_consoles
from voidbus.actors.messages.actor import detail_of
from voidbus.actors.messages.archive import ArchivePruned, PruneArchive
from voidbus.actors.messages.artifacts import (
    ArtifactList,
    ArtifactPart,
    FindArtifact,
    ReadArtifact,
    StoredArtifact,
)
from voidbus.actors.messages.journal import (
    ActiveRuns,
    FindUnlisted,
    LoadActive,
    PruneRuns,
    RunsPruned,
    Unlisted,
)
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

_JOURNAL = "supervisor/journal"
_ASK_TIMEOUT = 15.0
# How often what the configuration says about keeping is done (seconds).
_RETENTION_SECONDS = 3600.0
_RETENTION_FIRST_SECONDS = 30.0
_DIGESTS_AT_ONCE = 1000
_RUNS_NAMED = 1000


@dataclass(frozen=True)
class Retention:
    """How long ended runs are kept; None is for ever. `max_age` in seconds, `max_bytes` of all."""

    max_age: float | None = None
    max_bytes: int | None = None


@dataclass
class _Pruning:
    """A prune under way."""

    message: PruneArchive
    then: Callable[[ArchivePruned | str], None]
    runs: list[str] = field(default_factory=list)
    count: int = 0
    size: int = 0


class Archive(Actor):
    """What ended runs left: files, and how long they are kept."""

    mailbox_limit = 1024

    def __init__(
        self, place: Place, store: ArtifactStore, runs_dir: Path, retention: Retention
    ) -> None:
        super().__init__(place)
        self._store = store
        self._runs_dir = runs_dir
        self._retention = retention
        self._pruning = False

    def on_start(self) -> None:
        if self._retention != Retention():
            self.after(_RETENTION_FIRST_SECONDS, self._keep_to_retention)

    # -- files -----------------------------------------------------------------------------

    @handles(ReadArtifact)
    def on_read(self, message: ReadArtifact, delivery: Delivery) -> object:
        def found(outcome: Message) -> None:
            if not isinstance(outcome, ArtifactList):
                delivery.reply(outcome)
            elif not outcome.artifacts:
                named = f"artifact {message.name!r}" if message.name else "output file"
                delivery.fail(
                    FaultReason.NO_SUCH_ACTOR,
                    f"no {named} of stage {message.stage!r} is kept of run {message.run_id}",
                )
            elif message.digest not in (None, outcome.artifacts[0].digest):
                detail = "it was published anew meanwhile; read it again from its beginning"
                delivery.fail(FaultReason.STALE, detail)
            else:
                self._read(outcome.artifacts[0], message, delivery)

        find = FindArtifact(run_id=message.run_id, stage=message.stage, name=message.name)
        self.ask(_JOURNAL, find, found, timeout=_ASK_TIMEOUT)
        return LATER

    def _read(self, artifact: StoredArtifact, message: ReadArtifact, delivery: Delivery) -> None:
        def read(outcome: bytes | Exception) -> None:
            if isinstance(outcome, bytes):
                part = ArtifactPart(artifact=artifact, offset=message.offset)
                delivery.reply(part, [outcome])
            else:
                log.error("run %s: %s", message.run_id, outcome)  # with the path, which is ours
                why = outcome.strerror if isinstance(outcome, OSError) else outcome
                delivery.fail(FaultReason.FAILED, f"the file is listed and can't be read: {why}")

        try:
            self.work(
                lambda: self._store.read(artifact.digest, message.offset, message.limit),
                read,
                name="read",
            )
        except Refuse:  # as many are being read as may be: this one waits its turn
            self.after(0.02, lambda: self._read(artifact, message, delivery))

    # -- forgetting ------------------------------------------------------------------------

    @handles(PruneArchive)
    def on_prune(self, message: PruneArchive, delivery: Delivery) -> object:
        if self._pruning:
            raise Refuse("another prune is under way; try again", FaultReason.OVERLOADED)

        def pruned(outcome: ArchivePruned | str) -> None:
            if isinstance(outcome, ArchivePruned):
                delivery.reply(outcome)
            else:
                delivery.fail(FaultReason.FAILED, outcome)

        self._prune(message, pruned)
        return LATER

    def _keep_to_retention(self) -> None:
        def pruned(outcome: ArchivePruned | str) -> None:
            self.after(_RETENTION_SECONDS, self._keep_to_retention)
            if isinstance(outcome, str):
                log.error("old runs could not be forgotten: %s", outcome)
            elif outcome.count:
                log.info("forgot %d old runs of %d bytes", outcome.count, outcome.size_bytes)

        if self._pruning:
            self.after(_RETENTION_FIRST_SECONDS, self._keep_to_retention)
            return
        keep = self._retention
        self._prune(PruneArchive(older_than=keep.max_age, max_bytes=keep.max_bytes), pruned)

    def _prune(self, message: PruneArchive, then: Callable[[ArchivePruned | str], None]) -> None:
        self._pruning = True

        def over(outcome: ArchivePruned | str) -> None:
            self._pruning = False
            then(outcome)

        self._prune_some(_Pruning(message, over), time.time())

    def _prune_some(self, pruning: _Pruning, now: float) -> None:
        """A few runs at a time, for the journal has more to do."""
        wanted = pruning.message
        before = None if wanted.older_than is None else int((now - wanted.older_than) * 1000)

        def pruned(outcome: Message) -> None:
            if not isinstance(outcome, RunsPruned):
                pruning.then(detail_of(outcome))
                return
            pruning.runs += outcome.runs[: _RUNS_NAMED - len(pruning.runs)]
            pruning.count += len(outcome.runs)
            pruning.size += outcome.size_bytes
            if not wanted.dry_run:
                forget_consoles(self._runs_dir, outcome.runs)
            if outcome.more and not wanted.dry_run:
                self._prune_some(pruning, now)
            elif wanted.dry_run:
                self._done(pruning, 0)
            else:
                self._find_leftovers(pruning)

        message = PruneRuns(before_ms=before, max_bytes=wanted.max_bytes, dry_run=wanted.dry_run)
        self.ask(_JOURNAL, message, pruned, timeout=_ASK_TIMEOUT)

    def _find_leftovers(self, pruning: _Pruning) -> None:
        """Files that nobody lists any more; those a run may be about to list are let be."""

        def active(outcome: Message) -> None:
            if not isinstance(outcome, ActiveRuns):
                pruning.then(detail_of(outcome))
                return
            before = unlisted_before([run.started_at for run, _ in outcome.runs])
            self.work(
                lambda: self._store.older_than(before),
                lambda found: self._sweep(pruning, found, before, 0),
                name="look",
            )

        self.ask(_JOURNAL, LoadActive(), active, timeout=_ASK_TIMEOUT)

    def _sweep(
        self, pruning: _Pruning, found: list[str] | Exception, before: float, freed: int
    ) -> None:
        if isinstance(found, Exception):
            pruning.then(f"the kept files could not be looked through: {found}")
            return
        if not found:
            self._done(pruning, freed)
            return
        some, rest = found[:_DIGESTS_AT_ONCE], found[_DIGESTS_AT_ONCE:]

        def unlisted(outcome: Message) -> None:
            if not isinstance(outcome, Unlisted):
                pruning.then(detail_of(outcome))
                return
            self.work(
                lambda: self._store.remove(outcome.digests, before),
                lambda size: self._sweep(
                    pruning, rest, before, freed + (size if isinstance(size, int) else 0)
                ),
                name="sweep",
            )

        self.ask(_JOURNAL, FindUnlisted(digests=tuple(some)), unlisted, timeout=_ASK_TIMEOUT)

    def _done(self, pruning: _Pruning, freed: int) -> None:
        pruning.then(
            ArchivePruned(
                runs=tuple(pruning.runs),
                count=pruning.count,
                size_bytes=pruning.size,
                freed_bytes=freed,
            )
        )
