from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_kit import TRANSPORTS, WIRES, Bus


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


@pytest.fixture(params=WIRES)
def wire_bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    """A bus that others can reach, with whatever frames they like."""
    bus = Bus(request.param, tmp_path)
    try:
        yield bus
    finally:
        bus.close()
