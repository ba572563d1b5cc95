"""Every kind of virtual machine, one supervisor for a file's tests, and a client of it for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_kit import MakeGuest, machines_of
from supervisor_kit import Client, Supervisor, running_supervisor
from vm_kit import VIRTUAL_MACHINES

from voidbus.vm.machine import Machine


@pytest.fixture(scope="session", params=VIRTUAL_MACHINES)
def kind(request: pytest.FixtureRequest) -> type[Machine]:
    machine: type[Machine] = request.param
    return machine


@pytest.fixture
def make(kind: type[Machine], tmp_path: Path) -> Iterator[MakeGuest]:
    with machines_of(kind, tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor() as running:
        yield running


@pytest.fixture
def client(supervisor: Supervisor) -> Iterator[Client]:
    with supervisor.connect() as connected:
        yield connected
