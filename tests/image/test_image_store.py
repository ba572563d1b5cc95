"""The store: which image is current, what happens to damaged ones, two processes at once."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from voidbus.vm.image import publishing, store
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.manifest import Manifest, Part
from voidbus.vm.image.packages import package_file
from voidbus.vm.image.product import Product
from voidbus.vm.image.publishing import locked, new_file, new_folder
from voidbus.vm.image.store import (
    ImageStore,
    default_store,
    image_for,
    least_memory,
    require_memory,
)

KEY = "0" * 32
OTHER = "1" * 32


class Workshop:
    """A store whose product part is whatever a test says it is."""

    def __init__(self, root: Path) -> None:
        self.store = ImageStore(root)
        self.product = Product("p1", (("guest/init.py", b"one"),), "1.5")
        self.assembled = 0

    def archive(self, product: Product, root: Path, scratch: Path) -> bytes:
        self.assembled += 1
        return product.digest.encode().ljust(512, b"\0")

    def distribute(self, key: str = KEY, content: bytes = b"base") -> None:
        with self.store.new_distribution(key) as folder:
            if folder is None:
                return
            (folder / "root").mkdir()
            (folder / "vmlinux").write_bytes(b"kernel")
            (folder / "base.cpio").write_bytes(content.ljust(512, b"\0"))
            manifest = Manifest(
                "base", "6.1", 40 << 20, 512, (Part("pkg", "1", "ab" * 32, 5),), ("/bin/sh",)
            )
            (folder / "manifest.json").write_text(manifest.to_json())
        self.store.set_current("base", key)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop(tmp_path / "images")
    monkeypatch.setattr(store, "own_files", lambda: shop.product)
    monkeypatch.setattr(store, "product_archive", shop.archive)
    return shop


def test_an_image_that_was_never_built_is_missed_with_the_command_that_builds_it(
    workshop: Workshop,
) -> None:
    with pytest.raises(ImageError, match="`voidbus image build base`"):
        workshop.store.current()
    assert not workshop.store.root.exists()


def test_the_initramfs_is_the_two_parts_one_after_the_other(workshop: Workshop) -> None:
    workshop.distribute()
    image = workshop.store.current()
    assert image.kernel.read_bytes() == b"kernel"
    assert image.initramfs.read_bytes() == b"base".ljust(512, b"\0") + b"p1".ljust(512, b"\0")
    assert [(part.name, part.version) for part in image.manifest.parts] == [
        ("pkg", "1"),
        ("voidbus", "1.5"),
    ]
    assert image.manifest.unpacked_bytes == 1024


def test_an_image_is_put_together_once(workshop: Workshop) -> None:
    workshop.distribute()
    first = workshop.store.current()
    assert workshop.store.current() == first
    assert workshop.assembled == 1


def test_changed_files_of_voidbus_make_another_image_without_a_build(workshop: Workshop) -> None:
    workshop.distribute()
    first = workshop.store.current()
    workshop.product = Product("p2", (), "1.5")
    second = workshop.store.current()
    assert second.digest != first.digest
    assert second.kernel == first.kernel
    assert {image.digest for image in workshop.store.list()} == {first.digest, second.digest}


def test_only_the_newest_images_stay(workshop: Workshop) -> None:
    workshop.distribute()
    for number in range(store.KEPT_IMAGES + 3):
        workshop.product = Product(f"p{number}", (), "1.5")
        last = workshop.store.current()
    images = workshop.store.list()
    assert len(images) == store.KEPT_IMAGES
    assert last in images


def test_the_same_inputs_give_the_same_image(workshop: Workshop, tmp_path: Path) -> None:
    workshop.distribute()
    first = workshop.store.current()
    manifest = (first.initramfs.parent / "manifest.json").read_text()
    workshop.store = ImageStore(tmp_path / "elsewhere")
    workshop.distribute()
    second = workshop.store.current()
    assert second.digest == first.digest
    assert second.initramfs.read_bytes() == first.initramfs.read_bytes()
    assert (second.initramfs.parent / "manifest.json").read_text() == manifest


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["truncate", "write", "remove"])
def test_a_damaged_initramfs_is_put_together_again(workshop: Workshop, change: str) -> None:
    workshop.distribute()
    image = workshop.store.current()
    good = image.initramfs.read_bytes()
    damage(image.initramfs, change)
    assert workshop.store.current().initramfs.read_bytes() == good


@pytest.mark.parametrize("change", ["truncate", "write", "remove"])
def test_a_damaged_kernel_is_found_before_a_start_and_mended_by_a_build(
    workshop: Workshop, change: str
) -> None:
    workshop.distribute()
    image = workshop.store.current()
    damage(image.kernel, change)
    with pytest.raises(ImageError, match=r"damaged: .*vmlinux.*`voidbus image build base`"):
        workshop.store.current()
    assert not workshop.store.has_distribution(KEY)
    workshop.distribute()
    assert workshop.store.current() == image


def damage(path: Path, change: str) -> None:
    if change == "truncate":
        os.truncate(path, 3)
    elif change == "write":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.unlink()


def test_damage_that_left_no_trace_in_the_times_is_found_by_verify(workshop: Workshop) -> None:
    workshop.distribute()
    image = workshop.store.current()
    assert workshop.store.verify() == []
    path = image.initramfs
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, (publishing.PUBLISHED, publishing.PUBLISHED))
    (problem,) = workshop.store.verify()
    assert "initramfs.cpio is not what was put there" in problem
    assert "`voidbus image build base`" in problem


def test_a_store_that_was_copied_is_read_once_and_then_trusted(workshop: Workshop) -> None:
    workshop.distribute()
    image = workshop.store.current()
    os.utime(image.kernel)
    assert workshop.store.current() == image
    assert image.kernel.stat().st_mtime == publishing.PUBLISHED


@pytest.mark.parametrize("text", ["", "{", "null"])
def test_a_damaged_manifest_is_an_error_with_a_remedy(workshop: Workshop, text: str) -> None:
    workshop.distribute()
    (workshop.store.root / "distributions" / KEY / "manifest.json").write_text(text)
    with pytest.raises(ImageError, match="`voidbus image build`"):
        workshop.store.current()
    assert workshop.store.verify()


def test_a_reference_that_leads_elsewhere_is_not_followed(workshop: Workshop) -> None:
    workshop.distribute()
    (workshop.store.root / "refs/base").write_text("../../../etc")
    with pytest.raises(ImageError, match="damaged"):
        workshop.store.current()
    with pytest.raises(ImageError, match="no name of an image"):
        workshop.store.current("../base")


# -- several processes, bad disks --------------------------------------------------------------


def test_two_builds_at_once_make_one(workshop: Workshop) -> None:
    inside = threading.Event()
    go_on = threading.Event()
    second: list[bool] = []

    def build() -> None:
        inside.set()
        with workshop.store.new_distribution(KEY) as folder:
            second.append(folder is None)
        go_on.set()

    with workshop.store.new_distribution(KEY) as folder:
        assert folder is not None
        other = threading.Thread(target=build)
        other.start()
        assert inside.wait(10)
        for name in ("vmlinux", "base.cpio"):
            (folder / name).write_bytes(b"x")
        (folder / "manifest.json").write_text(Manifest("base").to_json())
        assert not go_on.is_set()
    assert go_on.wait(10)
    other.join(10)
    assert second == [True]


def test_waiting_for_another_process_ends(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", 1.0),
        pytest.raises(ImageError, match=r"has held .*lock for 0 s; see which with `fuser"),
        locked(tmp_path / "lock", 0.1),
    ):
        pass


def test_a_build_that_fails_leaves_nothing_with_a_final_name(tmp_path: Path) -> None:
    def folder() -> None:
        with new_folder(tmp_path / "final") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    def file() -> None:
        with new_file(tmp_path / "file") as path:
            path.write_text("half")
            raise RuntimeError

    for build in (folder, file):
        with pytest.raises(RuntimeError):
            build()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "make room"), (errno.EROFS, "writable"), (errno.EIO, "look at the disk")],
)
def test_a_bad_disk_is_told_with_what_to_do(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ImageError, match=words), new_file(tmp_path / "f") as path:
        raise OSError(number, os.strerror(number), str(path))


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shop = Workshop(tmp_path / "file/images")
    with pytest.raises(ImageError, match="set XDG_CACHE_HOME"):
        shop.distribute()


def test_cleaning_keeps_what_is_current(workshop: Workshop) -> None:
    workshop.distribute(KEY, b"old")
    workshop.store.current()
    workshop.distribute(OTHER, b"new")
    image = workshop.store.current()
    root = workshop.store.root
    kept = root / "packages" / package_file("pkg", "ab" * 32)
    gone = root / "packages" / package_file("old", "cd" * 32)
    for path in (kept, gone, root / "layers/x.squashfs", root / "layers/.new-1"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"12345")
    (root / "distributions/.new-left").mkdir()
    cleaned = workshop.store.clean()
    assert cleaned.entries == 5  # distribution, image, package, and two that were left behind
    assert workshop.store.current() == image
    assert kept.exists()
    assert not gone.exists()
    assert (root / "layers/x.squashfs").exists()
    assert not (root / "distributions" / KEY).exists()
    workshop.store.clean(layers=True)
    assert not list((root / "layers").iterdir())
    workshop.store.clean(everything=True)
    with pytest.raises(ImageError, match="voidbus image build"):
        workshop.store.current()


# -- which image, how much memory --------------------------------------------------------------


def test_the_store_is_in_the_users_cache() -> None:
    assert default_store({"XDG_CACHE_HOME": "/c"}).root == Path("/c/voidbus/images")
    home = {"HOME": "/home/me", "XDG_CACHE_HOME": "relative"}
    assert default_store(home).root == Path("/home/me/.cache/voidbus/images")
    with pytest.raises(ImageError, match="set HOME or XDG_CACHE_HOME"):
        default_store({})


@pytest.fixture
def given_files(tmp_path: Path) -> tuple[Path, Path]:
    kernel = bytearray(0x1000)
    kernel[0x202:0x206] = b"HdrS"
    kernel[0x260:0x264] = (32 << 20).to_bytes(4, "little")
    (tmp_path / "vmlinuz").write_bytes(kernel)
    (tmp_path / "initramfs").write_bytes(b"070701" + bytes(1000))
    return tmp_path / "vmlinuz", tmp_path / "initramfs"


def test_given_files_are_used_before_those_of_the_environment_and_the_stores(
    workshop: Workshop, given_files: tuple[Path, Path], tmp_path: Path
) -> None:
    kernel, initramfs = given_files
    workshop.distribute()
    own = image_for(None, None, {}, workshop.store)
    assert own == workshop.store.current()
    environ = {"VOID_BOX_KERNEL": str(kernel), "VOID_BOX_INITRAMFS": str(initramfs)}
    custom = image_for(None, None, environ, workshop.store)
    assert (custom.name, custom.kernel, custom.initramfs) == ("custom", kernel, initramfs)
    assert custom.manifest.kernel_bytes == 32 << 20
    other = tmp_path / "other"
    other.write_bytes(b"\x1f\x8b" + bytes(100))
    mixed = image_for(None, other, environ, workshop.store)
    assert (mixed.kernel, mixed.initramfs) == (kernel, other)
    assert mixed.digest != custom.digest


def test_a_kernel_is_not_taken_without_its_initramfs(given_files: tuple[Path, Path]) -> None:
    kernel, initramfs = given_files
    with pytest.raises(ImageError, match=r"sandbox\.initramfs or VOID_BOX_INITRAMFS"):
        image_for(kernel, None, {})
    with pytest.raises(ImageError, match=r"sandbox\.kernel or VOID_BOX_KERNEL"):
        image_for(None, initramfs, {})


def test_given_files_that_cannot_be_booted_are_refused(
    given_files: tuple[Path, Path], tmp_path: Path
) -> None:
    kernel, initramfs = given_files
    with pytest.raises(ImageError, match=r"the kernel .*absent does not exist"):
        image_for(tmp_path / "absent", initramfs, {})
    with pytest.raises(ImageError, match=r"the initramfs .* is no file"):
        image_for(kernel, tmp_path, {})
    with pytest.raises(ImageError, match="is no kernel for x86"):
        image_for(initramfs, initramfs, {})
    with pytest.raises(ImageError, match="is no initramfs"):
        image_for(kernel, kernel, {})


def test_too_little_memory_is_refused_with_the_least_that_works(workshop: Workshop) -> None:
    workshop.distribute()
    image = workshop.store.current()
    least = least_memory(image)
    require_memory(image, least)
    with pytest.raises(ImageError, match=f"set sandbox.memory_mb to {least} or more"):
        require_memory(image, least - 1)
