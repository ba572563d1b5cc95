"""A guest image as a machine gets it: our own, or two files somebody gives."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.image.elf import MAGIC, Elf, ElfError
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.kernel import BOOT_MAGIC
from voidbus.vm.image.manifest import Manifest, StoredFile

# What an initramfs begins with: cpio itself (newc, crc), gzip, bzip2, lzma, xz, lzop, lz4, zstd
# (the kernel's `lib/decompress.c`).
_ARCHIVES = (
    *(b"070701", b"070702", b"\x1f\x8b", b"BZh", b"\x5d\0\0", b"\xfd7zXZ\0", b"\x89LZO"),
    *(b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"),
)
GIVEN = "custom"
"""The name of an image that is not ours, and may know no more than the protocol."""

_INIT_SIZE = 0x260
"""Where a bzImage says how much memory it needs to start (boot protocol 2.10)."""


@dataclass(frozen=True)
class GuestImage:
    """A kernel and an initramfs that belong together.

    `kernel` is an uncompressed ELF vmlinux (a given one may be a bzImage); `initramfs` a newc
    archive (a given one may be compressed). `digest` names the content: two images with the same
    digest are the same.
    """

    name: str
    digest: str
    kernel: Path
    initramfs: Path
    manifest: Manifest


def given_image(kernel: Path, initramfs: Path) -> GuestImage:
    """The image `custom` of two files that are not ours.

    They are looked at only so far that a wrong file is found out before a machine is started. Its
    digest is of their names, sizes and times, and its manifest has no other. Raises ImageError.
    """
    identity = []
    files = []
    for path, what in ((kernel, "kernel"), (initramfs, "initramfs")):
        try:
            if not path.is_file():
                reason = "is no file" if path.exists() else "does not exist"
                raise ImageError(f"the {what} {path} {reason}; {_remedy(what)}")
            status = path.stat()
            identity.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
            files.append(StoredFile(str(path), "", status.st_size))
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise ImageError(
                f"the {what} {path} can't be read: {error.strerror}; {_remedy(what)}"
            ) from error
    with initramfs.open("rb") as file:
        if not file.read(8).startswith(_ARCHIVES):
            raise ImageError(
                f"{initramfs} is no initramfs: neither a cpio archive nor a compressed one; "
                f"{_remedy('initramfs')}"
            )
    manifest = Manifest(
        name=GIVEN,
        kernel_bytes=_kernel_bytes(kernel),
        unpacked_bytes=files[1].size,
        files=tuple(files),
    )
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    return GuestImage(GIVEN, digest, kernel, initramfs, manifest)


def _remedy(what: str) -> str:
    return (
        f"correct sandbox.{what} or VOID_BOX_{what.upper()}, or leave kernel and initramfs out to "
        "use voidbus's own image"
    )


def _kernel_bytes(kernel: Path) -> int:
    """The memory the kernel takes when it starts. Raises ImageError where it is no kernel."""
    with kernel.open("rb") as file:
        head = file.read(0x1000)
        if head.startswith(MAGIC):
            try:
                return Elf(head + file.read()).loaded_bytes()
            except ElfError as error:
                raise ImageError(f"{kernel} is a damaged kernel: {error}") from error
    at, signature = BOOT_MAGIC
    if head[at : at + 4] == signature and len(head) >= _INIT_SIZE + 4:
        return int(struct.unpack_from("<I", head, _INIT_SIZE)[0])
    raise ImageError(
        f"{kernel} is no kernel for x86: neither an ELF vmlinux nor a bzImage; {_remedy('kernel')}"
    )
