"""Where guest images are kept, and which one a machine gets.

    packages/               distribution packages as they were downloaded
    distributions/KEY/      what is made of them, which is slow: vmlinux, base.cpio, root/
    refs/NAME               the KEY an image's name stands for
    images/KEY/             initramfs.cpio: base.cpio and the product's own files, joined
    layers/KEY.squashfs     read-only layers, and KEY.json beside each
    agents/NAME.json        which layer an agent's is

Everything is written under another name first and then renamed, so what has its final name is
whole. Every published file has one fixed modification time, so that one that was written to since
is seen at no cost before a machine starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from voidbus.vm.image import publishing, upkeep
from voidbus.vm.image.fault import ImageError
from voidbus.vm.image.guest_image import GIVEN, GuestImage, given_image
from voidbus.vm.image.manifest import Manifest, Part, read_manifest
from voidbus.vm.image.own_files import own_files
from voidbus.vm.image.packages import package_file
from voidbus.vm.image.product import TOOLS_FOLDER, Product, product_archive

__all__ = [
    "GuestImage",
    "ImageError",
    "ImageStore",
    "default_store",
    "image_for",
    "require_memory",
    "require_modules",
]

BUILD_SECONDS = 1800.0
"""How long a build waits for another one to end."""

ASSEMBLE_SECONDS = 60.0
"""How long a start waits while another process puts the same image together."""

KEPT_IMAGES = 4
"""How many images stay in the cache as newer ones are put together."""

CLEAN_SECONDS = 10.0
"""How long cleaning waits for builds and starts under way."""

WORKING_BYTES = 10 << 20
"""What the kernel needs of its own beside its image and the files. The agent and small programs
get by with the memory the archive was in."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile(r"[0-9a-f]{32}")


