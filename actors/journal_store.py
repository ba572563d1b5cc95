"""The journal's database: SQLite in WAL mode, one writer.

Every change is one transaction, so a crash leaves a run before a batch or after it. WAL with
`synchronous=NORMAL` keeps what was committed through a crash of the process; a power cut may cost
the last moments (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.journal_schema import SCHEMA_VERSION, prepare
from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.journal import AppendEvents, CreateRun, ProcessRecord
from voidbus.actors.messages.runs import TERMINAL_EVENTS, RunEvent, RunState
from voidbus.sidecar.model import Intent

# Pages of the file given back to the disk after each prune; each is 4 KiB.
_PAGES_FREED = 4096


class JournalError(Exception):
    """The journal could not be read or written; the text says why and what to do."""


class NoSuchRun(JournalError):
    """The journal knows no run of that id."""


class JournalConflict(JournalError):
    """A change that doesn't fit what is there: a gap, an old generation, a run that has ended."""


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Pruned:
    """Runs that were forgotten, and how much they took up; `more`: there are others to forget."""

    runs: tuple[str, ...]
    size: int
    more: bool


class JournalStore:
    """Runs and events on disk. For one thread."""

    def __init__(self, path: Path, now_ms: Callable[[], int] = _now_ms) -> None:
        self._path = path
        self._now_ms = now_ms
        with self._explained():
            # Autocommit; transactions are begun where they begin.
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    # -- changes ---------------------------------------------------------------------------

    def create(self, run: CreateRun, now_ms: int) -> None:
        """Journal a new run. Raises JournalConflict where its id is taken."""
        with self._transaction():
            try:
                self._db.execute(
                    "INSERT INTO runs (id, created, active, state, process) VALUES (?, ?, ?, ?, ?)",
                    (
                        run.state.id,
                        now_ms,
                        not run.state.status.terminal,
                        _with_last_seq(run.state, len(run.events) - 1).model_dump_json(),
                        run.process.model_dump_json(),
                    ),
                )
            except sqlite3.IntegrityError:
                raise JournalConflict(f"there is a run {run.state.id} already") from None
            self._insert(run.state.id, run.events)
            if run.state.status.terminal:
                self._db.execute("UPDATE runs SET ended = ? WHERE id = ?", (now_ms, run.state.id))

    def record_process(self, run_id: str, process: ProcessRecord) -> None:
        with self._transaction():
            state = self.run(run_id)
            state = state.model_copy(
                update={"generation": process.generation, "run_process": process.pid or None}
            )
            self._db.execute(
                "UPDATE runs SET process = ?, state = ? WHERE id = ?",
                (process.model_dump_json(), state.model_dump_json(), run_id),
            )

    def append(self, batch: AppendEvents) -> tuple[RunState, tuple[RunEvent, ...]]:
        """Append a batch; the run's new state and the events that were new.

        Raises NoSuchRun, or JournalConflict for a gap, an old generation or an ended run.
        """
        with self._transaction():
            state = self.run(batch.run_id)
            fresh = tuple(event for event in batch.events if event.seq > state.last_seq)
            if state.status.terminal:
                if not fresh:
                    return state, ()
                raise JournalConflict(f"run {batch.run_id} has ended; it takes no more events")
            if batch.generation != state.generation:
                raise JournalConflict(
                    f"run {batch.run_id} is at generation {state.generation}, not "
                    f"{batch.generation}"
                )
            for expected, event in enumerate(fresh, state.last_seq + 1):
                if event.seq != expected:
                    raise JournalConflict(
                        f"run {batch.run_id}: event {event.seq} would leave a gap after "
                        f"{expected - 1}"
                    )
            self._insert(batch.run_id, fresh)
            self._list(batch.run_id, batch.artifacts)
            terminal = None if batch.outcome is None else self._terminal_event(batch.run_id)
            state = _changed(state, batch, fresh, terminal)
            ended = self._now_ms() if state.status.terminal else None
            self._db.execute(
                "UPDATE runs SET state = ?, active = ?, ended = ? WHERE id = ?",
                (state.model_dump_json(), not state.status.terminal, ended, batch.run_id),
            )
            if batch.outcome is not None:
                intents = json.dumps([i.model_dump(mode="json") for i in batch.outcome.intents])
                self._db.execute(
                    "UPDATE runs SET intents = ? WHERE id = ?", (intents, batch.run_id)
                )
            return state, fresh

    def take_intents(self, run_id: str, *, drain: bool) -> tuple[Intent, ...]:
        with self._transaction():
            row = self._db.execute("SELECT intents FROM runs WHERE id = ?", (run_id,)).fetchone()
            if row is None:
                raise NoSuchRun(f"run '{run_id}' not found")
            if drain:
                self._db.execute("UPDATE runs SET intents = '[]' WHERE id = ?", (run_id,))
            return tuple(Intent.model_validate(item) for item in json.loads(row[0]))

    def forget_intents(self, run_id: str, intent_ids: Iterable[str]) -> None:
        """Take away these of the intents that a run has left; unknown ids are passed over."""
        gone = set(intent_ids)
        with self._transaction():
            row = self._db.execute("SELECT intents FROM runs WHERE id = ?", (run_id,)).fetchone()
            if row is None:
                raise NoSuchRun(f"run '{run_id}' not found")
            kept = [item for item in json.loads(row[0]) if item["intent_id"] not in gone]
            self._db.execute("UPDATE runs SET intents = ? WHERE id = ?", (json.dumps(kept), run_id))

    def prune(self, before_ms: int | None, max_bytes: int | None, limit: int) -> Pruned:
        """Forget the runs that ended by `before_ms`, and the oldest until those that have ended
        take up no more than `max_bytes`; `limit` of them at most, for others wait meanwhile."""
        with self._transaction():
            doomed = self._doomed(before_ms, max_bytes, limit + 1)
            for run_id, _ in doomed[:limit]:
                self._db.execute("DELETE FROM runs WHERE id = ?", (run_id,))
        with self._explained():
            # It frees a page with each step, and `execute` takes one step only.
            self._db.executescript(f"PRAGMA incremental_vacuum({_PAGES_FREED})")
        return Pruned(
            tuple(run_id for run_id, _ in doomed[:limit]),
            sum(size for _, size in doomed[:limit]),
            more=len(doomed) > limit,
        )

    def prunable(self, before_ms: int | None, max_bytes: int | None, limit: int) -> Pruned:
        """What `prune` would forget."""
        with self._explained():
            doomed = self._doomed(before_ms, max_bytes, limit + 1)
        return Pruned(
            tuple(run_id for run_id, _ in doomed[:limit]),
            sum(size for _, size in doomed[:limit]),
            more=len(doomed) > limit,
        )

    def _doomed(
        self, before_ms: int | None, max_bytes: int | None, limit: int
    ) -> list[tuple[str, int]]:
        """Runs to forget, oldest end first, with their sizes."""
        over = 0
        if max_bytes is not None:
            total = self._db.execute("SELECT sum(bytes) FROM runs WHERE ended IS NOT NULL")
            over = int(total.fetchone()[0] or 0) - max_bytes
        doomed: list[tuple[str, int]] = []
        rows = self._db.execute(
            "SELECT id, bytes, ended FROM runs WHERE ended IS NOT NULL ORDER BY ended, id LIMIT ?",
            (limit,),
        )
        for run_id, size, ended in rows:
            if over <= 0 and (before_ms is None or ended > before_ms):
                break
            doomed.append((run_id, size))
            over -= size
        return doomed

    def add_to_session(self, session: str, body: str, limit: int) -> None:
        """Append to a session; the oldest of more than `limit` are forgotten."""
        with self._transaction():
            row = self._db.execute("SELECT max(number) FROM sessions WHERE id = ?", (session,))
            number = int(row.fetchone()[0] or 0) + 1
            self._db.execute("INSERT INTO sessions VALUES (?, ?, ?)", (session, number, body))
            self._db.execute(
                "DELETE FROM sessions WHERE id = ? AND number <= ?", (session, number - limit)
            )

    # -- questions -------------------------------------------------------------------------

    def run(self, run_id: str) -> RunState:
        """One run. Raises NoSuchRun."""
        with self._explained():
            row = self._db.execute("SELECT state FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise NoSuchRun(f"run '{run_id}' not found")
        return RunState.from_json(row[0].encode())

    def kept(self, run_id: str) -> tuple[str, int, bool] | None:
        """One run as JSON, as it is kept, the seq of its newest event, and whether it has ended;
        None where there is no such run."""
        with self._explained():
            row = self._db.execute(
                "SELECT state, json_extract(state, '$.last_seq'), active FROM runs WHERE id = ?",
                (run_id,),
            ).fetchone()
        return None if row is None else (row[0], int(row[1]), not row[2])

    def runs(
        self, *, active: bool | None, limit: int, offset: int = 0
    ) -> tuple[tuple[RunState, ...], int]:
        """The newest runs, and how many there are in all."""
        where = "" if active is None else f" WHERE active = {int(active)}"
        with self._explained():
            total = self._db.execute(f"SELECT count(*) FROM runs{where}").fetchone()[0]  # noqa: S608
            rows = self._db.execute(
                f"SELECT state FROM runs{where} ORDER BY created DESC, id DESC LIMIT ? OFFSET ?",  # noqa: S608 - no text of a caller's
                (limit, offset),
            ).fetchall()
        return tuple(RunState.from_json(row[0].encode()) for row in rows), total

    def active(self) -> tuple[tuple[RunState, ProcessRecord], ...]:
        """Every run that has not ended, oldest first."""
        with self._explained():
            rows = self._db.execute(
                "SELECT state, process FROM runs WHERE active = 1 ORDER BY created, id"
            ).fetchall()
        return tuple(
            (RunState.from_json(state.encode()), ProcessRecord.model_validate_json(process))
            for state, process in rows
        )

    def last_generation(self) -> int:
        with self._explained():
            row = self._db.execute(
                "SELECT max(json_extract(process, '$.generation')) FROM runs"
            ).fetchone()
        return int(row[0] or 0)

    def events(
        self, run_id: str, *, after: int, limit: int, stream: str | None = None
    ) -> tuple[RunEvent, ...]:
        """Events with a seq greater than `after`, in order."""
        query = "SELECT body FROM events WHERE run_id = ? AND seq > ?"
        values: list[str | int] = [run_id, after]
        if stream is not None:
            query += " AND stream = ?"
            values.append(stream)
        with self._explained():
            rows = self._db.execute(query + " ORDER BY seq LIMIT ?", (*values, limit)).fetchall()
        return tuple(RunEvent.model_validate_json(row[0]) for row in rows)

    def raw_events(
        self, run_id: str, *, after: int, limit: int, stream: str | None, max_bytes: int
    ) -> tuple[list[str], int]:
        """Events as they are kept, with a seq greater than `after`, in order, as many as
        `max_bytes` hold but one at least; and the seq of the last. `stream` "*" is any stream."""
        query = "SELECT seq, body FROM events WHERE run_id = ? AND seq > ?"
        values: list[str | int] = [run_id, after]
        if stream == "*":
            query += " AND stream IS NOT NULL"
        elif stream is not None:
            query += " AND stream = ?"
            values.append(stream)
        bodies: list[str] = []
        size, last = 0, after
        with self._explained():
            for seq, body in self._db.execute(query + " ORDER BY seq LIMIT ?", (*values, limit)):
                size += len(body)
                if bodies and size > max_bytes:
                    break
                bodies.append(body)
                last = seq
        return bodies, last

    def seq_of(self, run_id: str, event_id: str) -> int | None:
        """The seq of an event of a run; None where there is none of that id."""
        with self._explained():
            row = self._db.execute(
                "SELECT seq FROM events WHERE run_id = ? AND event_id = ?", (run_id, event_id)
            ).fetchone()
        return None if row is None else int(row[0])

    def artifact(self, run_id: str, stage: str, name: str) -> StoredArtifact | None:
        """A file that is kept of a run."""
        with self._explained():
            row = self._db.execute(
                f"SELECT {_ARTIFACT} FROM artifacts WHERE run_id = ? AND stage = ? AND name = ?",  # noqa: S608
                (run_id, stage, name),
            ).fetchone()
        return None if row is None else _artifact(row)

    def artifacts(self, run_id: str, limit: int) -> tuple[StoredArtifact, ...]:
        """The files that are kept of a run."""
        with self._explained():
            rows = self._db.execute(
                f"SELECT {_ARTIFACT} FROM artifacts WHERE run_id = ? ORDER BY stage, name LIMIT ?",  # noqa: S608
                (run_id, limit),
            ).fetchall()
        return tuple(_artifact(row) for row in rows)

    def unlisted(self, digests: Iterable[str]) -> tuple[str, ...]:
        """Those of these contents that no run lists."""
        with self._explained():
            return tuple(
                digest
                for digest in digests
                if self._db.execute(
                    "SELECT 1 FROM artifacts WHERE digest = ? LIMIT 1", (digest,)
                ).fetchone()
                is None
            )

    def session(self, session: str) -> list[str]:
        """What was said in a session, oldest first."""
        with self._explained():
            rows = self._db.execute(
                "SELECT body FROM sessions WHERE id = ? ORDER BY number", (session,)
            ).fetchall()
        return [row[0] for row in rows]

    def counts(self) -> dict[str, int]:
        """How many runs there are of each status."""
        with self._explained():
            rows = self._db.execute(
                "SELECT json_extract(state, '$.status'), count(*) FROM runs GROUP BY 1"
            ).fetchall()
        return {str(status): int(count) for status, count in rows}

    def active_counts(self) -> tuple[int, int]:
        """The machines that are up and the stages that run, of all runs."""
        with self._explained():
            machines, stages = self._db.execute(
                "SELECT sum(json_extract(state, '$.active_microvm_count')),"
                " sum(json_extract(state, '$.active_stage_count')) FROM runs WHERE active = 1"
            ).fetchone()
        return int(machines or 0), int(stages or 0)

    def stage_events(self, run_id: str) -> tuple[RunEvent, ...]:
        """All events of a run that tell of its stages, in order."""
        with self._explained():
            rows = self._db.execute(
                # Log lines, which are most of all events, have a stream, and are not looked into.
                "SELECT body FROM events WHERE run_id = ? AND stream IS NULL"
                " AND json_extract(body, '$.event_type') GLOB 'stage.*' ORDER BY seq",
                (run_id,),
            ).fetchall()
        return tuple(RunEvent.model_validate_json(row[0]) for row in rows)

    # -- inside ----------------------------------------------------------------------------

    def _prepare(self) -> None:
        version = prepare(self._db)
        if version != SCHEMA_VERSION:
            raise JournalError(
                f"{self._path} was written by another version of voidbus (schema {version}; this "
                f"one has {SCHEMA_VERSION}); use that version, or another --state-dir"
            )

    def _insert(self, run_id: str, events: Iterable[RunEvent]) -> None:
        rows = [
            (run_id, event.seq, event.stream, event.model_dump_json(), event.event_id)
            for event in events
        ]
        self._db.executemany(
            "INSERT INTO events (run_id, seq, stream, body, event_id) VALUES (?, ?, ?, ?, ?)", rows
        )
        self._grow(run_id, sum(len(row[3]) for row in rows))

    def _terminal_event(self, run_id: str) -> RunEvent | None:
        """The newest event that ends the run: also where it came before the outcome."""
        row = self._db.execute(
            "SELECT body FROM events WHERE run_id = ? AND stream IS NULL"
            " AND json_extract(body, '$.event_type') IN (?, ?, ?) ORDER BY seq DESC LIMIT 1",
            (run_id, *TERMINAL_EVENTS),
        ).fetchone()
        return None if row is None else RunEvent.model_validate_json(row[0])

    def _list(self, run_id: str, artifacts: Iterable[StoredArtifact]) -> None:
        for each in artifacts:
            known = self.artifact(run_id, each.stage, each.name)
            self._db.execute(
                "INSERT OR REPLACE INTO artifacts (run_id, stage, name, digest, size, media_type)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (run_id, each.stage, each.name, each.digest, each.size_bytes, each.media_type),
            )
            self._grow(run_id, each.size_bytes - (known.size_bytes if known else 0))

    def _grow(self, run_id: str, size: int) -> None:
        if size:
            self._db.execute("UPDATE runs SET bytes = bytes + ? WHERE id = ?", (size, run_id))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ones an operator can act on."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            remedy = {
                "database or disk is full": "free space on that disk",
                "attempt to write a readonly database": "make it writable for this user",
                "unable to open database file": "make its directory exist and writable",
                "disk I/O error": "check that disk, and that it has space left",
                "file is not a database": "move it away; it is damaged or no journal",
                "database disk image is malformed": "move it away; it is damaged",
            }.get(text, "see the supervisor's log")
            raise JournalError(f"journal {self._path}: {text}; {remedy}") from error


