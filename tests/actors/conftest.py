"""A house for a run: journal, hub and system, with a run's actors in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_kit import House, a_house


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with a_house(tmp_path) as built:
        yield built
