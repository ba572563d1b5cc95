"""Whose model an agent has, where it listens, and what was asked of it. Knows no HTTP."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple


class ModelTotals(NamedTuple):
    """What was asked of a model: requests that were passed on, those that were refused because
    they were too many, and the tokens its answers named."""

    requests: int
    refused: int
    input_tokens: int
    output_tokens: int


class ModelSpending:
    """Counts, from any thread; `max_requests` None is no limit."""

    def __init__(self, max_requests: int | None = None) -> None:
        self.max_requests = max_requests
        self._lock = threading.Lock()
        self._totals = ModelTotals(0, 0, 0, 0)

    def admit(self) -> bool:
        """Count a request; whether it may be passed on."""
        with self._lock:
            now = self._totals
            allowed = self.max_requests is None or now.requests < self.max_requests
            self._totals = now._replace(
                requests=now.requests + allowed, refused=now.refused + (not allowed)
            )
            return allowed

    def add_tokens(self, input_tokens: int, output_tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            now = self._totals
            self._totals = now._replace(
                input_tokens=now.input_tokens + input_tokens,
                output_tokens=now.output_tokens + output_tokens,
            )

    def totals(self) -> ModelTotals:
        """All so far."""
        with self._lock:
            return self._totals


@dataclass(frozen=True)
class ModelEndpoint:
    """The one place a guest's requests may go. `key` is what the model wants, as `Authorization:
    Bearer` where `bearer`, else as `x-api-key`; `token` is what the guest has in its place."""

    base_url: str
    token: str = field(repr=False)
    key: str = field(default="", repr=False)
    bearer: bool = False
    spending: ModelSpending = field(default_factory=ModelSpending, compare=False, repr=False)
