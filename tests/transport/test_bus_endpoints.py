"""Directories, keys, and transports that are not safe."""

from __future__ import annotations

from pathlib import Path

import pytest
from transport_kit import Bus

from voidbus.transport.access import (
    AccessError,
    ClientKeys,
    Endpoints,
    create_keys,
    load_keys,
    secure_directory,
    socket_directory,
)
from voidbus.transport.leaf import Leaf


def test_the_directory_can_be_entered_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "bus"
    path.mkdir(mode=0o755)
    assert secure_directory(path).stat().st_mode & 0o777 == 0o700


def test_a_link_or_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(AccessError):
            secure_directory(tmp_path / name)


def test_someone_elses_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(AccessError, match="belongs to user"):
        secure_directory(tmp_path)


def test_a_path_too_long_for_a_socket_gets_a_short_one_of_its_own() -> None:
    long = Path("/x" * 100)
    assert socket_directory(Path("/s")) == Path("/s/bus")
    assert len(str(socket_directory(long))) < 60
    assert socket_directory(long) == socket_directory(long)
    assert socket_directory(long) != socket_directory(long / "y")


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:1", "udp://x", "/path"])
def test_a_transport_that_is_not_safe_is_refused(url: str) -> None:
    with pytest.raises(AccessError):
        Endpoints(rights={}, topics=url)
    with pytest.raises(AccessError):
        Leaf("client-a", url)


def test_secret_keys_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    keys = create_keys(tmp_path, "k")
    secret = tmp_path / "k.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert load_keys(secret) == keys
    secret.chmod(0o644)
    with pytest.raises(AccessError, match="chmod 600"):
        load_keys(secret)


def test_a_client_key_that_is_not_on_the_list_gets_no_link(tmp_path: Path) -> None:
    bus = Bus("tcp", tmp_path)
    try:
        assert bus.keys is not None
        public, secret = create_keys(tmp_path / "stranger", "stranger")
        keys = ClientKeys(public, secret, bus.keys.server)
        stranger = bus.leaf("client-b", wait=False, keys=keys)
        bus.leaf("client-a")
        assert not stranger.wait_up(0.5)
        assert bus.hub.nodes == ["client-a"]
    finally:
        bus.close()