class ImageStore:
    """The images in one directory. Safe with any number of processes at it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def packages(self) -> Path:
        """Where downloaded packages are."""
        return self.root / "packages"

    # -- which image ------------------------------------------------------------------------

    def current(self, name: str = "base") -> GuestImage:
        """The image of that name with this voidbus's own files in it.

        Where only those differ from what is cached it is put together here, offline. Raises
        ImageError where it was never built, or is damaged.
        """
        product = own_files()
        found = self.find(name, product)
        if found is not None:
            return found
        key = self._key_of(name)
        with publishing.locked(self.root / "images.lock", ASSEMBLE_SECONDS):
            found = self.find(name, product)  # another process may have made it meanwhile
            if found is None:
                self._forget_oldest()
                self._assemble(key, product)
                found = self.find(name, product)
        if found is None:
            raise ImageError(f"the image {name} was damaged while it was made; look at the disk")
        return found

    def _forget_oldest(self) -> None:
        """Keeps the newest images only: each change of voidbus's own files makes another."""
        with publishing.explained(self.root):
            folders = upkeep.published(self.root / "images")
            folders.sort(key=lambda folder: folder.stat().st_mtime_ns)
            for folder in folders[: max(0, len(folders) - KEPT_IMAGES + 1)]:
                publishing.remove(folder)

    def find(self, name: str = "base", product: Product | None = None) -> GuestImage | None:
        """The image `current` gives, where it is there already and whole. Makes nothing. Raises
        ImageError where its distribution part was never built, or is damaged."""
        key = self._key_of(name)
        folder = self._image_folder(key, product or own_files())
        distribution = read_manifest(self._distribution(key) / "manifest.json")
        self._require_whole(distribution, "vmlinux")
        try:
            image = self._image_in(folder)
        except ImageError:
            return None
        damaged = any(publishing.damage(self.root, record) for record in image.manifest.files)
        return None if damaged else image

    def list(self) -> Sequence[GuestImage]:
        """Every image there is that has a readable manifest, by name and digest."""
        images = []
        for folder in upkeep.published(self.root / "images"):
            with contextlib.suppress(ImageError):
                images.append(self._image_in(folder))
        return sorted(images, key=lambda image: (image.name, image.digest))

    def verify(self) -> Sequence[str]:
        """Reads everything and compares it with its digests; what is wrong, in sentences that
        say what to do."""
        return upkeep.verify(self.root)

    def clean(self, *, layers: bool = False, everything: bool = False) -> upkeep.Cleaned:
        """Removes what `current` has no use for: images with other files of voidbus's own,
        distribution parts no name stands for, packages of those, and what killed builds left.

        `layers` removes the read-only layers too, `everything` the whole store. What a running
        machine has open stays with it. Raises ImageError.
        """
        with (
            publishing.locked(self.root / "build.lock", CLEAN_SECONDS),
            publishing.locked(self.root / "images.lock", CLEAN_SECONDS),
            publishing.explained(self.root),
        ):
            keep = set() if everything else self._in_use()
            return upkeep.clean(self.root, keep, layers=layers or everything)

    def _in_use(self) -> set[Path]:
        """The folders and files `current` and the agents' layers need."""
        product = own_files()
        used: set[Path] = set()
        for record in upkeep.published(self.root / "agents"):
            with contextlib.suppress(ImageError):
                layers = [self.root / file.path for file in read_manifest(record).files]
                used |= {record, *layers, *(layer.with_suffix(".json") for layer in layers)}
        for reference in upkeep.published(self.root / "refs"):
            with contextlib.suppress(ImageError):
                key = self._key_of(reference.name)
                manifest = read_manifest(self._distribution(key) / "manifest.json")
                used |= {reference, self._distribution(key), self._image_folder(key, product)}
                used |= {
                    self.packages / package_file(part.name, part.sha256) for part in manifest.parts
                }
        return used

    def _image_in(self, folder: Path) -> GuestImage:
        manifest = read_manifest(folder / "manifest.json")
        if len(manifest.files) != 2:
            raise ImageError(f"{folder}/manifest.json is damaged; run `voidbus image build`")
        kernel, initramfs = manifest.files
        identity = f"{kernel.sha256} {initramfs.sha256}"
        return GuestImage(
            manifest.name,
            hashlib.sha256(identity.encode()).hexdigest(),
            self.root / kernel.path,
            self.root / initramfs.path,
            manifest,
        )

    def _image_folder(self, key: str, product: Product) -> Path:
        name = hashlib.sha256(f"{key} {product.digest}".encode()).hexdigest()[:32]
        return self.root / "images" / name

    # -- the distribution part --------------------------------------------------------------

    def has_distribution(self, key: str) -> bool:
        """Whether the distribution part is there, and whole: its files are read for that."""
        try:
            manifest = read_manifest(self._distribution(key) / "manifest.json")
        except ImageError:
            return False
        records = manifest.files
        return not any(publishing.damage(self.root, record, thorough=True) for record in records)

    @contextlib.contextmanager
    def new_distribution(self, key: str) -> Iterator[Path | None]:
        """A directory to make the distribution part in, while nobody else makes one; None where
        another process has made it meanwhile. It is published when the block ends well."""
        with publishing.locked(self.root / "build.lock", BUILD_SECONDS):
            if self.has_distribution(key):
                yield None
                return
            final = self._distribution(key)
            with publishing.new_folder(final) as folder:
                yield folder
                manifest = read_manifest(folder / "manifest.json")
                files = tuple(
                    publishing.stored_file(folder / name, self.root, final / name)
                    for name in ("vmlinux", "base.cpio")
                )
                (folder / "manifest.json").write_text(replace(manifest, files=files).to_json())

    def set_current(self, name: str, key: str) -> None:
        """From now on `name` stands for the distribution part `key`."""
        with publishing.new_file(self.root / "refs" / _checked_name(name)) as path:
            path.write_text(f"{key}\n")

    def _key_of(self, name: str) -> str:
        reference = self.root / "refs" / _checked_name(name)
        try:
            key = reference.read_text().strip()
        except FileNotFoundError as error:
            raise ImageError(
                f"there is no guest image {name} in {self.root}; build it with "
                f"`voidbus image build {name}`"
            ) from error
        except OSError as error:
            raise ImageError(
                f"{reference} can't be read: {error.strerror}; make it yours, or set "
                "XDG_CACHE_HOME to a directory that is"
            ) from error
        if not _KEY.fullmatch(key):
            raise ImageError(f"{reference} is damaged; run `voidbus image build {name}`")
        return key

    def _distribution(self, key: str) -> Path:
        return self.root / "distributions" / key

    def _require_whole(self, manifest: Manifest, *names: str, thorough: bool = False) -> None:
        for record in manifest.files:
            if names and record.path.rpartition("/")[2] not in names:
                continue
            wrong = publishing.damage(self.root, record, thorough=thorough)
            if wrong:
                raise ImageError(
                    f"the guest image is damaged: {wrong}; run `voidbus image build "
                    f"{manifest.name}` to make it anew"
                )

    def _assemble(self, key: str, product: Product) -> None:
        """Joins the distribution part and the product's; the kernel unpacks them in turn."""
        distribution = self._distribution(key)
        manifest = read_manifest(distribution / "manifest.json")
        self._require_whole(manifest, thorough=True)
        base = distribution / "base.cpio"
        final = self._image_folder(key, product)
        with publishing.new_folder(final) as folder:
            own = product_archive(product, distribution / "root", folder)
            initramfs = folder / "initramfs.cpio"
            with initramfs.open("wb") as stream, base.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
                stream.write(own)
            kernel = next(f for f in manifest.files if f.path.endswith("/vmlinux"))
            made = replace(
                manifest,
                unpacked_bytes=manifest.unpacked_bytes + len(own),
                parts=(*manifest.parts, Part("voidbus", product.version, product.digest, len(own))),
                programs=(*manifest.programs, *(f"/{TOOLS_FOLDER}/{t}" for t in product.tools)),
                files=(
                    kernel,
                    publishing.stored_file(initramfs, self.root, final / initramfs.name),
                ),
            )
            (folder / "manifest.json").write_text(made.to_json())


