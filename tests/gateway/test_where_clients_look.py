"""Where clients look for the API and its token when nobody told them.

The places themselves are the user's, so what is chosen is looked at, and served elsewhere.
"""

from __future__ import annotations

import os
import secrets
import select
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_kit import HttpClient
from served import VOIDBUS, clean_environment

from voidbus.gateway.listen import default_address
from voidbus.gateway.token import (
    FILE_VARIABLE,
    VARIABLE,
    default_token_path,
    server_token,
)

SHARED = Path(f"/tmp/voidbox-{os.geteuid()}.sock")


@pytest.fixture
def unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can't be written, by root neither, who may write nearly everywhere."""
    folder = tmp_path / "unwritable"
    folder.mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(folder) and may(path, mode))
    return folder


# -- the socket ----------------------------------------------------------------------------------


def test_a_runtime_folder_that_can_be_written_comes_first(tmp_path: Path) -> None:
    given = {"XDG_RUNTIME_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    assert default_address(given).path == tmp_path / "voidbox.sock"


def test_a_runtime_folder_that_cannot_be_written_is_passed_over(
    tmp_path: Path, unwritable: Path
) -> None:
    given = {"XDG_RUNTIME_DIR": str(unwritable)}
    assert default_address(given).path == SHARED
    given["TMPDIR"] = str(tmp_path)
    assert default_address(given).path == tmp_path / f"voidbox-{os.geteuid()}.sock"
    given["TMPDIR"] = str(unwritable)
    assert default_address(given).path == SHARED


def test_what_is_unset_empty_missing_or_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert default_address({}).path == SHARED
    for text in ("", str(tmp_path / "nothing"), str(file)):
        assert default_address({"XDG_RUNTIME_DIR": text, "TMPDIR": text}).path == SHARED


# -- the token -----------------------------------------------------------------------------------


def test_the_tokens_place_is_the_configurations_folder_then_homes_then_one_of_the_users(
    tmp_path: Path,
) -> None:
    config, home = {"XDG_CONFIG_HOME": str(tmp_path / "c")}, {"HOME": str(tmp_path)}
    of_home = tmp_path / ".config/voidbox/daemon-token"
    shared = Path(f"/tmp/voidbox-{os.getuid()}/daemon-token")
    for environ, path in (
        (config | home, tmp_path / "c/voidbox/daemon-token"),
        (home, of_home),
        # The XDG base directory specification: a path that is not absolute counts as none.
        ({"XDG_CONFIG_HOME": "relative"} | home, of_home),
        ({"XDG_CONFIG_HOME": ""} | home, of_home),
        ({}, shared),
        ({"HOME": ""}, shared),
    ):
        assert default_token_path(environ) == path


def test_a_new_token_is_written_below_home_for_its_owner_alone(tmp_path: Path) -> None:
    token = server_token(None, {"HOME": str(tmp_path), VARIABLE: " ", FILE_VARIABLE: ""})
    path = tmp_path / ".config/voidbox/daemon-token"
    assert path.read_text().strip() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_token_is_the_files_given_then_the_files_named_then_the_variables(
    tmp_path: Path,
) -> None:
    given, named = tmp_path / "given", tmp_path / "named"
    for path in (given, named):
        path.write_text(f" of-{path.name}\n")
        path.chmod(0o600)
    environ = {"HOME": str(tmp_path), VARIABLE: "of-variable", FILE_VARIABLE: str(named)}
    assert server_token(given, environ) == "of-given"
    assert server_token(None, environ) == "of-named"
    del environ[FILE_VARIABLE]
    assert server_token(None, environ) == "of-variable"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["given", "named"], "nothing is made"


# -- the flags -----------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        yield Path(name)


def test_the_flags_of_serve_stand_over_everything_else(folder: Path) -> None:
    token = secrets.token_hex(8)
    file = folder / "token"
    file.write_text(token)
    file.chmod(0o600)
    environ = clean_environment(folder / "state") | {
        "VOIDBUS_API__LISTEN": "off",
        FILE_VARIABLE: str(folder / "nothing"),
        VARIABLE: "other",
    }
    flags = ("--listen", "tcp://127.0.0.1:0", "--token-file", str(file))
    with subprocess.Popen(
        [*VOIDBUS, "serve", *flags], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 20.0)[0]
            # Who starts a supervisor reads there where it listens.
            said, _, url = process.stdout.readline().decode().strip().rpartition(" ")
            assert said.endswith("daemon listening on")
            where = ("127.0.0.1", int(url.removeprefix("http://127.0.0.1:")))
            assert HttpClient(where, token).get("/v1/health").status == 200
            assert HttpClient(where, "other").get("/v1/health").status == 401
        finally:
            process.terminate()
    assert process.returncode == 0
