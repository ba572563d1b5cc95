"""One supervisor for a file's tests, asked by both of its doors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from api_kit import TOKEN, ApiHouse, api_house, step, structured, workflow
from http_kit import HttpClient


@pytest.fixture(scope="module")
def house() -> Iterator[ApiHouse]:
    with api_house() as built:
        yield built
        # Whatever the tests asked for: nothing failed inside, and the token is nobody's to read.
        log = built.supervisor.log
        assert "Traceback" not in log, log
        assert TOKEN not in log


@pytest.fixture
def unix(house: ApiHouse) -> HttpClient:
    return house.unix


@pytest.fixture
def tcp(house: ApiHouse) -> HttpClient:
    return house.tcp


@pytest.fixture
def door(house: ApiHouse) -> HttpClient:
    """The door of a test that needs no certain one: the Unix socket, or TCP by VOIDBUS_DOOR=tcp."""
    return house.tcp if os.environ.get("VOIDBUS_DOOR") == "tcp" else house.unix


@pytest.fixture(params=["unix", "tcp"])
def api(request: pytest.FixtureRequest, house: ApiHouse) -> HttpClient:
    """Each door in turn."""
    return house.unix if request.param == "unix" else house.tcp


@pytest.fixture(scope="module")
def ended(house: ApiHouse, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A workflow that ended well: `make` then `show`, of which the second is its output."""
    spec = workflow(
        tmp_path_factory.mktemp("ended"),
        step("make", structured({"status": "ok"})),
        step("show", "cat; echo two", "make"),
        output_step="show",
    )
    return house.unix.finish(spec)
