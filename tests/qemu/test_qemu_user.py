"""Whom QEMU runs as, and what it can open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from voidbus.vm.qemu.user import FIRST_UID, NOBODY, QemuUser, qemu_user, readable

Maps = tuple[Path, Path]
ALL = "         0          0 4294967295\n"
CONTAINER = "0 100000 65536\n"
ONE = "0 1000 1\n"


def maps(folder: Path, text: str) -> Maps:
    """The maps of a user namespace, for users and groups."""
    for name in ("uid_map", "gid_map"):
        (folder / name).write_text(text)
    return folder / "uid_map", folder / "gid_map"


@pytest.fixture
def everybody(tmp_path: Path) -> Maps:
    return maps(tmp_path, ALL)


def test_an_ordinary_user_stays_itself(everybody: Maps) -> None:
    assert qemu_user("tcg", euid=1000, maps=everybody) is None


def test_each_process_of_root_has_a_user_of_its_own_for_qemu(everybody: Maps) -> None:
    found = [qemu_user("tcg", euid=0, pid=pid, maps=everybody) for pid in (1, 2**22)]
    assert found == [
        QemuUser(FIRST_UID + 1, FIRST_UID + 1),
        QemuUser(FIRST_UID + 2**22, FIRST_UID + 2**22),
    ]


def test_where_a_container_has_no_such_user_it_is_nobody(tmp_path: Path) -> None:
    user = qemu_user("tcg", euid=0, maps=maps(tmp_path, CONTAINER))
    assert user == QemuUser(NOBODY, NOBODY)


def test_where_there_is_but_one_user_it_stays(tmp_path: Path) -> None:
    assert qemu_user("tcg", euid=0, maps=maps(tmp_path, ONE)) is None
    assert qemu_user("tcg", euid=0, maps=maps(tmp_path, "nonsense\n")) is None


@pytest.mark.parametrize("mode", [0o666, 0o600])
def test_with_kvm_it_must_be_able_to_open_the_device(
    tmp_path: Path, everybody: Maps, mode: int
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    user = qemu_user("kvm", euid=0, pid=1, device=device, maps=everybody)
    assert user == (QemuUser(FIRST_UID + 1, FIRST_UID + 1) if mode == 0o666 else None)


@pytest.mark.needs("root")
def test_with_kvm_it_is_in_the_group_of_the_device(tmp_path: Path, everybody: Maps) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o660)
    os.chown(device, 0, 108)
    user = qemu_user("kvm", euid=0, pid=1, device=device, maps=everybody)
    assert user == QemuUser(FIRST_UID + 1, FIRST_UID + 1, (108,))


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_file_is_handed_over_so_that_anybody_can_open_it_anew(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"kernel" * 100_000)
    path.chmod(mode)
    fd = readable(path, QemuUser(FIRST_UID, FIRST_UID))
    try:
        assert os.fstat(fd).st_mode & 0o004
        assert Path(f"/proc/self/fd/{fd}").read_bytes() == path.read_bytes()
    finally:
        os.close(fd)


def test_what_can_not_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        readable(tmp_path / "nothing", None)
