"""Intents on disk while they wait, so that those of a run process that is killed are not lost.

A file in the run's directory holds all that wait, a line of JSON each. It is replaced as a whole
whenever they change: there are few of them, and what a SIGKILL leaves is those that waited before
the change or after it, never half a line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from voidbus.actors.messages.sidecar import IntentList
from voidbus.sidecar.intents import MAX_BUFFERED_INTENTS, MAX_PAYLOAD_BYTES
from voidbus.sidecar.model import InboxSnapshot, Intent
from voidbus.sidecar.state import Loaded, SidecarState, Submitted

log = logging.getLogger("voidbus.actors")

# A file larger than all intents that can wait is not ours; an intent's stamp is short (bytes).
_FILE_LIMIT = MAX_BUFFERED_INTENTS * 2 * MAX_PAYLOAD_BYTES
# They are handed out as one message, of 4 MiB at most (bytes).
_LIST_LIMIT = 3 * 1024 * 1024


class KeptState(SidecarState):
    """A sidecar's state that keeps the waiting intents in the file `path` too.

    They are there before the agent is told that an intent was accepted. A disk that takes nothing
    does not keep them from being drained; they are written with the next change.
    """

    def __init__(self, path: Path, *, execution_id: str, candidate_id: str) -> None:
        super().__init__(execution_id=execution_id, candidate_id=candidate_id)
        self._path = path

    def submit(self, body: bytes, *, idempotency_key: str | None = None) -> Submitted:
        submitted = super().submit(body, idempotency_key=idempotency_key)
        if not all(submitted.duplicates):
            self._keep()
        return submitted

    def load_inbox(self, snapshot: InboxSnapshot) -> Loaded:
        loaded = super().load_inbox(snapshot)
        if loaded.expired:
            self._keep()
        return loaded

    def acknowledge(self, intent_ids: Iterable[str]) -> int:
        removed = super().acknowledge(intent_ids)
        if removed:
            self._keep()
        return removed

    def _keep(self) -> None:
        fresh = self._path.with_suffix(".new")
        try:
            fresh.touch(mode=0o600)
            fresh.write_text("".join(f"{intent.model_dump_json()}\n" for intent in self.peek()))
            fresh.replace(self._path)
        except OSError as error:
            log.error(
                "cannot write the waiting intents to %s: %s; a kill would lose them",
                self._path,
                error,
            )
            fresh.unlink(missing_ok=True)


def read_kept(path: Path) -> tuple[Intent, ...]:
    """The intents that waited when the run process died, oldest first, as many as fit in a message.

    None where it kept none. What can't be read, or handed on, is logged and left out: it must not
    keep the run from ending.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(_FILE_LIMIT).splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        log.error("the intents in %s cannot be read and are lost: %s", path, error)
        return ()
    intents: list[Intent] = []
    size = 0
    for number, line in enumerate(lines[:MAX_BUFFERED_INTENTS], 1):
        size += len(line)
        if size > _LIST_LIMIT:
            log.error("%d intents in %s are lost: too many", len(lines) - number + 1, path)
            break
        try:
            intents.append(_read(line))
        except ValueError as error:
            log.error("the intent in line %d of %s is lost: %s", number, path, error)
    return tuple(intents)


def _read(line: bytes) -> Intent:
    """One intent. Raises ValueError, also for one nested so deep that no message can carry it."""
    listed = IntentList(run_id="", intents=(Intent.model_validate_json(line),))
    return IntentList.from_json(listed.to_json()).intents[0]
