"""The real base image: what a guest counts on is in it, and it is made alike each time."""

from __future__ import annotations

import stat
from importlib.metadata import version
from pathlib import Path

import pytest

from voidbus.vm.image.elf import Elf
from voidbus.vm.image.product import FOLDERS, TOOLS, product_archive, read_product
from voidbus.vm.image.recipe import BASE
from voidbus.vm.image.store import GuestImage, ImageStore, default_store

needs_image = pytest.mark.needs("image")


@pytest.fixture
def image() -> GuestImage:
    return default_store().current()


@pytest.fixture
def contents(image: GuestImage) -> dict[str, str]:
    """What is in the initramfs, read as the kernel does: path to mode, and a link's target."""
    data = image.initramfs.read_bytes()
    found = {}
    at = 0
    while at < len(data):
        if data[at] == 0:
            at += 4
            continue
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        path = data[at + 110 : at + 109 + name_size].decode()
        at = (at + 110 + name_size + 3) // 4 * 4
        if path != "TRAILER!!!":
            target = data[at : at + size].decode() if stat.S_ISLNK(mode) else ""
            found[path] = f"{stat.filemode(mode)} {target}".strip()
        at = (at + size + 3) // 4 * 4
    return found


def exists(contents: dict[str, str], path: str) -> bool:
    """Whether a path leads to something, through links as in the guest."""
    parts = [part for part in path.split("/") if part]
    done: list[str] = []
    for _ in range(60):
        if not parts:
            return True
        part = parts.pop(0)
        if part == "..":
            done = done[:-1]
            continue
        here = "/".join([*done, part])
        if here not in contents:
            return False
        mode, _, target = contents[here].partition(" ")
        if mode.startswith("l"):
            done = [] if target.startswith("/") else done
            parts = [each for each in target.split("/") if each not in ("", ".")] + parts
        else:
            done = [*done, part]
    return False


@needs_image
def test_every_program_the_manifest_promises_is_in_the_image(
    image: GuestImage, contents: dict[str, str]
) -> None:
    assert set(BASE.programs) < set(image.manifest.programs)
    for program in image.manifest.programs:
        assert exists(contents, program), program


@needs_image
def test_what_a_guest_counts_on_is_in_the_image(
    image: GuestImage, contents: dict[str, str]
) -> None:
    release = image.manifest.kernel_release
    for path in (
        *("init", "dev/console", "dev/null", "proc", "sys", "run", "workspace", "mnt"),
        *("etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf", "etc/os-release"),
        *("etc/voidbox", "etc/ssl/certs/ca-certificates.crt", "lib64/ld-linux-x86-64.so.2"),
        *(f"lib/modules/{release}/modules.dep", "usr/lib/python3.11/json/__init__.pyc"),
        *("usr/lib/voidbus/guest/agent.py", "usr/lib/voidbus/sidecar/void_message.py"),
        *("usr/lib/voidbus/mcp/void_mcp.py", "usr/local/bin/void-mcp"),
        "usr/lib/voidbus/guest/__pycache__/agent.cpython-311.pyc",
    ):
        assert exists(contents, path), path
    assert contents["."] == "drwxr-xr-x"
    assert contents["tmp"] == "drwxrwxrwt"
    assert contents["init"] == "-rwxr-xr-x"
    for name in TOOLS:
        present = f"usr/local/bin/{name}" in contents
        assert present == (name in read_product().tools)


@needs_image
def test_every_part_has_a_name_a_version_a_digest_and_a_size(image: GuestImage) -> None:
    assert len(image.manifest.parts) == 1 + len(BASE.packages) + 1  # the kernel, and voidbus
    for part in image.manifest.parts:
        assert part.name
        assert part.version
        assert len(part.sha256) == 64
        assert part.size > 0
    own = image.manifest.parts[-1]
    assert (own.name, own.version) == ("voidbus", version("voidbus"))


@needs_image
def test_every_module_a_guest_may_load_is_in_the_image_or_built_in(image: GuestImage) -> None:
    built_in = {"ext4", "af_packet"}
    assert {name.replace("-", "_") for name in BASE.modules} - built_in <= set(
        image.manifest.modules
    )


@needs_image
def test_the_kernel_is_uncompressed_and_its_memory_is_known(image: GuestImage) -> None:
    assert Elf(image.kernel.read_bytes()).loaded_bytes() == image.manifest.kernel_bytes


@needs_image
def test_every_source_of_the_guest_is_in_the_image_as_it_is_now(contents: dict[str, str]) -> None:
    for folder, (place, chosen) in FOLDERS.items():
        for path in place.glob("*.py"):
            if chosen is None or path.name in chosen:
                assert f"usr/lib/voidbus/{folder}/{path.name}" in contents


@needs_image
def test_the_product_part_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    root = default_store().current().kernel.parent / "root"
    product = read_product()
    one = product_archive(product, root, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert product_archive(product, root, tmp_path / "elsewhere") == one


@needs_image
def test_voidbuss_own_image_is_sound(image: GuestImage) -> None:
    store: ImageStore = default_store()
    assert image in store.list()
    assert store.find() == image