def default_store(environ: Mapping[str, str] = os.environ) -> ImageStore:
    """The store of this user: `$XDG_CACHE_HOME/voidbus/images`, else `~/.cache/voidbus/images`.

    Raises ImageError where there is no home directory either. A relative `XDG_CACHE_HOME` counts
    as none (XDG Base Directory Specification).
    """
    cache = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # noqa: PTH117 - Path would take "" for the working directory
        return ImageStore(Path(cache) / "voidbus/images")
    home = environ.get("HOME", "")
    if not os.path.isabs(home):  # noqa: PTH117
        raise ImageError("there is no place for guest images: set HOME or XDG_CACHE_HOME")
    return ImageStore(Path(home) / ".cache/voidbus/images")


def image_for(
    kernel: Path | None,
    initramfs: Path | None,
    environ: Mapping[str, str] = os.environ,
    store: ImageStore | None = None,
) -> GuestImage:
    """The image a machine boots: the given files, else those that `VOID_BOX_KERNEL` and
    `VOID_BOX_INITRAMFS` name, else the store's own. Raises ImageError."""
    kernel = kernel or _named(environ, "VOID_BOX_KERNEL")
    initramfs = initramfs or _named(environ, "VOID_BOX_INITRAMFS")
    if kernel is None and initramfs is None:
        return (store or default_store(environ)).current()
    if kernel is None or initramfs is None:
        given, lacking = ("kernel", "initramfs") if kernel else ("initramfs", "kernel")
        raise ImageError(
            f"a {given} is given without its {lacking} (an initramfs has the modules of one "
            f"kernel): give both, by sandbox.{lacking} or VOID_BOX_{lacking.upper()}, or neither "
            "for voidbus's own"
        )
    return given_image(kernel, initramfs)


def _named(environ: Mapping[str, str], variable: str) -> Path | None:
    value = environ.get(variable, "")
    return Path(value) if value else None


def require_memory(image: GuestImage, memory_mb: int) -> None:
    """Raises ImageError, naming the least that works, where `memory_mb` mebibytes can't hold the
    image and room to work."""
    least = least_memory(image)
    if memory_mb < least:
        raise ImageError(
            f"{memory_mb} MiB of memory can't hold the guest image {image.name}: its kernel takes "
            f"{image.manifest.kernel_bytes >> 20} MiB and its files "
            f"{image.manifest.unpacked_bytes >> 20}; set sandbox.memory_mb to {least} or more"
        )


def least_memory(image: GuestImage) -> int:
    """The least memory a machine with this image works in, in mebibytes."""
    # While the archive is unpacked it is in memory itself, and the root file system may take half
    # of what is left then (the kernel's `init/do_mounts.c` and `mm/shmem.c`).
    archive = image.manifest.files[-1].size
    files = archive + 2 * image.manifest.unpacked_bytes
    return ((image.manifest.kernel_bytes + files + WORKING_BYTES - 1) >> 20) + 1


def require_modules(image: GuestImage, names: Iterable[str]) -> None:
    """Raises ImageError, naming them, where the image has not all these kernel modules. Of files
    that are not ours it is not known."""
    manifest = image.manifest
    if image.name == GIVEN:
        return
    missing = sorted(set(names).difference(manifest.modules, manifest.built_in))
    if missing:
        raise ImageError(
            f"the guest image {image.name} lacks the kernel modules {', '.join(missing)}, without "
            "which this machine can't do its work: another version of voidbus built it; run "
            f"`voidbus image build {image.name}`"
        )


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ImageError(f"{name!r} is no name of an image: small letters, digits and . _ - only")
    return name
