"""Commands from another machine: keys, addresses, and what is refused. Real supervisors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, workflow

LOCAL = "tcp://127.0.0.1:0"


@pytest.fixture
def keys_made(tmp_path: Path) -> Path:
    """A state directory with a supervisor's keys, and the files of two clients beside it."""
    from voidbus.transport.message import Right
    from voidbus.transport.remote import make_client_keys, save_client_keys

    state = tmp_path / "state"
    state.mkdir()
    for right in (Right.OBSERVE, Right.OPERATE):
        name = right.name.lower()
        save_client_keys(tmp_path / f"{name}.keys", make_client_keys(state / "keys", name, right))
    return tmp_path


@pytest.fixture
def served(keys_made: Path) -> Iterator[Served]:
    addresses = {f"VOIDBUS_REMOTE__{name}": LOCAL for name in ("OBSERVE", "OPERATE", "TOPICS")}
    with Served(keys_made / "state", **addresses) as running:
        yield running


def test_runs_are_seen_followed_and_cancelled_from_another_machine(
    served: Served, tmp_path: Path
) -> None:
    found = re.search(r"for other machines: (\S+), (\S+), \S+", served.said)
    assert found is not None, served.said
    observe, operate = found.groups()
    spec = workflow(tmp_path / "hello.json", "echo hello")
    run = served.voidbus("run", spec, "--detach").stdout.strip()
    # Nothing of the supervisor's own host but the keys: another state directory.
    served.environ["VOIDBUS_STATE_DIR"] = str(tmp_path / "elsewhere")
    look = ("--connect", observe, "--keys", tmp_path / "observe.keys")
    followed = served.voidbus(*look, "events", run, "--follow")
    assert "run.finished" in followed.stdout, followed.stderr
    listed = json.loads(served.voidbus("ps", *look, "--all", "--json").stdout)
    assert [each["id"] for each in listed["runs"]] == [run]
    assert served.voidbus(*look, "actors").returncode == 0
    refused = served.voidbus(*look, "cancel", run)
    assert refused.returncode == 1
    assert "needs the operate endpoint" in refused.stderr
    change = ("--connect", operate, "--keys", tmp_path / "operate.keys")
    assert served.voidbus(*change, "cancel", run).returncode == 0
    strange = served.voidbus("--connect", operate, "--keys", tmp_path / "observe.keys", "ps")
    assert strange.returncode == 3
    assert "voidbus keys client" in strange.stderr
    for command in (("run", spec), ("stop",), ("serve",), ("doctor",)):
        only_here = served.voidbus(*change, *command)
        assert only_here.returncode == 2, command
        assert "own host only" in only_here.stderr
    served.environ["VOIDBUS_STATE_DIR"] = str(served.state)


def test_keys_are_made_by_a_command_and_are_their_owners_only(tmp_path: Path) -> None:
    import subprocess

    from served import VOIDBUS, clean_environment

    def voidbus(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*VOIDBUS, *map(str, arguments)],
            env=clean_environment(tmp_path / "state"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30.0,
            check=False,
        )

    assert len(voidbus("keys", "server").stdout.strip()) == 40
    assert voidbus("keys", "server").stdout == voidbus("keys", "server").stdout
    made = voidbus("keys", "client", "ann", "--right", "operate")
    assert made.returncode == 0, made.stderr
    for path in (tmp_path / "ann.keys", tmp_path / "state/keys/server.key_secret"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state/keys").stat().st_mode & 0o777 == 0o700
    secret = json.loads((tmp_path / "ann.keys").read_text())["secret"]
    assert secret not in made.stdout
    again = voidbus("keys", "client", "ann")
    assert again.returncode == 1
    assert "there already" in again.stderr
    missing = voidbus("--connect", "tcp://127.0.0.1:1", "--keys", "none.keys", "ps")
    assert missing.returncode == 3
    assert "cannot read client keys" in missing.stderr
    assert voidbus("--connect", "ipc:///tmp/x", "ps").returncode == 2


def test_a_remote_address_without_keys_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="voidbus keys server --folder"):
        Served(tmp_path / "state", VOIDBUS_REMOTE__OPERATE=LOCAL)


@pytest.mark.parametrize("address", ["127.0.0.1:7400", "ipc:///tmp/x", "tcp://host", "tcp://*"])
def test_a_remote_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(AssertionError, match=r"remote\.operate"):
        Served(tmp_path / "state", VOIDBUS_REMOTE__OPERATE=address)
