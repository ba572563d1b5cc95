"""The parts of a boot that need no machine of their own."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from voidbus.vm.guest import init, network
from voidbus.vm.guest.boot import needed_modules
from voidbus.vm.guest.boot_line import NetworkSettings, parse_boot_line
from voidbus.vm.guest.foreign import PYTHON, launcher_text
from voidbus.vm.guest.kernel_log import LINE_BYTES, KernelLog
from voidbus.vm.guest.layers import file_system_of
from voidbus.vm.guest.modules import Modules, module_name, read_dependencies
from voidbus.vm.guest.mounts import place, replace_file


class Loader:
    """Stands for the kernel: which files were loaded, by content."""

    def __init__(self, failing: str = "", code: int = 0) -> None:
        self.loaded: list[str] = []
        self._failing = failing
        self._code = code

    def __call__(self, fd: int, flags: int) -> None:
        name = os.read(fd, 100).decode()
        if name == self._failing:
            raise OSError(self._code, os.strerror(self._code))
        self.loaded.append(name)


@pytest.fixture
def modules_folder(tmp_path: Path) -> Path:
    for name in ("virtio", "virtio_ring", "virtio-mmio", "alone"):
        (tmp_path / f"{name}.ko").write_text(name)
    (tmp_path / "modules.dep").write_text(
        "virtio_ring.ko:\nvirtio.ko: virtio_ring.ko\n"
        "virtio-mmio.ko: virtio.ko virtio_ring.ko\nalone.ko:\ngone.ko:\n"
    )
    return tmp_path


def test_a_module_is_loaded_after_what_it_needs_and_once(modules_folder: Path) -> None:
    loader = Loader()
    modules = Modules(str(modules_folder), loader)
    assert modules.load(["virtio_mmio", "virtio", "alone"]) == []
    assert loader.loaded == ["virtio_ring", "virtio", "virtio-mmio", "alone"]


def test_a_module_that_is_not_listed_is_built_in(modules_folder: Path) -> None:
    assert Modules(str(modules_folder), Loader()).load(["ext4"]) == []


def test_without_a_list_everything_is_built_in(tmp_path: Path) -> None:
    assert read_dependencies(str(tmp_path)) == {}
    assert Modules(str(tmp_path), Loader()).load(["vsock"]) == []


def test_a_module_that_fails_is_named_and_the_others_are_loaded(modules_folder: Path) -> None:
    loader = Loader("virtio-mmio", errno.ENOEXEC)
    faults = Modules(str(modules_folder), loader).load(["virtio_mmio", "gone", "alone"])
    assert faults == [
        "kernel module virtio_mmio: Exec format error",
        "kernel module gone: No such file or directory",
    ]
    assert loader.loaded == ["virtio_ring", "virtio", "alone"]


def test_a_module_that_is_there_already_is_fine(modules_folder: Path) -> None:
    loader = Loader("alone", errno.EEXIST)
    assert Modules(str(modules_folder), loader).load(["alone"]) == []


def test_a_modules_name_has_no_folder_dash_or_suffix() -> None:
    assert module_name("kernel/net/9p/9pnet-virtio.ko.xz") == "9pnet_virtio"


def test_only_what_the_line_asks_for_is_loaded() -> None:
    assert needed_modules(parse_boot_line(""), has_pci=False) == [
        "virtio_mmio",
        "vmw_vsock_virtio_transport",
    ]
    line = parse_boot_line("voidbus.layers=vda voidbox.network=1 voidbox.mount0=a:/a")
    names = needed_modules(line, has_pci=True)
    assert {"virtio_pci", "virtio_blk", "virtio_net", "virtiofs"} < set(names)


def test_a_route_is_laid_out_as_the_kernel_reads_it() -> None:
    route = network.default_route("10.0.2.2")
    assert len(route) == 120  # sizeof(struct rtentry)
    family, gateway = struct.unpack_from("=H2x4s", route, 24)
    assert (family, gateway) == (2, bytes((10, 0, 2, 2)))
    assert struct.unpack_from("=H", route, 56) == (3,)  # RTF_UP | RTF_GATEWAY


def test_name_servers_are_listed_one_a_line() -> None:
    settings = NetworkSettings("10.0.2.15", 24, "10.0.2.2", ("10.0.2.3", "10.0.2.4"))
    assert network.resolver_file(settings) == "nameserver 10.0.2.3\nnameserver 10.0.2.4\n"


@pytest.mark.parametrize(
    ("offset", "magic", "kind"),
    [
        (0, b"hsqs", "squashfs"),
        (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
        (1080, b"\x53\xef", "ext4"),
        (0, b"PK", None),
    ],
)
def test_a_file_system_is_known_by_its_magic_number(
    offset: int, magic: bytes, kind: str | None
) -> None:
    head = bytearray(2048)
    head[offset : offset + len(magic)] = magic
    assert file_system_of(bytes(head)) == kind


def test_an_empty_device_holds_no_file_system() -> None:
    assert file_system_of(b"") is None


def test_a_place_is_made_where_it_is_missing(tmp_path: Path) -> None:
    with place("/a/b", str(tmp_path)) as fd:
        assert os.fstat(fd).st_ino == (tmp_path / "a/b").stat().st_ino


@pytest.mark.parametrize("target", ["/etc", "elsewhere"])
def test_a_link_never_leads_a_place_elsewhere(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(target)
    for path in ("/link", "/link/below"):
        with pytest.raises(OSError) as caught, place(path, str(tmp_path)):
            pass
        assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "hosts").symlink_to("kept")
    with place("/", str(tmp_path)) as fd:
        replace_file(fd, "hosts", b"new", 0o644)
    assert (tmp_path / "hosts").read_text() == "new"
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_launcher_needs_nothing_of_the_image_but_the_kernel() -> None:
    first, second = launcher_text("void-message").splitlines()
    assert first == "#!/opt/voidbus/bin/busybox sh"
    words = second.split()
    assert tuple(words[1 : 1 + len(PYTHON)]) == PYTHON
    assert all(word.startswith("/opt/voidbus/") for word in words[1:] if word.startswith("/"))


def test_lines_before_the_log_is_open_are_kept_and_long_ones_cut(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    log = KernelLog()
    log.step("early")
    log.open(str(path))
    log.fault("x" * 2000)
    log.fatal("one\ntwo")
    lines = path.read_bytes().splitlines()
    assert lines[0] == b"<6>guest-agent: early"
    assert len(lines[1]) == len("<3>") + LINE_BYTES
    assert lines[2:] == [b"<2>guest-agent: one", b"<2>guest-agent: two"]


def test_init_does_nothing_where_it_is_not_the_first_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert init.main() == 1
    assert "for the kernel of a machine to start" in capfd.readouterr().err
