"""What the tests of void-mcp share: a sidecar for it to serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sidecar_kit import RunningSidecar, inbox, running_sidecar


@pytest.fixture
def sidecar() -> Iterator[RunningSidecar]:
    with running_sidecar() as running:
        running.server.load_inbox(inbox("a", version=3))
        yield running
