"""One supervisor for a file's tests, and a client of it for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from supervisor_kit import Client, Supervisor, running_supervisor


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor() as running:
        yield running


@pytest.fixture
def client(supervisor: Supervisor) -> Iterator[Client]:
    with supervisor.connect() as connected:
        yield connected
