"""The inbox of one agent: entries that remember the version at which they arrived."""

from dataclasses import dataclass, field

from voidbus.sidecar.model import InboxEntry, InboxSnapshot, InboxView, Rejected, too_large

MAX_INBOX_ENTRIES = 4096
"""Entries an inbox holds at most: what a run may cost the host in memory is bounded."""

MAX_INBOX_BYTES = 4 * 1024 * 1024
"""Bytes of all entries as JSON, at most. It is also the largest answer a guest must read."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    entry: InboxEntry
    version: int
    size: int


@dataclass(slots=True)
class Inbox:
    """Entries and their versions. Not thread-safe; whoever holds it guards it."""

    execution_id: str
    candidate_id: str
    max_entries: int = MAX_INBOX_ENTRIES
    max_bytes: int = MAX_INBOX_BYTES
    version: int = 0
    iteration: int = 0
    given_version: int = 0
    _arrived: list[_Arrived] = field(default_factory=list)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self._arrived)

    def load(self, snapshot: InboxSnapshot) -> None:
        """Replace the whole inbox.

        An entry that was there before keeps the version at which it arrived, so a reader who
        asks for what came since then is not given it twice.

        Raises Rejected (413) when the snapshot is over a limit; nothing is changed then.
        """
        version = self._next_version(snapshot.version)
        known = {arrived.entry.message_id: arrived for arrived in reversed(self._arrived)}
        arrived = []
        for entry in snapshot.entries:
            before = known.get(entry.message_id)
            if before is not None and before.entry == entry:
                arrived.append(_Arrived(entry, min(before.version, version), before.size))
            else:
                arrived.append(_Arrived(entry, version, _size(entry)))
        size = sum(one.size for one in arrived)
        self._refuse_over_limit(len(arrived), size)
        self._arrived = arrived
        self._bytes = size
        self.version = version
        self.given_version = version if snapshot.version is None else snapshot.version
        self.iteration = snapshot.iteration
        self.execution_id = snapshot.execution_id
        self.candidate_id = snapshot.candidate_id

    def push(self, entry: InboxEntry) -> None:
        """Add one entry and raise the version by one, so that readers see it.

        Raises Rejected (413) when the inbox is full; nothing is changed then.
        """
        size = _size(entry)
        self._refuse_over_limit(len(self._arrived) + 1, self._bytes + size)
        self.version += 1
        self._bytes += size
        self._arrived.append(_Arrived(entry, self.version, size))

    def view(self, since: int | None = None) -> InboxView:
        """The header, with all entries or those that arrived after version `since`."""
        entries = (
            arrived.entry for arrived in self._arrived if since is None or arrived.version > since
        )
        return InboxView(
            version=self.version,
            execution_id=self.execution_id,
            candidate_id=self.candidate_id,
            iteration=self.iteration,
            # A reader already at this version, or past it, has nothing to catch up on.
            entries=() if since is not None and since >= self.version else tuple(entries),
        )

    def news(self, since: int | None) -> InboxView | None:
        """What a follower who has seen version `since` is to be told, or None while there is
        nothing.

        A follower who is ahead of us has seen versions of an inbox that is no more: numbers
        may go back when the orchestrator loads one. It begins anew, with everything.
        """
        if since == self.version:
            return None
        return self.view(None if since is None or since > self.version else since)

    def arrivals(self) -> tuple[int, ...]:
        """For each entry, in order, the version at which it arrived."""
        return tuple(arrived.version for arrived in self._arrived)

    def restore(self, view: InboxView, arrivals: tuple[int, ...], given_version: int) -> None:
        """Take over the entries of another inbox as they were."""
        self._arrived = [
            _Arrived(entry, version, _size(entry))
            for entry, version in zip(view.entries, arrivals, strict=True)
        ]
        self._bytes = sum(arrived.size for arrived in self._arrived)
        self.version = view.version
        self.given_version = given_version
        self.iteration = view.iteration
        self.execution_id = view.execution_id
        self.candidate_id = view.candidate_id

    def _next_version(self, given: int | None) -> int:
        if given is None:
            return self.version + 1
        # The orchestrator's own numbers are taken as given, even backwards. Only when pushed
        # messages have carried us to or past its next number do we go on from ours, or
        # readers who saw the pushed messages would miss what it loads now.
        overtaken = self.given_version < given <= self.version
        return self.version + 1 if overtaken else given

    def _refuse_over_limit(self, entries: int, size: int) -> None:
        if entries > self.max_entries:
            raise Rejected(
                too_large(
                    f"the inbox would hold {entries} entries, and {self.max_entries} is the "
                    "limit; load an inbox without the entries that are no longer needed"
                )
            )
        if size > self.max_bytes:
            raise Rejected(
                too_large(
                    f"the inbox would hold {size} bytes, and {self.max_bytes} is the limit; "
                    "load an inbox without the entries that are no longer needed"
                )
            )


def _size(entry: InboxEntry) -> int:
    return len(entry.model_dump_json().encode())
