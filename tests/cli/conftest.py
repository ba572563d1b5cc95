"""Fixtures of the commands' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_supervisor import FakeSupervisor

from voidbus.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory that commands use without being told."""
    directory = tmp_path / "state"
    monkeypatch.setenv("VOIDBUS_STATE_DIR", str(directory))
    for variable in ("VOIDBUS_DEBUG", "NO_COLOR", "_VOIDBUS_COMPLETE"):
        monkeypatch.delenv(variable, raising=False)
    return directory


@pytest.fixture
def supervisor(state: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(state) as fake:
        yield fake


@pytest.fixture
def voidbus(state: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(code), captured.out, captured.err)

    return run
