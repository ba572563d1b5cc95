"""What a guest is told of owners, modes and inode numbers."""

from __future__ import annotations

import os
import stat

import pytest

from voidbus.vm.devices.share_identity import ShareIdentity

ME, MINE = 5001, 5002


def found(
    mode: int, uid: int = ME, gid: int = MINE, *, device: int = 1, inode: int = 7
) -> os.stat_result:
    return os.stat_result((mode, inode, device, 1, uid, gid, 0, 0, 0, 0))


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> ShareIdentity:
    """That of an ordinary user in two groups."""
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    monkeypatch.setattr(os, "getegid", lambda: MINE)
    monkeypatch.setattr(os, "getgroups", lambda: [MINE, 6000])
    return ShareIdentity(found(stat.S_IFDIR | 0o755, uid=1, gid=1))


def test_the_owner_bits_are_the_rights_the_host_gives(identity: ShareIdentity) -> None:
    for mode, uid, gid, shown in (
        (0o640, ME, MINE, 0o640),
        (0o640, 1, MINE, 0o440),
        (0o664, 1, 6000, 0o664),
        (0o644, 1, 1, 0o444),
        (0o700, 1, 1, 0o000),
        (0o605, 1, MINE, 0o005),
        (0o075, ME, MINE, 0o075),
    ):
        told = identity.attributes(found(stat.S_IFREG | mode, uid, gid))
        assert told.mode == stat.S_IFREG | shown, (oct(mode), uid, gid)
        assert (told.uid, told.gid) == (1000, 1000)


def test_an_ordinary_user_acts_as_itself(identity: ShareIdentity) -> None:
    with identity.acting():
        assert os.geteuid() == ME


def test_equal_inode_numbers_of_two_file_systems_are_told_apart(identity: ShareIdentity) -> None:
    here, there, elsewhere = (
        identity.attributes(found(stat.S_IFREG, device=device)).inode for device in (1, 2, 3)
    )
    assert here == 7
    assert len({here, there, elsewhere}) == 3
    assert identity.attributes(found(stat.S_IFREG, device=2)).inode == there
    for device in range(4, 70_000):
        identity.attributes(found(stat.S_IFREG, device=device))
    assert identity.attributes(found(stat.S_IFREG, device=2)).inode == there
