from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_kit import TRANSPORTS, Bus


@pytest.fixture(params=TRANSPORTS)
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    bus = Bus(request.param, tmp_path)
    try:
        yield bus
    finally:
        bus.close()


@pytest.fixture
def ipc_bus(tmp_path: Path) -> Iterator[Bus]:
    bus = Bus("ipc", tmp_path)
    try:
        yield bus
    finally:
        bus.close()
