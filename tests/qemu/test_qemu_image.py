"""A local container image as a machine's root, from its layout to a program that runs in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from image_kit import LayoutBuilder, link, member, tar
from machine_kit import START_WAIT, MakeGuest, machines_of, run, shell

from voidbus.vm.image.store import default_store
from voidbus.vm.machine import ImageMount, MachineError, Mount
from voidbus.vm.qemu.machine import QemuMachine

pytestmark = [pytest.mark.needs("vm", "squashfs"), pytest.mark.timeout(240)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeGuest]:
    with machines_of(QemuMachine, tmp_path) as make:
        yield make


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An image of two layers with nothing but a shell, its links and a file that was replaced."""
    busybox = default_store().current().kernel.parent / "root/usr/bin/busybox"
    names = ("sh", "cat", "id", "ls")
    builder = LayoutBuilder(tmp_path / "image")
    low = tar(
        member("bin/busybox", busybox.read_bytes(), mode=0o755),
        *(link(f"bin/{name}", "busybox") for name in names),
        member("etc/name", b"low"),
        member("etc/gone", b"x"),
    )
    high = tar(member("etc/name", b"high"), member("etc/.wh.gone", b""))
    descriptor = builder.image(
        [low, high], config={"Env": ["PATH=/bin:/usr/local/bin", "IN=image"]}
    )
    return builder.write_index(descriptor)


def test_a_program_of_the_image_runs_in_its_files_and_its_environment(
    make: MakeGuest, layout: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "file").write_text("from the host")
    guest = make(root=str(layout), mounts=(Mount(given, "/data"),)).start()
    assert run(guest.channel, "cat", "/etc/name").stdout == b"high"
    assert run(guest.channel, "cat", "/data/file").stdout == b"from the host"
    assert shell(guest.channel, "echo $IN").result().stdout == b"image\n"
    result = shell(
        guest.channel, "id -u; ls /etc/gone; echo x >/etc/mine && cat /etc/mine"
    ).result()
    assert result.stdout.startswith(b"1000\n")
    assert b"No such file" in result.stderr
    assert b"not set" in run(guest.channel, "void-message", "health").stderr


def test_an_image_that_is_damaged_is_found_before_the_start(make: MakeGuest, layout: Path) -> None:
    for blob in (layout / "blobs/sha256").iterdir():
        blob.write_bytes(blob.read_bytes() + b"x")
    guest = make(root=str(layout))
    with pytest.raises(MachineError, match=r"machine m0: .*digest"):
        guest.machine.start(START_WAIT)
    assert guest.leases == []


def test_images_lie_below_directories_of_the_guest(make: MakeGuest, layout: Path) -> None:
    guest = make(images=(ImageMount(str(layout), "/opt/tools"),)).start()
    assert run(guest.channel, "cat", "/opt/tools/etc/name").stdout == b"high"
    assert run(guest.channel, "/opt/tools/bin/cat", "/opt/tools/etc/name").stdout == b"high"
    result = shell(guest.channel, "python3 -c 'print(1)'; echo x >/opt/tools/etc/name").result()
    assert result.stdout == b"1\n", "everything else is as it was"
    assert b"denied" in result.stderr


def test_an_image_to_mount_that_is_not_there_is_found_before_the_start(make: MakeGuest) -> None:
    guest = make(images=(ImageMount("/nothing/here", "/opt/tools"),))
    with pytest.raises(MachineError, match="the image /nothing/here does not exist"):
        guest.machine.start(START_WAIT)
    assert guest.leases == []
