"""The tables of the journal's database, and how those of earlier releases become them."""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 2
"""Kept in the database as `user_version`."""

# What version 2 added.
_ADDED = """
CREATE INDEX events_by_id ON events (run_id, event_id);
CREATE TABLE artifacts (
    run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    stage TEXT NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    size INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    PRIMARY KEY (run_id, stage, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX artifacts_by_digest ON artifacts (digest);
CREATE TABLE sessions (
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (id, number)
) STRICT, WITHOUT ROWID;
"""

_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    created INTEGER NOT NULL,
    active INTEGER NOT NULL,
    state TEXT NOT NULL,
    process TEXT NOT NULL,
    intents TEXT NOT NULL DEFAULT '[]',
    ended INTEGER,
    bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX runs_by_activity ON runs (active, created);
CREATE INDEX runs_by_end ON runs (ended) WHERE ended IS NOT NULL;
CREATE TABLE events (
    run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    stream TEXT,
    body TEXT NOT NULL,
    event_id TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;
"""

# From one version to the next, for journals of earlier releases.
_TO_VERSION_2 = """
ALTER TABLE runs ADD COLUMN ended INTEGER;
ALTER TABLE runs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE runs SET ended = created WHERE active = 0;
UPDATE runs SET bytes =
    coalesce((SELECT sum(length(body)) FROM events WHERE events.run_id = runs.id), 0);
CREATE INDEX runs_by_end ON runs (ended) WHERE ended IS NOT NULL;
ALTER TABLE events ADD COLUMN event_id TEXT NOT NULL DEFAULT '';
UPDATE events SET event_id = coalesce(json_extract(body, '$.event_id'), '');
"""
_MIGRATIONS = {1: _TO_VERSION_2 + _ADDED}


def prepare(db: sqlite3.Connection) -> int:
    """Make the tables, or bring those there are to this version; the version it has then, which
    is another one where this release can't read it."""
    # For pruned runs to give their pages back; it has no effect once there are any.
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    script = _SCHEMA + _ADDED if version == 0 else _MIGRATIONS.get(version)
    while script is not None:
        version = SCHEMA_VERSION if version == 0 else version + 1
        db.executescript(f"BEGIN; {script} PRAGMA user_version = {version}; COMMIT;")
        script = _MIGRATIONS.get(version)
    return version
