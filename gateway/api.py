"""What all handlers share."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from voidbus.gateway.bus import Bus
from voidbus.gateway.feed import Feeds
from voidbus.gateway.metrics import Metrics
from voidbus.gateway.patience import Patience
from voidbus.gateway.run_reader import RunReader
from voidbus.transport.node import Node

GATEWAY_PATH = "gateway"


class Api:
    """The bus, the events as they come, and what is counted. Lives in one event loop."""

    def __init__(self, node: Node, release: str, patience: Patience) -> None:
        self.bus = Bus(node, GATEWAY_PATH)
        self.reader = RunReader(self.bus)
        self.feeds = Feeds(self.bus)
        self.metrics = Metrics(release)
        self.release = release
        self.patience = patience
        self._intents_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def intents_lock(self, run_id: str) -> asyncio.Lock:
        """Held by the one client that is given a run's intents."""
        return self._intents_locks.setdefault(run_id, asyncio.Lock())

    def close(self) -> None:
        """End what goes on by itself: followers."""
        self.feeds.close()
