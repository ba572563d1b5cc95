"""The archive: what ended runs have left on disk, and how it is forgotten."""

from __future__ import annotations

from pydantic import Field

from voidbus.transport.message import Message, Right


class PruneArchive(Message, tag="archive.prune", right=Right.OPERATE, changes=True):
    """Forget ended runs: those that ended more than `older_than` seconds ago, and the oldest until
    all that have ended take up `max_bytes` at most. `dry_run` only counts."""

    older_than: float | None = Field(default=None, ge=0)
    max_bytes: int | None = Field(default=None, ge=0)
    dry_run: bool = False


class ArchivePruned(Message, tag="archive.pruned"):
    """What was forgotten, or would be: `runs` has the first thousand of `count` runs;
    `size_bytes` is what they took up, `freed_bytes` what their files gave back."""

    runs: tuple[str, ...]
    count: int
    size_bytes: int
    freed_bytes: int
