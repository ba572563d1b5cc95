"""What is no file is not shared: procfs, sysfs and their like, and how many files all shares hold
together."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_kit import client_of, errno_of, open_descriptors

from voidbus.vm.devices.fuse_messages import ROOT_NODE as ROOT
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import MountError, SharedDirectory


@pytest.mark.parametrize(
    ("path", "name"),
    [("/proc", "procfs"), ("/proc/self", "procfs"), ("/sys", "sysfs"), ("/sys/kernel", "sysfs")],
)
def test_a_directory_of_the_kernel_is_refused_with_what_to_do(path: str, name: str) -> None:
    before = open_descriptors()
    with pytest.raises(MountError, match=rf"{path} can't be shared: it is on {name}, .*Share a "):
        SharedDirectory(Path(path), writable=False)
    assert open_descriptors() == before


@pytest.fixture
def with_proc(tmp_path: Path) -> Iterator[Path]:
    """A directory in which procfs and a file system of files are mounted."""
    for kind in ("proc", "tmpfs"):
        (tmp_path / kind).mkdir()
        subprocess.run(["mount", "-t", kind, kind, str(tmp_path / kind)], check=True, timeout=10)
    (tmp_path / "tmpfs/file").write_text("x")
    yield tmp_path
    for kind in ("proc", "tmpfs"):
        subprocess.run(["umount", str(tmp_path / kind)], check=True, timeout=10)


@pytest.mark.needs("mount")
def test_below_a_shared_directory_the_kernels_file_systems_are_closed(with_proc: Path) -> None:
    share = SharedDirectory(with_proc, writable=True)
    guest = client_of(share)
    assert errno_of(guest.lookup, ROOT, b"proc") == "EACCES"
    below = guest.lookup(ROOT, b"tmpfs")
    assert guest.content(guest.lookup(below.node, b"file").node) == b"x"
    share.close()


@pytest.mark.needs("mount")
def test_what_was_a_directory_and_is_procfs_now_is_closed_too(with_proc: Path) -> None:
    (with_proc / "later").mkdir()
    share = SharedDirectory(with_proc, writable=True)
    guest = client_of(share)
    later = guest.lookup(ROOT, b"later")
    place = os.fspath(with_proc / "later")
    subprocess.run(["mount", "-t", "proc", "proc", place], check=True, timeout=10)
    try:
        assert errno_of(guest.lookup, ROOT, b"later") == "EACCES"
        # What the guest knew is the directory below; nothing of procfs is in there.
        assert errno_of(guest.lookup, later.node, b"self") in ("ENOENT", "ESTALE")
    finally:
        subprocess.run(["umount", place], check=True, timeout=10)
    share.close()


@pytest.mark.parametrize("soft", [256, 1024, 20000, resource.RLIM_INFINITY])
@pytest.mark.parametrize("shares", [1, 2, 6, 22])
def test_all_shares_together_leave_half_of_the_descriptors(
    monkeypatch: pytest.MonkeyPatch, soft: int, shares: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    limits = ShareLimits.of_process(shares)
    all_of_them = shares * (limits.descriptors + limits.handles)
    least = shares * (8 + 16)
    assert all_of_them <= max(least, (soft if soft > 0 else 1 << 20) // 2)
    assert limits.handles >= 16
    assert limits.descriptors >= 8