_ARTIFACT = "stage, name, digest, size, media_type"


def _artifact(row: tuple[str, str, str, int, str]) -> StoredArtifact:
    stage, name, digest, size, media_type = row
    return StoredArtifact(
        stage=stage, name=name, media_type=media_type, size_bytes=size, digest=digest
    )


def _with_last_seq(state: RunState, last_seq: int) -> RunState:
    return state.model_copy(update={"last_seq": last_seq})


def _changed(
    state: RunState, batch: AppendEvents, fresh: tuple[RunEvent, ...], terminal: RunEvent | None
) -> RunState:
    update: dict[str, object] = {}
    if fresh:
        update.update(last_seq=fresh[-1].seq, updated_at=fresh[-1].timestamp)
    if batch.progress is not None:
        update.update(dict(batch.progress))
    if batch.outcome is not None:
        outcome = batch.outcome
        update.update(
            status=outcome.status,
            error=outcome.error,
            terminal_reason=outcome.terminal_reason,
            exit_code=outcome.exit_code,
            report=outcome.report,
            finished_at=terminal.timestamp if terminal else state.updated_at,
            terminal_event_id=terminal.event_id if terminal else None,
            active_stage_count=0,
            active_microvm_count=0,
            run_process=None,
            cancelling=False,
        )
    return state.model_copy(update=update)
