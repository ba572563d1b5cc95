"""Whose model an agent has, where it listens, and what was asked of it. Knows no HTTP."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple


class ModelTotals(NamedTuple):
    """What was asked of a model: requests that were passed on, those that were refused because
    a limit was reached, and the tokens its answers named; those of a cache apart."""

    requests: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_tokens: int = 0


class Prices(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float


class ModelSpending:
    """Counts, from any thread. `max_requests` and `max_cost` (US dollars, by `prices`) None are no
    limits; the request in which the cost goes over its limit is the last one."""

    def __init__(
        self,
        max_requests: int | None = None,
        max_cost: float | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._max_requests = max_requests
        self._max_cost = max_cost
        self._prices = prices or Prices(0.0, 0.0)
        self._lock = threading.Lock()
        self._totals = ModelTotals()

    def admit(self) -> str | None:
        """Count a request. Why it must not be passed on, or None."""
        with self._lock:
            now, why = self._totals, None
            if self._max_requests is not None and now.requests >= self._max_requests:
                why = f"llm.max_requests of this run, {self._max_requests}, is used up"
            elif self._max_cost is not None and self._cost(now) >= self._max_cost:
                why = f"llm.max_cost of this run, {self._max_cost:g} US dollars, is used up"
            self._totals = now._replace(
                requests=now.requests + (why is None), refused=now.refused + (why is not None)
            )
            return why

    def add_tokens(self, input_tokens: int, output_tokens: int, cache_tokens: int = 0) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            now = self._totals
            self._totals = now._replace(
                input_tokens=now.input_tokens + input_tokens,
                output_tokens=now.output_tokens + output_tokens,
                cache_tokens=now.cache_tokens + cache_tokens,
            )

    def _cost(self, totals: ModelTotals) -> float:
        """Tokens written to a cache and read from it are taken for others of the input."""
        read = totals.input_tokens + totals.cache_tokens
        return (read * self._prices.input + totals.output_tokens * self._prices.output) / 1e6

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
