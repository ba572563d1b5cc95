"""What an initramfs and a kernel are made of: archives, kernels, modules, manifests."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.image import cpio, tree
from voidbus.vm.image.elf import Elf, ElfError
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.kernel import extract_vmlinux
from voidbus.vm.image.kernel_modules import built_in_modules, load_order, modules_dep
from voidbus.vm.image.manifest import Manifest, Part, StoredFile

# -- cpio --------------------------------------------------------------------------------------


def archive(*entries: cpio.Entry) -> bytes:
    out = io.BytesIO()
    length = cpio.write_archive(entries, out)
    assert length == len(out.getvalue())
    return out.getvalue()


ENTRIES = (
    cpio.regular("usr/bin/tool", b"#!/bin/sh\n", 0o755),
    cpio.directory("usr/bin"),
    cpio.directory("usr"),
    cpio.directory("."),
    cpio.directory("home/sandbox", 0o750, 1000, 1000),
    cpio.directory("home"),
    cpio.symlink("bin", "usr/bin"),
    cpio.character_device("dev/null", 1, 3, 0o666),
    cpio.directory("dev"),
)


def test_the_order_entries_come_in_makes_no_difference() -> None:
    assert archive(*ENTRIES) == archive(*reversed(ENTRIES))


@pytest.mark.needs("cpio")
def test_cpio_reads_two_archives_that_follow_each_other_as_the_kernel_does() -> None:
    first = archive(*ENTRIES)
    assert len(first) % 4 == 0
    shown = subprocess.run(
        ["cpio", "-itv", "--numeric-uid-gid", "--quiet"],
        input=first,
        capture_output=True,
        check=True,
        timeout=10,
    ).stdout.decode()
    lines = [line.split() for line in shown.splitlines()]
    assert [line[-1] for line in lines if line[-2] != "->"] == [
        *(".", "dev", "dev/null", "home", "home/sandbox", "usr", "usr/bin", "usr/bin/tool")
    ]
    found = {line[8]: line for line in lines if len(line) > 8}
    assert found["home/sandbox"][:4] == ["drwxr-x---", "2", "1000", "1000"]
    assert found["bin"][8:] == ["bin", "->", "usr/bin"]
    assert "1," in next(line for line in lines if line[-1] == "dev/null")


@pytest.mark.parametrize("path", ["", "/etc", "a//b", "../a", "a/..", "./a", "a/"])
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(ImageError, match="can't hold"):
        archive(cpio.regular(path, b""))


def test_a_path_is_not_given_twice() -> None:
    with pytest.raises(ImageError, match="twice"):
        archive(cpio.regular("a", b""), cpio.directory("a"))


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    for name, mask in (("a", 0o077), ("b", 0o000)):
        old = os.umask(mask)
        try:
            (tmp_path / name / "d").mkdir(parents=True)
            (tmp_path / name / "d/f").write_text("x")
            (tmp_path / name / "d/x").write_text("x")
            (tmp_path / name / "d/x").chmod(0o700)
            (tmp_path / name / "l").symlink_to("d")
        finally:
            os.umask(old)
    one, two = (tree.entries(tmp_path / name) for name in ("a", "b"))
    assert archive(*one) == archive(*two)
    modes = {entry.path: stat.S_IMODE(entry.mode) for entry in one}
    assert modes == {"d": 0o755, "d/f": 0o644, "d/x": 0o755, "l": 0o777}


# -- the kernel --------------------------------------------------------------------------------


def elf(
    *, sections: dict[str, bytes] | None = None, memory: tuple[int, ...] = (0x3000, 0x1000)
) -> bytes:
    """A small ELF file with these sections, and segments that take `memory` bytes when loaded."""
    names = [".shstrtab", *(sections or {})]
    table = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    contents = [table, *(sections or {}).values()]
    segments = b"".join(struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, size, 0) for size in memory)
    at = 64 + len(segments)
    headers = bytes(64)
    for name, content in zip(names, contents, strict=True):
        place = table.index(name.encode() + b"\0")
        headers += struct.pack("<IIQQQQIIQQ", place, 1, 0, 0, at, len(content), 0, 0, 1, 0)
        at += len(content)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + struct.pack(
        "<HHIQQQIHHHHHH",
        *(2, 62, 1, 0, 64, at, 0, 64, 56, len(memory), 64, len(names) + 1, 1),
    )
    return head + segments + b"".join(contents) + headers


def bzimage(payload: bytes, *, protocol: int = 0x20F) -> bytes:
    setup = bytearray(5 * 512)
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"trailing code"


def lz4_legacy(content: bytes) -> bytes:
    from lz4.block import compress  # type: ignore[import-untyped]

    block: bytes = compress(content, store_size=False)
    return (
        b"\x02\x21\x4c\x18"
        + struct.pack("<I", len(block))
        + block
        + struct.pack("<I", len(content))
    )


VMLINUX = elf() + bytes(10_000)


@pytest.mark.parametrize(
    "pack",
    [
        lz4_legacy,
        gzip.compress,
        lzma.compress,
        lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
        bz2.compress,
    ],
    ids=["lz4", "gzip", "xz", "lzma", "bzip2"],
)
def test_the_kernel_is_found_in_a_bzimage(pack) -> None:  # type: ignore[no-untyped-def]
    assert extract_vmlinux(bzimage(pack(VMLINUX))) == VMLINUX


def test_an_uncompressed_kernel_stays_as_it_is() -> None:
    assert extract_vmlinux(VMLINUX) == VMLINUX


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"MZ" + bytes(2000), "no Linux kernel"),
        (b"", "no Linux kernel"),
        (bzimage(b"\x28\xb5\x2f\xfd" + bytes(100)), "not known here"),
        (bzimage(lz4_legacy(VMLINUX), protocol=0x205), "boot protocol 0x205"),
        (bzimage(lz4_legacy(VMLINUX))[:-40], "cut off"),
        (bzimage(lz4_legacy(VMLINUX)[:-4] + b"\0\0\0\1"), "can't be decompressed"),
        (bzimage(b"\x02\x21\x4c\x18" + b"\xff" * 60), "can't be decompressed"),
        (bzimage(gzip.compress(VMLINUX)[:-20]), "can't be decompressed"),
        (bzimage(gzip.compress(b"no ELF file" * 20)), "is no kernel"),
    ],
)
def test_a_bad_kernel_is_refused_with_the_reason(image: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        extract_vmlinux(image, "vmlinuz-6.1")


@given(st.integers(0, len(VMLINUX) + 2500), st.binary(min_size=1, max_size=8))
def test_no_kernel_does_worse_than_an_image_error(at: int, noise: bytes) -> None:
    for image in (bzimage(lz4_legacy(VMLINUX)), bzimage(gzip.compress(VMLINUX)), VMLINUX):
        changed = bytearray(image)
        changed[at % len(image) : at % len(image) + len(noise)] = noise
        try:
            extract_vmlinux(bytes(changed))
        except ImageError:
            continue


# -- ELF and modules ---------------------------------------------------------------------------


def test_memory_is_counted_over_all_loaded_segments() -> None:
    assert Elf(elf(memory=(0x3000, 0x1000, 0x10))).loaded_bytes() == 0x4010


@given(st.integers(0, 500), st.binary(min_size=1, max_size=8))
def test_no_elf_file_does_worse_than_an_elf_error(at: int, noise: bytes) -> None:
    data = bytearray(elf(sections={".modinfo": b"depends=a\0"}))
    data[at % len(data) : at % len(data) + len(noise)] = noise
    try:
        file = Elf(bytes(data))
        file.section(".modinfo")
        file.loaded_bytes()
        file.needed()
    except ElfError:
        return


def test_the_libraries_of_a_real_program_are_read() -> None:
    data = Path("/bin/sh").resolve().read_bytes()
    assert "libc.so.6" in Elf(data).needed()


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """`lib/modules/6.1` with top -> middle -> bottom and a module of its own."""
    folder = tmp_path / "6.1"
    for name, needs in (
        *(("net/top.ko", "mid_dle,bottom"), ("net/mid-dle.ko", "bottom")),
        *(("lib/bottom.ko", ""), ("fs/own.ko.xz", "builtin_one")),
    ):
        path = folder / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = elf(sections={".modinfo": b"license=GPL\0depends=" + needs.encode() + b"\0"})
        path.write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    (folder / "modules.builtin").write_text("kernel/fs/builtin-one.ko\n")
    return folder


def test_modules_come_with_all_they_need_each_after_what_it_needs(modules: Path) -> None:
    loaded = load_order(modules, ["top", "own", "builtin_one", "bottom"])
    assert [module.name for module in loaded] == ["bottom", "mid_dle", "top", "own"]
    assert modules_dep(loaded).splitlines() == [
        "kernel/lib/bottom.ko:",
        "kernel/net/mid-dle.ko: kernel/lib/bottom.ko",
        "kernel/net/top.ko: kernel/net/mid-dle.ko kernel/lib/bottom.ko",
        "kernel/fs/own.ko:",
    ]
    assert all(module.content.startswith(b"\x7fELF") for module in loaded)
    assert built_in_modules(modules) == {"builtin_one"}


def test_modules_that_are_missing_are_named_together(modules: Path) -> None:
    with pytest.raises(ImageError, match=r"6\.1 lacks the modules absent, other"):
        load_order(modules, ["other", "top", "absent"])


def test_modules_in_a_circle_are_an_error(modules: Path) -> None:
    (modules / "kernel/lib/bottom.ko").write_bytes(elf(sections={".modinfo": b"depends=top\0"}))
    with pytest.raises(ImageError, match="need each other: top > mid_dle > bottom > top"):
        load_order(modules, ["top"])


# -- manifests ---------------------------------------------------------------------------------

MANIFEST = Manifest(
    "base",
    "6.1",
    1,
    2,
    (Part("p", "1", "ab", 3),),
    ("/bin/sh",),
    ("m",),
    (StoredFile("f", "c", 4),),
    ("n",),
)


def test_a_manifest_comes_back_as_it_was_written() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_a_manifest_from_before_built_in_modules_were_noted_has_none() -> None:
    document = json.loads(MANIFEST.to_json())
    del document["built_in"]
    assert Manifest.from_json(json.dumps(document)) == replace(MANIFEST, built_in=())


@pytest.mark.parametrize("text", ["", "{}", "[]", "5", MANIFEST.to_json().replace("6.1", "1\\")])
def test_what_is_no_manifest_is_not_read(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(text)


def test_a_manifest_of_another_format_is_not_read() -> None:
    with pytest.raises(ValueError, match="format 2 is not 1"):
        Manifest.from_json(MANIFEST.to_json().replace('"format": 1', '"format": 2'))
