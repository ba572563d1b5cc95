"""The image of a machine is found fit for it before anything of the machine is started."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from voidbus.vm.boot_image import boot_image, needed_modules
from voidbus.vm.guest.boot import needed_modules as loaded_at_boot
from voidbus.vm.guest.boot_line import parse_boot_line
from voidbus.vm.image import store
from voidbus.vm.image.manifest import Manifest
from voidbus.vm.image.product import Product
from voidbus.vm.image.recipe import BASE
from voidbus.vm.image.store import ImageError, ImageStore
from voidbus.vm.machine import ImageMount, Lease, MachineError, MachineSpec, Mount
from voidbus.vm.qemu.machine import QemuMachine

KEY = "0" * 32

# What the kernel of a guest that is not ours may have in place of virtiofs.
OTHERS = {"9p", "9pnet_virtio"}


@pytest.fixture
def spec(tmp_path: Path) -> MachineSpec:
    return MachineSpec("r", "m0", tmp_path, secrets.token_bytes(32))


@pytest.fixture
def full(spec: MachineSpec, tmp_path: Path) -> MachineSpec:
    """A machine that has everything."""
    return replace(
        spec,
        network=True,
        mounts=(Mount(tmp_path, "/data"),),
        agent="claude",
        images=(ImageMount("image", "/skills"),),
        root="image",
    )


class Cache:
    """The user's store of images, with one that has these modules."""

    def __init__(self, root: Path) -> None:
        self._store = ImageStore(root)

    def put(self, *modules: str, built_in: tuple[str, ...] = ()) -> None:
        manifest = Manifest("base", "6.1", 40 << 20, 512, modules=modules, built_in=built_in)
        with self._store.new_distribution(KEY) as folder:
            assert folder is not None
            (folder / "root").mkdir()
            (folder / "vmlinux").write_bytes(b"kernel")
            (folder / "base.cpio").write_bytes(bytes(512))
            (folder / "manifest.json").write_text(manifest.to_json())
        self._store.set_current("base", KEY)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("VOID_BOX_KERNEL", "VOID_BOX_INITRAMFS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(store, "own_files", lambda: Product("p", (), "1.5"))
    monkeypatch.setattr(store, "product_archive", lambda *_: bytes(512))
    return Cache(tmp_path / "voidbus/images")


@pytest.mark.needs("qemu")
def test_a_missing_module_is_found_before_a_machine_starts(spec: MachineSpec, cache: Cache) -> None:
    cache.put("virtio_mmio", "virtio_blk")
    leases: list[Lease] = []
    machine = QemuMachine(spec, on_exit=lambda _: None, on_lease=leases.append)
    with pytest.raises(MachineError) as caught:
        machine.start(10)
    machine.close()
    assert str(caught.value).startswith(
        "machine m0: the guest image base lacks the kernel modules vmw_vsock_virtio_transport"
    )
    assert str(caught.value).endswith("run `voidbus image build base`")
    assert leases == []
    assert list(spec.scratch.glob("*.sock")) == []


def test_only_what_this_machine_needs_must_be_there(
    spec: MachineSpec, full: MachineSpec, cache: Cache
) -> None:
    cache.put(*needed_modules(spec))
    assert boot_image(spec).name == "base"
    with pytest.raises(
        ImageError, match="modules overlay, squashfs, virtio_blk, virtio_net, virtiofs, without"
    ):
        boot_image(full)


def test_what_the_kernel_has_in_it_needs_no_file(spec: MachineSpec, cache: Cache) -> None:
    cache.put(built_in=needed_modules(spec))
    assert boot_image(spec).manifest.built_in == needed_modules(spec)


def test_files_that_are_not_ours_are_not_examined_for_modules(
    full: MachineSpec, tmp_path: Path
) -> None:
    kernel = bytearray(0x1000)
    kernel[0x202:0x206] = b"HdrS"
    (tmp_path / "vmlinuz").write_bytes(kernel)
    (tmp_path / "initramfs").write_bytes(b"070701" + bytes(1000))
    given = replace(full, kernel=tmp_path / "vmlinuz", initramfs=tmp_path / "initramfs")
    assert boot_image(given).manifest.modules == ()


def test_the_memory_is_compared_too(spec: MachineSpec, cache: Cache) -> None:
    cache.put(*needed_modules(spec))
    with pytest.raises(ImageError, match=r"set sandbox\.memory_mb to "):
        boot_image(replace(spec, memory_mb=16))


def test_what_is_looked_for_is_what_a_guest_loads_and_what_is_built(full: MachineSpec) -> None:
    line = parse_boot_line(
        f"voidbox.secret={full.secret.hex()} voidbox.mount0=mount0:/data voidbus.layers=vda "
        "voidbus.net=10.0.2.15/24,10.0.2.2,10.0.2.3"
    )
    assert line.faults == ()
    looked_for = set(needed_modules(full))
    assert set(loaded_at_boot(line, has_pci=False)) - OTHERS <= looked_for
    assert looked_for <= set(BASE.modules)
