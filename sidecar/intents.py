"""The intents of one agent, kept from acceptance until they are acknowledged or expire."""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic import JsonValue

from voidbus.sidecar.model import (
    Intent,
    IntentSubmission,
    Rejected,
    invalid,
    too_large,
    too_many,
)

MAX_PAYLOAD_BYTES = 4096
"""A payload's size as compact JSON, at most; also a single submission's whole body."""

MAX_INTENTS_PER_ITERATION = 3
"""Intents accepted between two inbox loads. Duplicates don't count."""

MAX_BUFFERED_INTENTS = 1024
"""Intents waiting to be drained, at most."""


def random_intent_id() -> str:
    """`int-` and 32 hexadecimal digits."""
    return f"int-{uuid.uuid4().hex}"


@dataclass(slots=True)
class IntentBuffer:
    """Accepted intents in order of arrival. Not thread-safe; whoever holds it guards it.

    Hashes and keys only ever point at buffered intents, so they are bounded as those are.
    """

    candidate_id: str
    max_buffered: int = MAX_BUFFERED_INTENTS
    new_intent_id: Callable[[], str] = random_intent_id
    accepted_in_iteration: int = 0
    content_hashes: dict[str, str] = field(default_factory=dict)
    idempotency_keys: dict[str, str] = field(default_factory=dict)
    _intents: dict[str, Intent] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._intents)

    def submit(
        self, submission: IntentSubmission, *, iteration: int, key: str | None
    ) -> tuple[Intent, bool]:
        """Accept one submission: the stamped intent, and whether it was there before.

        The order of the checks is part of the interface: key, content, size, count.

        Raises Rejected: 413 for a payload too large, 429 when the iteration's share is used
        up or the buffer is full.
        """
        key_digest = _digest(key) if key else None
        if key_digest in self.idempotency_keys:
            return self._intents[self.idempotency_keys[key_digest]], True
        payload = _canonical(submission.payload)
        content_hash = _digest(payload, submission.audience, str(iteration))
        if content_hash in self.content_hashes:
            return self._intents[self.content_hashes[content_hash]], True
        self._refuse_over_limit(len(payload.encode()))

        intent = Intent(
            intent_id=self.new_intent_id(),
            from_candidate_id=self.candidate_id,
            iteration=iteration,
            kind=submission.kind,
            audience=submission.audience,
            payload=submission.payload,
            priority=submission.priority,
        )
        self._intents[intent.intent_id] = intent
        self.content_hashes[content_hash] = intent.intent_id
        if key_digest is not None:
            self.idempotency_keys[key_digest] = intent.intent_id
        self.accepted_in_iteration += 1
        return intent, False

    def _refuse_over_limit(self, payload_bytes: int) -> None:
        if payload_bytes > MAX_PAYLOAD_BYTES:
            raise Rejected(
                too_large(f"payload is {payload_bytes} bytes; the limit is {MAX_PAYLOAD_BYTES}")
            )
        if self.accepted_in_iteration >= MAX_INTENTS_PER_ITERATION:
            raise Rejected(too_many("max intents per iteration reached"))
        if len(self._intents) >= self.max_buffered:
            raise Rejected(
                too_many(f"{self.max_buffered} intents wait to be drained; try again later")
            )

    def peek(self, limit: int | None = None) -> list[Intent]:
        """The oldest intents, up to `limit` of them, left where they are."""
        intents = list(self._intents.values())
        return intents if limit is None else intents[: max(limit, 0)]

    def remove(self, intent_ids: Iterable[str]) -> list[Intent]:
        """Forget these intents with their hashes and keys; unknown ids are passed over."""
        removed = {
            intent_id: intent
            for intent_id in intent_ids
            if (intent := self._intents.pop(intent_id, None)) is not None
        }
        if removed:
            self.content_hashes = _without(self.content_hashes, removed)
            self.idempotency_keys = _without(self.idempotency_keys, removed)
        return list(removed.values())

    def begin_iteration(self, iteration: int) -> list[Intent]:
        """Start counting anew, forget duplicates, and remove and return what has expired.

        An intent lives through `ttl_iterations` iterations after its own.
        """
        self.accepted_in_iteration = 0
        self.content_hashes = {}
        self.idempotency_keys = {}
        return self.remove(
            [
                intent.intent_id
                for intent in self._intents.values()
                if iteration > intent.iteration + intent.ttl_iterations
            ]
        )

    def restore(self, intents: Iterable[Intent]) -> None:
        """Take over the intents of another buffer."""
        self._intents = {intent.intent_id: intent for intent in intents}


def _canonical(payload: JsonValue) -> str:
    """Compact JSON with sorted keys: equal content gives equal text."""
    try:
        return json.dumps(
            payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except ValueError:
        # A number such as 1e400 parses to infinity, which JSON has no way to write.
        message = "invalid intent: 'payload' holds a number out of range"
        raise Rejected(invalid(message, field="payload")) from None


def _digest(*parts: str) -> str:
    # A digest keeps a key of any length at 64 characters; NUL can't occur in a header or JSON.
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _without(index: dict[str, str], removed: dict[str, Intent]) -> dict[str, str]:
    return {name: intent_id for name, intent_id in index.items() if intent_id not in removed}
